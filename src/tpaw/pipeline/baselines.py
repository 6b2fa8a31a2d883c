"""The baselines: SFT and DPO, iteration by iteration beside Algorithm 1, so that all compare."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tpaw.config.schema import RunConfig
from tpaw.team import Player

if TYPE_CHECKING:
    from tpaw.pipeline.stages import Stages


def baseline(config: RunConfig, stages: Stages) -> Player:
    """Train from the newest checkpoint by SFT or DPO, as often as there are iterations.

    Each iteration has its own optimizer, schedule and `train.epochs` epochs. Checkpoints are
    evaluated as those of self-play are. A stage whose output is published returns at once.
    """
    train = stages.train_by_dpo if config.method == "dpo" else stages.train_by_sft
    history = [stages.initial_player()]
    stages.evaluate(history[-1])
    for t in range(config.iterations):
        history.append(train(history[-1], t))
        stages.evaluate(history[-1])
        if not stages.report(t):  # worse than θ_0, and evaluate.stop_when_worse
            break
    return history[-1]
