"""Algorithm 1."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tpaw.config.schema import RunConfig
from tpaw.pipeline.baselines import baseline
from tpaw.runtime.interrupt import StopSignal
from tpaw.team import Player, Team

if TYPE_CHECKING:
    from tpaw.pipeline.stages import Stages


def algorithm_1(config: RunConfig, stages: Stages) -> Player:
    """Algorithm 1. A stage whose output is published returns at once, so running again resumes."""
    examples = stages.load_examples()  # D_SFT
    history = [stages.initial_player()]  # θ_0, the SFT model
    stages.evaluate(history[-1])
    for t in range(config.iterations):
        stages.generate(history[-1], examples, t)  # D_t
        team = Team(
            opponents=config.team.opponents.select(history),
            main_players=config.team.main_players.select(history),
        )
        triples = stages.build_triples(examples, team.opponents)  # D_O
        stages.score(triples, team.main_players, t)  # no gradient, each pair once ever
        history.append(stages.train(history[-1], triples, team, t))  # θ_{t+1}
        stages.evaluate(history[-1])
        stages.report()
    return history[-1]


def self_play(config: RunConfig, output: str | Path, stop: StopSignal | None = None) -> Player:
    """Run what `method` says into a folder, or go on with the run there; returns θ_T.

    Args:
        stop: where a caller that handles signals asks for a stop at the next safe point.

    Raises:
        TpawError: see `tpaw.errors`; an InputError comes before anything is written.
    """
    from tpaw.pipeline.stages import opened_stages

    with opened_stages(config, output, stop or StopSignal()) as stages:
        run = algorithm_1 if config.method == "self_play" else baseline
        return run(config, stages)
