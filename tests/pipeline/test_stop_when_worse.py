"""`evaluate.stop_when_worse`: a run ends after the first checkpoint that is worse than θ_0."""

from __future__ import annotations

import json
import sys

import pytest
from messages import refused, says

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
    settings |= {"checker": only_the_first_is_right, "iterations": 2}
    settings["objective"]["lambda"] = 0.1
    settings["train"] |= {"learning_rate": 3e-3, "epochs": 2}
    settings["evaluate"]["stop_when_worse"] = True
    config, run = RunConfig.load(settings), RunDirectory(tmp_path / "run")
    assert self_play(config, run.root).index == 1
    assert self_play(config, run.root).index == 1  # the same again
    summary = read_json(run.summary_file)
    assert summary["players"][0]["evaluation"]["exact_match"]["accuracy"] == 1.0
    says(summary["ended"], "iteration 1 of 2", "θ_1", "stop_when_worse")
    assert summary["ended"] in summary["notes"]
    assert [alarm["name"] for alarm in summary["alarms"]].count("worse") == 1
    assert "worse than θ_0" in run.report_file.read_text(encoding="utf-8")
    done, upcoming = done_and_next(run, config)
    assert upcoming is None
    assert done[-1] == "[1/2] evaluate θ_1"
    settings["evaluate"]["stop_when_worse"] = False
    config = RunConfig.load(settings)
    assert done_and_next(run, config)[1] == "[2/2] generate with θ_1"
    assert self_play(config, run.root).index == 2
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
