"""`tpaw answer`: a checkpoint's answers, for judges."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from builders import make_model, sums, write_jsonl
from judge_server import longer
from messages import complains, refused
from transformers import AutoModelForCausalLM, AutoTokenizer

from tpaw.errors import Interrupted, NonFiniteError
from tpaw.evaluation.judge.answers import answer_rows
from tpaw.models.fingerprint import fingerprint
from tpaw.runtime.interrupt import StopSignal

SMALL = ("max_length=128", "generate.max_new_tokens=12", "precision=fp32", "device=cpu")


def outputs(folder):
    return json.loads((Path(folder) / "outputs.json").read_text())


def arguments(settings):
    return [part for setting in settings for part in ("--set", setting)]


def test_a_model_answers_as_it_does_by_hand(tpaw_, model_folder, heldout_file, tmp_path):
    code, out, err = tpaw_(
        *("answer", model_folder, "--data", heldout_file, "--greedy", "-o", tmp_path / "answers"),
        *arguments(SMALL),
    )
    assert code == 0, err
    assert f"Responses: {tmp_path / 'answers'}" in out
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    found = outputs(tmp_path / "answers")
    rows = sums(10, seed=1)
    assert [row["instruction"] for row in found] == [row["question"] for row in rows]
    for row, item in zip(rows, found, strict=True):
        chat = [{"role": "user", "content": row["question"]}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert item["prompt"] == text
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            emitted = model.generate(**ids, do_sample=False, max_new_tokens=12)[0]
        answer = emitted[ids.input_ids.shape[1] :]
        assert item["output"] == tokenizer.decode(answer, skip_special_tokens=True)
        assert item["finish_reason"] == ("stop" if 4 in answer else "length")
        assert item["generator"] == "qwen2"
        assert item["dataset"] == "heldout"
    settings = json.loads((tmp_path / "answers" / "settings.json").read_text())["settings"]
    assert settings["fingerprint"] == fingerprint(model_folder)
    assert settings["player"] is None
    assert settings["sampling"]["temperature"] == 0


def test_the_format_is_alpaca_evals(model_folder, heldout_file, tmp_path):
    """As its `load_or_convert_to_dataframe` reads a .json, and what `evaluate` needs of it."""
    folder = answer(model_folder, heldout_file, tmp_path / "o")
    table = pd.read_json(folder / "outputs.json")
    assert {"instruction", "output", "generator", "dataset"} <= set(table.columns)
    assert len(table) == 10
    assert table["generator"].unique().tolist() == ["qwen2"]
    assert all(isinstance(text, str) for text in [*table["instruction"], *table["output"]])


def answer(reference, data, output, *more, greedy=False, stop=None):
    return answer_rows(
        str(reference),
        data and str(data),
        output,
        greedy=greedy,
        overrides=[*(SMALL if data else ()), *more],
        stop=stop or StopSignal(),
    )


def test_a_run_answers_its_heldout_rows_as_it_samples(finished, tmp_path):
    run, config = finished
    first = answer(run.root, None, tmp_path / "first")
    facts = json.loads((first / "settings.json").read_text())["settings"]
    assert facts["name"] == "run@4"
    assert facts["player"] == 4
    assert facts["fingerprint"] == fingerprint(run.checkpoint(4))
    assert facts["sampling"]["temperature"] == 1.0
    assert facts["sampling"]["max_new_tokens"] == config.generate.max_new_tokens
    assert [row["instruction"] for row in outputs(first)] == [
        row["question"] for row in sums(10, seed=1)
    ]
    again = answer(f"{run.root}@4", None, tmp_path / "again")
    assert (again / "outputs.json").read_bytes() == (first / "outputs.json").read_bytes()
    other = answer(run.root, None, tmp_path / "other", "seed=1")
    assert outputs(other) != outputs(first)
    start = answer(f"{run.root}@0", None, tmp_path / "start")
    assert {row["generator"] for row in outputs(start)} == {"run@0"}


def test_two_checkpoints_before_a_judge(tpaw_, finished, serve, tmp_path):
    run, _ = finished
    for i in (4, 0):
        assert tpaw_("answer", f"{run.root}@{i}")[0] == 0
    new, old = (outputs(tmp_path / "answers" / f"run@{i}") for i in (4, 0))
    server = serve(longer)
    code, out, _ = tpaw_(
        *("judge", "answers/run@4", "answers/run@0", "--endpoint", server.url, "--model", "j")
    )
    assert code == 0
    assert "run@4" in out
    found = json.loads((tmp_path / "judgements/run@4-vs-run@0/results.json").read_text())
    lengths = [(len(a["output"]), len(b["output"])) for a, b in zip(new, old, strict=True)]
    assert found["wins"] == sum(a > b for a, b in lengths)
    assert found["losses"] == sum(a < b for a, b in lengths)
    assert found["a"]["name"] == "run@4"


def test_a_broken_model_gives_no_answers(model_folder, heldout_file, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "broken")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.norm.weight[5] = torch.nan
    model.save_pretrained(folder)
    with refused(folder, "model.norm.weight", error=NonFiniteError):
        answer(folder, heldout_file, tmp_path / "o", greedy=True)
    assert not (tmp_path / "o" / "outputs.json").exists()


def test_stopped_and_gone_on_is_the_same(model_folder, heldout_file, tmp_path):
    shards = "generate.shard_size=4"
    whole = answer(model_folder, heldout_file, tmp_path / "whole", shards)

    class StopsLater(StopSignal):
        checks = 0

        def check(self):
            self.checks += 1
            if len(list((tmp_path / "o" / "responses").glob("shard-*"))) == 1:
                raise Interrupted(15)

    with pytest.raises(Interrupted):
        answer(model_folder, heldout_file, tmp_path / "o", shards, stop=StopsLater())
    assert not (tmp_path / "o" / "outputs.json").exists()
    kept = (tmp_path / "o" / "responses" / "shard-00000.parquet").stat().st_mtime_ns
    resumed = answer(model_folder, heldout_file, tmp_path / "o", shards)
    assert (resumed / "outputs.json").read_bytes() == (whole / "outputs.json").read_bytes()
    assert (resumed / "responses" / "shard-00000.parquet").stat().st_mtime_ns == kept


def test_unfinished_answers_are_not_judged(tpaw_, model_folder, heldout_file, tmp_path):
    folder = answer(model_folder, heldout_file, tmp_path / "o")
    (folder / "outputs.json").unlink()
    code, _, err = tpaw_(
        *("judge", folder, folder, "--endpoint", "http://127.0.0.1:1/v1", "--model", "j")
    )
    assert code == 2
    complains(err, folder, "`tpaw answer`")


def test_a_folder_holds_one_piece_of_work(model_folder, heldout_file, data_file, tmp_path):
    answer(model_folder, heldout_file, tmp_path / "o")
    with refused(tmp_path / "o", "seed: 0 → 1"):
        answer(model_folder, heldout_file, tmp_path / "o", "seed=1")
    with refused(tmp_path / "o", "rows_sha256"):
        answer(model_folder, data_file, tmp_path / "o")
    with refused(tmp_path):
        answer(model_folder, heldout_file, tmp_path)


def test_conversations_are_told_whole(model_folder, tmp_path):
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "Me."},
    ]
    alone = [{"role": "user", "content": "Alone?"}, {"role": "assistant", "content": "Yes."}]
    data = write_jsonl(tmp_path / "chat.jsonl", [{"messages": chat}, {"messages": alone}])
    found = outputs(answer(model_folder, data, tmp_path / "o"))
    assert [row["instruction"] for row in found] == ["system: Be brief.\n\nuser: Who?", "Alone?"]


def test_a_tokenizer_of_another_model_is_refused(model_folder, heldout_file, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "mixed")
    make_model(vocab_size=20).save_pretrained(folder)
    with refused("model.path", folder, "the model has 20 tokens"):
        answer(folder, heldout_file, tmp_path / "o", greedy=True)
    assert not (tmp_path / "o").exists()


def test_rows_that_are_skipped_shift_nothing(model_folder, tmp_path, capsys):
    rows = [{"question": "?" * 500, "answer": "long"}, *sums(3)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    folder = answer(model_folder, data, tmp_path / "o", "evaluate.data.max_skipped=0.5")
    assert "3 prompts; skipped: 1 (longer than max_length 128)" in capsys.readouterr().err
    assert [row["instruction"] for row in outputs(folder)] == [r["question"] for r in sums(3)]


@pytest.mark.parametrize(
    ("data", "more", "parts"),
    [
        (None, (), ["--data"]),
        ("missing.jsonl", (), ["evaluate.data.path", "missing.jsonl"]),
        ("rows.jsonl", ("max_length=4096",), ["max_length", 4096, 256]),
        ("rows.jsonl", ("generate.temprature=1",), ["temprature", "generate.temperature"]),
    ],
    ids=["no-data", "no-file", "too-long", "unknown"],
)
def test_bad_input(model_folder, tmp_path, monkeypatch, data, more, parts):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tpaw.evaluation.judge.answers.load_model", lambda *a, **k: 1 / 0)
    write_jsonl(tmp_path / "rows.jsonl", sums(3))
    with refused(*parts):
        answer(model_folder, data, tmp_path / "o", *more)
    assert not (tmp_path / "o").exists()
