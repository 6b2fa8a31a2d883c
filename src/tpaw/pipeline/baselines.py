"""The baselines: SFT and DPO, round for round beside Algorithm 1, so that all compare."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tpaw.config.schema import RunConfig
from tpaw.team import Player

if TYPE_CHECKING:
    from tpaw.pipeline.stages import Stages


def baseline(config: RunConfig, stages: Stages) -> Player:
    """Train with TRL from the newest checkpoint, as often as there are iterations.

    Each has an optimizer and a schedule of its own and `train.epochs` epochs; checkpoints are
    evaluated as self-play's are. A stage whose output is published returns at once.
    """
    from tpaw.pipeline.baseline_stages import train_on_pairs, train_on_targets

    train = train_on_pairs if config.method == "dpo" else train_on_targets
    history = [stages.initial_player()]
    stages.evaluate(history[-1])
    for t in range(config.iterations):
        history.append(train(stages, history[-1], t))
        stages.evaluate(history[-1])
        stages.report()
    return history[-1]
