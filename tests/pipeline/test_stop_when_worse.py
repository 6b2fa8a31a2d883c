"""`evaluate.stop_when_worse`: a run ends after the first checkpoint that is worse than θ_0."""

from __future__ import annotations

import json
import sys

import pytest
from messages import refused, says

from tpaw.cli.run import load
from tpaw.config.schema import RunConfig
from tpaw.evaluation.items import read_items
from tpaw.report.status import done_and_next
from tpaw.selfplay import self_play
from tpaw.storage.artifacts import read_json
from tpaw.storage.run_directory import RunDirectory


@pytest.fixture
def only_the_first_is_right(finished, tmp_path, monkeypatch):
    """A checker for which θ_0's greedy answers are right and all others wrong."""
    items = read_items(finished[0].evaluation(0) / "exact_match.jsonl")
    (tmp_path / "only_the_first.py").write_text(
        f"RIGHT = {json.dumps([item['completion'] for item in items])}\n"
        "def is_right(prompt, target, response):\n    return response in RIGHT\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "only_the_first"
    sys.modules.pop("only_the_first", None)


def test_it_ends_there_and_goes_on_when_told_to(finished, only_the_first_is_right, tmp_path):
    settings = finished[1].model_dump(mode="json", by_alias=True)
    settings |= {"checker": only_the_first_is_right, "iterations": 3}
    settings["objective"]["lambda"] = 0.1
    settings["train"] |= {"learning_rate": [1e-12, 3e-3, 1e-12], "epochs": [1, 2, 1]}
    settings["evaluate"]["stop_when_worse"] = True
    config, run = RunConfig.load(settings), RunDirectory(tmp_path / "run")
    assert self_play(config, run.root).index == 2
    assert self_play(config, run.root).index == 2  # the same again, with the newest checkpoint
    summary = read_json(run.summary_file)
    found = [p["evaluation"]["exact_match"]["accuracy"] for p in summary["players"][:3]]
    assert found[:2] == [1.0, 1.0]
    assert found[2] < 0.5
    says(summary["ended"], "iteration 2 of 3", "θ_2", "stop_when_worse")
    assert f"tpaw run {run.root} --set evaluate.stop_when_worse=false" in summary["ended"]
    assert summary["ended"] in summary["notes"]
    assert [alarm["name"] for alarm in summary["alarms"]].count("worse") == 1
    assert "worse than θ_0" in run.report_file.read_text(encoding="utf-8")
    done, upcoming = done_and_next(run, config)
    assert upcoming is None
    assert done[-1] == "[2/3] evaluate θ_2"
    going_on = load([str(run.root)], summary["ended"].split("--set ")[1:], trust=False)
    assert done_and_next(run, going_on)[1] == "[3/3] generate with θ_2"
    assert self_play(going_on, run.root).index == 3
    assert read_json(run.summary_file)["ended"] is None
    # Told to end again, it has nothing left that could be left out.
    assert done_and_next(run, config)[0][-1] == "[3/3] evaluate θ_3"
    assert self_play(config, run.root).index == 3
    assert read_json(run.summary_file)["ended"] is None


def test_a_run_that_is_no_worse_does_not_end(finished):
    run, config = finished
    evaluate = config.evaluate.model_copy(update={"stop_when_worse": True})
    asked = config.model_copy(update={"evaluate": evaluate})
    assert done_and_next(run, asked) == done_and_next(run, config)


def test_it_needs_accuracy(settings):
    settings["evaluate"] |= {"stop_when_worse": True, "exact_match": False}
    with refused("evaluate.stop_when_worse", "exact_match"):
        RunConfig.load(settings)
