"""Another generator behind the protocol: opened by player, used for every response, closed."""

from __future__ import annotations

import pytest

import tpaw.generation.hf
from tpaw.config.schema import RunConfig
from tpaw.generation.generator import FakeGenerator
from tpaw.generation.responses import read_responses
from tpaw.selfplay import self_play
from tpaw.storage.run_directory import RunDirectory


class Opened(FakeGenerator):
    """Answers with the index of the player that it was opened for."""

    def __init__(self):
        super().__init__(lambda prompt, seed: [self.player + 10, 11, 4])
        self.players = []

    def opener(self, player, config):
        assert not self.is_open
        self.player = player.index
        self.players.append(player.index)
        assert config.max_new_tokens == 12
        return super().opener(player, config)

    def generate(self, *args, **kwargs):
        assert self.is_open
        return super().generate(*args, **kwargs)


def test_a_run_uses_the_generator_that_it_is_given(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(tpaw.generation.hf, "HFGenerator", None)  # ours is not used
    generator = Opened()
    settings |= {"iterations": 2}
    self_play(RunConfig.load(settings), tmp_path / "r", open_generator=generator.opener)
    run = RunDirectory(tmp_path / "r")
    for i in (1, 2):
        for response in read_responses(run.responses(i)):
            assert response.token_ids.tolist() == [i - 1 + 10, 11, 4]
    # θ_0: initial responses, accuracy, D_0. θ_1: accuracy, D_1. θ_2: accuracy.
    assert generator.players == [0, 0, 0, 1, 1, 2]
    assert not generator.is_open


def test_a_generator_is_closed_when_the_work_fails(settings, tmp_path):
    class Broken(Opened):
        def generate(self, *args, **kwargs):
            raise RuntimeError("the server is gone")

    generator = Broken()
    with pytest.raises(RuntimeError, match="the server is gone"):
        self_play(RunConfig.load(settings), tmp_path / "r", open_generator=generator.opener)
    assert generator.players == [0]
    assert not generator.is_open
