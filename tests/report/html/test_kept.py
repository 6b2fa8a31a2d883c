"""Which of several responses the page shows before anything is chosen, and of damaged files."""

from __future__ import annotations

import json

import pytest

from tests.report.html.parsed import Parsed, shown_responses
from tpaw.config.schema import RunConfig
from tpaw.generation.responses import read_responses
from tpaw.pipeline.stages import Stages
from tpaw.report.html.page import rendered
from tpaw.selfplay import self_play
from tpaw.storage.run_directory import RunDirectory


class Stopped(Exception):
    pass


def stop(*_, **__):
    raise Stopped


@pytest.mark.parametrize("stage", ["score", "fit_critic"])
def test_before_one_is_chosen_the_first_is_shown(settings, tmp_path, monkeypatch, stage):
    recipe = "critic" if stage == "fit_critic" else "sharpening"
    config = RunConfig.load(settings | {"iterations": 1, "evaluate": {}}, recipe)
    monkeypatch.setattr(Stages, stage, stop)
    with pytest.raises(Stopped):
        self_play(config, tmp_path / "r")
    run = RunDirectory(tmp_path / "r")
    responses = read_responses(run.responses(1))
    shown = shown_responses(run, config)
    assert len(shown) == len(responses) // 4
    for response in responses[: len(shown)]:
        [answer] = shown[response.example_id]
        assert answer["text"] == response.text
        assert "chosen" not in answer


def test_log_probs_that_cannot_be_read_are_named(settings, tmp_path, monkeypatch):
    config = RunConfig.load(settings | {"iterations": 1, "evaluate": {}}, "sharpening")
    monkeypatch.setattr(Stages, "train", stop)
    with pytest.raises(Stopped):
        self_play(config, tmp_path / "r")
    run = RunDirectory(tmp_path / "r")
    assert any("chosen" in answer for [answer] in shown_responses(run, config).values())
    [shard, *_] = (run.root / "logprobs").rglob("*.parquet")
    shard.write_bytes(b"PAR1 nothing")
    page = Parsed(rendered(run, config))
    assert "iterations/1: which responses were trained on: " in "".join(page.texts)
    items = json.loads(page.scripts["samples-data"])["training"]["items"]
    assert not any("chosen" in item["answers"][0] for item in items)
