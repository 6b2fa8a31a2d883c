"""Text from files and arguments reaches the terminal without the characters that it obeys."""

from __future__ import annotations

import json
import shutil

import pytest
from builders import make_tokenizer, sums, write_jsonl

ESC = "\x1b]0;owned\x07\x9b\u202e"
YAML_ESC = json.dumps(ESC)


def rows_with(key, value, tmp_path):
    return write_jsonl(tmp_path / "rows.jsonl", [{"question": "q", key: value}])


def column_name(tmp_path, model):
    return "plan", "starter", f"--set=data.path={rows_with(ESC, 'x', tmp_path)}"


def line_that_is_no_record(tmp_path, model):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ESC, ensure_ascii=False) + "\n")
    return "plan", "starter", f"--set=data.path={path}"


def yaml_key(tmp_path, model):
    (tmp_path / "c.yaml").write_text(f"extends: starter\n{YAML_ESC}: 1\n")
    return "plan", tmp_path / "c.yaml"


def data_path(tmp_path, model):
    return "plan", "starter", f"--set=data.path={YAML_ESC}"


def model_path(tmp_path, model):
    return "plan", "starter", f"--set=model.path={YAML_ESC}"


def architecture(tmp_path, model):
    folder = shutil.copytree(model, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"architectures": [ESC], "model_type": ESC})
    )
    return "plan", "starter", f"--set=model.path={folder}"


def template_error(tmp_path, model):
    folder = shutil.copytree(model, tmp_path / "m")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception(" + YAML_ESC + ") }}"
    tokenizer.save_pretrained(folder)
    data = write_jsonl(tmp_path / "rows.jsonl", sums(3))
    return "plan", "starter", f"--set=model.path={folder}", f"--set=data.path={data}"


def run_key(tmp_path, model):
    (tmp_path / "run.json").write_text(json.dumps({"format": 1}))
    (tmp_path / "config.yaml").write_text(f"{YAML_ESC}: 1\n")
    return "status", tmp_path


def run_format(tmp_path, model):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "run.json").write_text(json.dumps({"format": ESC}))
    return "run", "starter", "-o", tmp_path / "r"


def stored_setting(tmp_path, model):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "run.json").write_text(json.dumps({"format": 1}))
    (tmp_path / "r" / "config.yaml").write_text(f"extends: starter\ndata: {{path: {YAML_ESC}}}\n")
    return "run", "starter", "-o", tmp_path / "r"


@pytest.mark.parametrize(
    "source",
    [
        column_name,
        line_that_is_no_record,
        yaml_key,
        data_path,
        model_path,
        architecture,
        template_error,
        run_key,
        run_format,
        stored_setting,
    ],
)
def test_errors_show_control_characters_as_escapes(source, tmp_path, model_folder, tpaw_):
    code, out, err = tpaw_(*source(tmp_path, model_folder))
    assert code in (1, 2)
    assert "tpaw: " in err
    assert not set(out + err) & set("\x1b\x07\x9b\u202e")


def test_a_prompt_with_markup_is_shown_as_it_is(tmp_path, tpaw_):
    rows = [{"question": "[red]x[/red] :smile: [/b]", "answer": f"#### {i}"} for i in range(60)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    code, out, _ = tpaw_("plan", "starter", f"--set=data.path={path}")
    assert code == 0
    assert "[red]x[/red] :smile: [/b]" in out
