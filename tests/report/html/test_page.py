"""report.html as text: what it holds, that it is closed, and that texts stay texts."""

from __future__ import annotations

import base64
import hashlib
import json
import re

import pytest
from builders import sums

from tests.report.html.hostile import ATTACK, hostile_run
from tests.report.html.parsed import Parsed
from tpaw.config.schema import RunConfig
from tpaw.report import pace
from tpaw.report.html import page as page_module
from tpaw.report.html.page import Report, rendered
from tpaw.selfplay import self_play
from tpaw.storage.run_directory import RunDirectory


def test_a_run_writes_it_and_it_asks_for_nothing_from_outside(finished):
    run, _ = finished
    text = run.report_file.read_text(encoding="utf-8")
    page = Parsed(text)
    for tag, attributes in page.elements:
        assert tag not in ("link", "img", "iframe", "object", "base", "form action")
        assert not {"src", "srcset", "style", "action"} & set(attributes), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        if "href" in attributes:
            assert attributes["href"].startswith("#")
    assert not re.search(r"url\(|@import", page.scripts["style"])
    assert not re.search(r"fetch\(|XMLHttp|innerHTML|eval\(", page.scripts["script"])
    [policy] = [a["content"] for t, a in page.elements if a.get("http-equiv")]
    for kind in ("style", "script"):
        digest = hashlib.sha256(page.scripts[kind].encode()).digest()
        assert f"{kind}-src 'sha256-{base64.b64encode(digest).decode()}'" in policy
    assert policy.startswith("default-src 'none';")


def test_it_shows_every_prompt_with_its_responses(finished):
    run, config = finished
    data = json.loads(Parsed(rendered(run, config)).scripts["samples-data"])
    assert data["heldout"]["systems"] == ["θ_0", "θ_1", "θ_2", "θ_3", "θ_4"]
    assert data["training"]["systems"] == ["θ_0", "θ_1", "θ_2", "θ_3"]
    assert len(data["heldout"]["items"]) == data["heldout"]["total"] == 10
    assert len(data["training"]["items"]) == data["training"]["total"] == 24
    lines = (run.evaluation(3) / "exact_match.jsonl").read_text().splitlines()
    known = {item["id"]: item["completion"] for item in map(json.loads, lines)}
    for item in data["heldout"]["items"]:
        assert item["answers"][3]["text"] == known[item["id"]]
        assert all(len(answer["logps"]) == 2 for answer in item["answers"])
    asked = [item["prompt"] for item in data["training"]["items"]]
    assert asked == [row["question"] for row in sums(24)]  # no token of the chat template


def test_texts_stay_texts(finished, tmp_path):
    run, config = hostile_run(finished[0], tmp_path), finished[1]
    text = rendered(run, config)
    assert "\x1b" not in text
    page = Parsed(text)
    assert "img" not in {tag for tag, _ in page.elements}
    assert {tag for tag, _ in page.elements} == {
        tag for tag, _ in Parsed(rendered(*finished)).elements
    }
    assert "a <b> & 'run' ␛[31m" in "".join(page.texts)
    data = json.loads(page.scripts["samples-data"])
    item = data["heldout"]["items"][1]
    assert item["prompt"] == f"{ATTACK} prompt 1"
    assert item["answers"][2]["text"].startswith(ATTACK)


def test_kinds_are_counted(finished, tmp_path):
    run, config = hostile_run(finished[0], tmp_path), finished[1]
    found = json.loads(Parsed(rendered(run, config)).scripts["samples-data"])["heldout"]
    assert found["of_kind"] == {
        "wrong to right": 3, "right to wrong": 3, "always wrong": 2, "always right": 2,
        "changed": 10, "truncated": 1,
    }  # fmt: skip


@pytest.mark.parametrize("iterations", [0, 1])
def test_a_run_that_is_half_done(settings, tmp_path, iterations, monkeypatch):
    monkeypatch.setattr(pace, "SHARE_OF_TIME", 1e9)  # a slow machine would leave some out
    config = RunConfig.load(settings)
    run = RunDirectory(tmp_path / "run")

    class Stopped(Exception):
        pass

    def stop(i):
        if i == iterations:
            raise Stopped

    import tpaw.pipeline.stages as stages

    evaluate = stages.Stages.evaluate

    def evaluated(self, player):
        evaluate(self, player)
        stop(player.index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages.Stages, "evaluate", evaluated)
        with pytest.raises(Stopped):
            self_play(config, run.root)
    text = run.report_file.read_text(encoding="utf-8")
    assert f"{iterations} of {config.iterations} iterations are done." in text
    assert ("No iteration is trained yet." in text) == (iterations == 0)


def test_damaged_files_are_named_and_the_rest_is_shown(finished, tmp_path):
    run, config = hostile_run(finished[0], tmp_path), finished[1]
    [shard] = run.iteration(1).responses.glob("shard-00000.parquet")
    shard.write_bytes(b"PAR1 nothing")
    (run.evaluation(2) / "logps.jsonl").write_text("{")
    page = Parsed(rendered(run, config))
    texts = "".join(page.texts)
    assert "shard-00000.parquet: " in texts
    assert "logps.jsonl: " in texts
    data = json.loads(page.scripts["samples-data"])
    assert data["training"]["items"][0]["answers"][1] is None
    assert data["training"]["items"][0]["answers"][2]["text"].startswith(ATTACK)
    assert "logps" not in data["heldout"]["items"][0]["answers"][2]


def test_it_stays_below_its_size(finished, tmp_path, monkeypatch):
    run, config = hostile_run(finished[0], tmp_path), finished[1]
    whole = len(rendered(run, config).encode())
    monkeypatch.setattr(page_module, "BYTES_OF_SAMPLES", 6000)
    text = rendered(run, config)
    samples = Parsed(text).scripts["samples-data"]
    assert len(text.encode()) < whole
    assert len(samples.encode()) < 9000  # escapes and counts come on top
    data = json.loads(samples)
    assert 0 < len(data["heldout"]["items"]) < data["heldout"]["total"] == 10


def test_a_report_never_ends_a_run_and_takes_little_of_its_time(finished, monkeypatch, capsys):
    run, config = finished
    calls, clock = [], [100.0]

    def failing(*_):
        calls.append(clock[0])
        clock[0] += 3.0
        raise OSError("no space")

    monkeypatch.setattr(page_module, "write_report", failing)
    monkeypatch.setattr(page_module.time, "monotonic", lambda: clock[0])
    report = Report(run, config)
    for _ in range(400):
        report.after_a_stage()
        clock[0] += 1.0
    assert "report.html was not written: no space" in capsys.readouterr().err
    spent = 3.0 * len(calls)
    assert len(calls) >= 4
    assert spent / (clock[0] - 100) < 0.05
    report.bring_up_to_date()
    assert calls[-1] == clock[0] - 3.0
    report.bring_up_to_date()  # nothing has happened since
    assert calls[-1] == clock[0] - 3.0


def test_the_command(tpaw_, finished, tmp_path):
    run, _ = finished
    target = tmp_path / "mine.html"
    code, out, _ = tpaw_("report", str(run.root), "-o", str(target))
    assert (code, out) == (0, f"Report: {target}\n")
    assert target.read_text() == run.report_file.read_text()
    code, _, err = tpaw_("report", str(run.root), "-o", str(tmp_path / "no" / "such.html"))
    assert code == 2
    assert "give a file in a folder that exists" in err
    code, _, err = tpaw_("report", str(tmp_path))
    assert code == 2
    assert "not a run directory" in err


def test_a_damaged_manifest_is_an_error_and_the_old_report_stays(tpaw_, finished, tmp_path):
    run = hostile_run(finished[0], tmp_path)
    before = run.report_file.read_bytes()
    (run.evaluation(1) / "results.json").write_text("{}")
    code, _, err = tpaw_("report", str(run.root))
    assert code == 1
    assert "results.json" in err
    assert run.report_file.read_bytes() == before


def test_a_run_of_another_kind(settings, tmp_path):
    config = RunConfig.load(settings, "sft_continue", {"train": {"learning_rate": 1e-3}})
    self_play(config, tmp_path / "run")
    text = (tmp_path / "run" / "report.html").read_text()
    assert "<small>sft</small>" in text
    assert "Whether as many steps of SFT" not in text
