"""The training stages of the baselines, over the same run directory as self-play's."""

from __future__ import annotations

from tpaw.generation.responses import Response
from tpaw.pipeline.stages import Stages
from tpaw.team import Player
from tpaw.training.triples import Triple
from tpaw.training.trl import dpo_trainer, sft_trainer

FROM_THE_DATA = -1


def train_on_targets(stages: Stages, policy: Player, t: int) -> Player:
    """θ_{t+1}, from θ_t by SFT."""
    return stages.fit(policy, t, stages.load_examples, sft_trainer)


def train_on_pairs(stages: Stages, policy: Player, t: int) -> Player:
    """θ_{t+1}, from θ_t by DPO, with θ_t as the reference.

    A pair is a triple whose response comes from the data, so it is scored as all triples are: each
    sequence once in the run, in shards that a kill does not cost.
    """
    pairs = [
        Triple(example, Response(example.id, example.rejected_ids, "", "stop"), FROM_THE_DATA)
        for example in stages.load_examples()
        if example.rejected_ids is not None
    ]
    stages.score(pairs, [policy], t)
    return stages.fit(policy, t, lambda: stages.rows(pairs, [policy]), dpo_trainer)
