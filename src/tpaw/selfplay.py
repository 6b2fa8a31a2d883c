"""Algorithm 1 of the paper (arXiv 2605.09922); `pipeline.stages` implements its stages."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tpaw.config.plan import players_of
from tpaw.config.schema import RunConfig
from tpaw.pipeline.baselines import baseline
from tpaw.pipeline.critic_loop import critic_loop
from tpaw.runtime.interrupt import StopSignal
from tpaw.team import Player, Team

if TYPE_CHECKING:
    from tpaw.generation.generator import OpenGenerator
    from tpaw.pipeline.stages import Stages


def algorithm_1(config: RunConfig, stages: Stages) -> Player:
    """Run Algorithm 1 and return θ_T. A stage whose output is published returns at once."""
    history = [stages.initial_player()]  # θ_0, the SFT model
    stages.evaluate(history[-1])
    for t in range(config.iterations):
        examples = stages.load_examples(t)  # D_SFT
        stages.generate(history[-1], examples, t)  # D_t
        team = Team(*players_of(config, history))
        triples = stages.build_triples(examples, team.opponents)  # D_O
        stages.score(triples, team.main_players, t)  # each log-prob only once in the run
        history.append(stages.train(history[-1], triples, team, t))  # θ_{t+1}
        stages.evaluate(history[-1])
        if not stages.report(t):  # worse than θ_0, and evaluate.stop_when_worse
            break
    return history[-1]


def self_play(
    config: RunConfig,
    output: str | Path,
    stop: StopSignal | None = None,
    open_generator: OpenGenerator | None = None,
) -> Player:
    """Run self-play or the baseline that `config.method` names, or resume the run in `output`.

    Args:
        output: the run directory. It is created if it does not exist.
        stop: a signal that stops the run at its next safe point.
        open_generator: opens whatever generates responses. Default: `generate.backend`.

    Returns:
        The last checkpoint, θ_T.

    Raises:
        TpawError: see `tpaw.errors`. InputError: the input is invalid, and nothing was written.
    """
    from tpaw.pipeline.stages import opened_stages

    with opened_stages(config, output, stop or StopSignal(), open_generator) as stages:
        run = {"self_play": algorithm_1, "critic": critic_loop}.get(config.method, baseline)
        return run(config, stages)
