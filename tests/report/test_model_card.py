"""The model card: true, whole, without folders of anybody's machine, and proof against names."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from dataclasses import replace

import pytest
import yaml
from builders import starter_rows
from huggingface_hub import ModelCard, RepoCard
from markdown_it import MarkdownIt
from rich.console import Console

from tpaw.config.files import to_yaml
from tpaw.config.schema import ObjectiveConfig
from tpaw.models.references import checkpoint_of, find_checkpoint
from tpaw.report.model_card import _markdown, model_card
from tpaw.report.tables import suites_of_run
from tpaw.report.verdict import NOT_COMPARED
from tpaw.storage.artifacts import read_listed_json, read_manifest, read_sealed, write_sealed
from tpaw.storage.run_directory import RunDirectory
from tpaw.storage.seals import seal_text


def card_of(run, i=None, **options):
    reference = str(run.root) if i is None else f"{run.root}@{i}"
    return model_card(find_checkpoint(reference), **{"dtype": "fp32", "merge": False} | options)


def front_matter(card):
    return yaml.safe_load(card.split("---\n")[1])


def code(card):
    (found,) = re.findall(r"^```python\n(.*?)^```$", card, flags=re.S | re.M)
    return found


def table(card):
    """The cells of the table, by the name of the checkpoint."""
    rows = [line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("| ")]
    return {row[0]: row for row in rows}


def test_it_says_what_was_trained_on_what(finished):
    run, config = finished
    card = card_of(run, 3, dtype="bf16")
    for part in (
        "θ_3 of a run",
        "arXiv 2605.09922",
        "- method: team-based self-play with dual adaptive weighting (TPAW)",
        "- θ_0: `qwen2`, which is not on the Hub",
        "- training data: 24 records of `train.jsonl`",
        "- held-out data: 10 records of `heldout.jsonl`",
        "- iterations: 3 of 4",
        "- seed: 0",
        "- weights here: the whole model in bf16",
        "rounded to bf16",
        "transformers ",
        "@article{li2026tpaw",
        NOT_COMPARED,
    ):
        assert part in card, part
    (settings,) = re.findall(r"^```yaml\n(.*?)^```$", card, flags=re.S | re.M)
    assert yaml.safe_load(settings) == {
        "objective": {"lambda": [0.1, 0.1, 0.1, 5.0]},
        "train": {"learning_rate": 1e-3, "epochs": [2, 1, 1, 1], "batch_size": 8},
        "generate": {"max_new_tokens": 12},
        "max_length": 128,
        "precision": "fp32",
    }
    assert str(config.model.path) not in card
    stop = read_manifest(run.inputs)["stop_ids"]
    assert f"max_new_tokens=12,\n    do_sample=False,\n    eos_token_id={stop}," in card


def test_the_table_and_the_index_hold_the_numbers_of_the_run(finished):
    run, _ = finished
    card = card_of(run, 2)
    rows = table(card)
    assert set(rows) == {"iteration", "---", "θ_0", "θ_1", "θ_2"}
    assert rows["iteration"][:3] == ["iteration", "accuracy", "p vs θ_0"]
    for i in range(3):
        found = read_listed_json(run.evaluation(i), "results.json")["exact_match"]
        low, high = found["interval_95"]
        assert rows[f"θ_{i}"][1] == f"{found['accuracy']:.3f} [{low:.3f}, {high:.3f}]"
    assert rows["θ_2"][2] == f"{found['versus_start']['p_value']:.1g}"
    (entry,) = front_matter(card)["model-index"]
    (result,) = entry["results"]
    assert result["dataset"] == {"name": "heldout.jsonl", "type": "held-out"}
    (metric,) = result["metrics"]
    assert metric["type"] == "exact_match"
    assert metric["value"] == found["accuracy"]
    assert metric["args"] == {"items": 10, "interval_95": found["interval_95"]}
    assert "θ_2 answers" in card
    assert "exact McNemar test" in card


def test_the_hubs_library_reads_it(finished, adapted):
    whole = ModelCard(card_of(finished[0]))
    assert whole.data.library_name == "transformers"
    assert whole.data.pipeline_tag == "text-generation"
    assert whole.data.tags == ["tpaw", "self-play"]
    assert whole.data.base_model is None  # a folder is nobody else's business
    assert whole.data.eval_results[0].metric_type == "exact_match"
    adapter = ModelCard(card_of(adapted))
    assert adapter.data.library_name == "peft"
    assert "lora" in adapter.data.tags
    assert adapter.data.eval_results is None
    merged = ModelCard(card_of(adapted, merge=True))
    assert merged.data.library_name == "transformers"
    assert "lora" not in merged.data.tags


@pytest.mark.parametrize(
    ("which", "merge"), [("finished", False), ("adapted", False), ("adapted", True)]
)
def test_its_code_answers_as_the_model_does(tpaw_, request, tmp_path, monkeypatch, which, merge):
    """The code is run as it stands, in the folder that export wrote, with another prompt."""
    run = request.getfixturevalue(which)
    root = run[0].root if which == "finished" else run.root
    options = ["--merge"] if merge else []
    assert tpaw_("export", root, "-o", tmp_path / "FOLDER", *options)[0] == 0
    monkeypatch.chdir(tmp_path)
    question = starter_rows(2)[1]["question"]
    text = code((tmp_path / "FOLDER" / "README.md").read_text())
    assert 'path = "FOLDER"' in text
    assert ("apply_chat_template" in text) == (which == "finished")
    assert ("AutoPeftModelForCausalLM" in text) == (which == "adapted" and not merge)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(text.replace('"What is 2 + 2?"', repr(question)), {})
    code_, out, _ = tpaw_("ask", root, "--greedy", "--prompt", question)
    assert code_ == 0
    shown = io.StringIO()
    Console(file=shown, width=140).print(printed.getvalue(), end="", soft_wrap=True, markup=False)
    assert printed.getvalue().strip()
    assert out.strip() == shown.getvalue().strip()


def changed(run, folder, **updates):
    """A copy of a run with another configuration, by section, and with another θ_0."""
    copy = RunDirectory(shutil.copytree(run.root, folder))
    start = updates.pop("start", None)
    config = run.load_config()
    for section, values in updates.items():
        old = getattr(config, section)
        value = old.model_copy(update=values) if isinstance(values, dict) else values
        config = config.model_copy(update={section: value})
    copy.config_file.write_text(seal_text(to_yaml(config, comments=False)))
    if start is not None:
        write_sealed(copy.initial_player_file, read_sealed(copy.initial_player_file) | start)
    return copy


HUB = {"path": "my-org/my-sft", "revision": "0123456789abcdef0123456789abcdef01234567"}


def hub_card(run, i=2):
    return model_card(checkpoint_of(run, i, trust=False), dtype="fp32", merge=False)


def test_names_on_the_hub_are_in_the_front_matter(finished, tmp_path):
    run, config = finished
    heldout = config.evaluate.data.model_copy(
        update={"path": "my-org/my-data", "name": "main", "split": "test"}
    )
    copy = changed(
        run,
        tmp_path / "copy",
        start=HUB,
        data={"path": "my-org/my-data", "name": "main"},
        evaluate={"data": heldout},
    )
    card = hub_card(copy)
    found = front_matter(card)
    assert found["base_model"] == "my-org/my-sft"
    assert found["base_model_relation"] == "finetune"
    assert found["datasets"] == ["my-org/my-data"]
    dataset = found["model-index"][0]["results"][0]["dataset"]
    assert dataset == {
        "name": "my-org/my-data",
        "type": "my-org/my-data",
        "config": "main",
        "split": "test",
    }
    assert "- θ_0: `my-org/my-sft` (commit `0123456789ab`)" in card
    assert "24 records of `my-org/my-data` `main` `train`" in card
    # The same form, but a folder beside the run.
    (tmp_path / "my-org" / "my-data").mkdir(parents=True)
    assert "datasets" not in front_matter(hub_card(copy))


def test_an_adapter_names_the_base_that_it_goes_on(adapted):
    checkpoint = find_checkpoint(str(adapted.root))
    base = replace(checkpoint.player.base, name="my-org/base", revision=HUB["revision"])
    checkpoint = checkpoint._replace(player=replace(checkpoint.player, base=base))
    card = model_card(checkpoint, dtype="bf16", merge=False)
    found = front_matter(card)
    assert found["base_model"] == "my-org/base"
    assert found["base_model_relation"] == "adapter"
    assert "The adapter goes on top of `my-org/base` (commit `0123456789ab`)." in card
    assert "base_model" not in front_matter(model_card(checkpoint, dtype="bf16", merge=True))


FOLDERS = ("/home/alice/secret/", "~/secret/", "../secret/", "C:\\Users\\alice\\secret\\")


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_folder_of_the_machine_is_in_it(finished, tmp_path, folder):
    run, config = finished
    heldout = config.evaluate.data.model_copy(update={"path": f"{folder}held.jsonl"})
    copy = changed(
        run,
        tmp_path / "copy",
        start={"path": f"{folder}sft"},
        data={"path": f"{folder}rows.jsonl"},
        evaluate={"data": heldout, "suites": (f"{folder}mine.yaml",)},
        critic={"path": f"{folder}critic"},
        train={
            "training_arguments": {"logging_dir": f"{folder}logs"},
            "optimizer": f"{folder}mine",
        },
        model={"path": f"{folder}sft"},
        method="critic",
        objective=ObjectiveConfig(),
        generate={"samples": 2},
    )
    card = hub_card(copy)
    assert "secret" not in card
    assert "alice" not in card
    for name in ("`sft`", "`rows.jsonl`", "`held.jsonl`"):
        assert name in card
    assert "optimizer: mine" in card
    assert str(tmp_path) not in card


NASTY = [
    "a\n---\n# Broken\n",
    "x: [1, 2\ny: {",
    "` ``` `` <script>alert(1)</script>",
    "```\n# heading\n```",
    "a | b | c",
    "[x](javascript:alert(1)) ![i](http://t/x.png)",
    "{{ 7 * 7 }}{% raw %}",
    "\x1b]0;owned\x07\u202e",
    "*&^%$ 'single' \"double\" # comment",
    "`",
    " ",
]


@pytest.mark.parametrize("name", NASTY)
def test_a_name_from_outside_stays_a_name(finished, tmp_path, name):
    run, config = finished

    def card_with(folder, start, path, part):
        heldout = config.evaluate.data.model_copy(
            update={"path": "my-org/my-data", "name": part, "split": part}
        )
        copy = changed(
            run,
            tmp_path / folder,
            start=HUB | {"path": start},
            data={"path": path + ".jsonl"},
            evaluate={"data": heldout},
            train={"optimizer": part, "schedule": f"{part}\n```\n"},
        )
        return hub_card(copy)

    found = card_with("copy", name, name, name)
    # The Hub's own reader finds the same front matter, and a name in it is text.
    card, plain = RepoCard(found), RepoCard(card_with("plain", "not an id", "data", "main"))
    assert set(card.data.to_dict()) == set(plain.data.to_dict())
    dataset = card.data.to_dict()["model-index"][0]["results"][0]["dataset"]
    assert set(dataset) <= {"name", "type", "config", "split"}
    assert all(isinstance(value, str) for value in dataset.values())
    # The text has the same structure: nothing becomes markup.
    assert structure(card.text) == structure(plain.text)
    assert not set(found) & set("\x1b\x07\u202e")


def structure(text):
    """The kinds of all blocks and inline elements of a text, without code spans' contents."""
    kinds = []
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type == "fence" and token.info == "yaml":
            continue  # one more setting
        kinds.append(token.type)
        kinds += [child.type for child in token.children or () if child.type != "text"]
    return kinds


def test_a_run_with_another_name_is_only_a_title(finished, tmp_path):
    copy = changed(finished[0], tmp_path / "# `x` [y](z) | --- <b>")
    card = RepoCard(card_of(copy))
    assert card.data.to_dict()["model-index"][0]["name"].startswith("θ_4 of # `x`")
    plain = RepoCard(card_of(finished[0]))
    assert structure(card.text) == structure(plain.text)


def test_the_sentence_about_sft_is_not_said_of_sft(finished, tmp_path):
    copy = changed(finished[0], tmp_path / "copy", method="sft", objective=ObjectiveConfig())
    card = hub_card(copy)
    assert NOT_COMPARED not in card
    assert "supervised fine-tuning (SFT)" in card
    assert front_matter(card)["tags"] == ["tpaw", "sft"]


def test_a_checker_is_named(finished, tmp_path, monkeypatch):
    (tmp_path / "my_checker.py").write_text("def is_right(prompt, target, response): return True")
    monkeypatch.syspath_prepend(tmp_path)
    card = hub_card(changed(finished[0], tmp_path / "copy", checker="my_checker"))
    assert "`my_checker`" in card
    metric = front_matter(card)["model-index"][0]["results"][0]["metrics"][0]
    assert metric["type"] == "accuracy"


def test_an_exported_checkpoint_has_it(tpaw_, finished, tmp_path):
    run, _ = finished
    assert tpaw_("export", f"{run.root}@2", "-o", tmp_path / "out")[0] == 0
    assert (tmp_path / "out" / "README.md").read_text(encoding="utf-8") == card_of(run, 2)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


def test_the_name_of_a_suite_is_no_markup():
    name = "x](http://evil) <img src=q>\n\n# heading"
    entry = {"iteration": 1, "suites": {name: {"score": 1.0, "stderr": None, "benchmarks": {}}}}
    [table] = suites_of_run({"players": [entry]})
    caption = MarkdownIt("commonmark", {"html": True}).render(_markdown(table)["caption"])
    assert "<img" not in caption
    assert "<a" not in caption
    assert "<h1" not in caption
