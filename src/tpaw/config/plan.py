"""What a run will do, before anything is spent. No torch, no model."""

from __future__ import annotations

import math
from typing import NamedTuple

from tpaw.config.schema import RunConfig, at_iteration
from tpaw.errors import InputError


class IterationPlan(NamedTuple):
    """The lineage and the cost of one iteration.

    Attributes:
        iteration: i, which makes θ_i.
        starts_from: index of the checkpoint that the policy starts as.
        opponents, main_players: indices of the checkpoints, newest first. A baseline has no
            opponents, and no main player but the reference model of DPO.
        triples: size of D_O; of a baseline, of its data.
        optimizer_steps: over all epochs.
        to_generate: responses to sample.
        to_score: (player, sequence) pairs to compute, at most; equal sequences count once.
    """

    iteration: int
    starts_from: int
    opponents: tuple[int, ...]
    main_players: tuple[int, ...]
    triples: int
    optimizer_steps: int
    learning_rate: float
    lambda_: float
    epochs: int
    to_generate: int
    to_score: int


def plan_run(config: RunConfig, examples: int) -> list[IterationPlan]:
    """Plan every iteration for a number of usable examples, N.

    Raises:
        InputError: an iteration that would leave its policy unchanged.
    """
    plans = []
    scored: set[tuple[int, int]] = set()
    for t in range(config.iterations):
        history = range(t + 1)
        if config.method == "self_play":
            opponents = config.team.opponents.select(history)
            main_players = config.team.main_players.select(history)
            triples, answered, authors = len(opponents) * examples, examples, (-1, *opponents)
        else:
            opponents, main_players = (), (t,) if config.method == "dpo" else ()
            triples, answered, authors = examples, 0, (-1, -2)
        # Sequences by who made them. -1 stands for the data's targets, which every player scores,
        # -2 for its rejected answers.
        needed = {(j, author) for j in main_players for author in authors}
        plans.append(
            IterationPlan(
                iteration=t + 1,
                starts_from=t,
                opponents=opponents,
                main_players=main_players,
                triples=triples,
                optimizer_steps=optimizer_steps(config, triples, t),
                learning_rate=at_iteration(config.train.learning_rate, t),
                lambda_=at_iteration(config.objective.lambda_, t),
                epochs=at_iteration(config.train.epochs, t),
                to_generate=answered,
                to_score=len(needed - scored) * examples,
            )
        )
        scored |= needed
        if plans[-1].optimizer_steps == 1 and config.train.warmup > 0:
            raise InputError(
                f"train.warmup: {config.train.warmup}: iteration {t + 1} has a single step "
                f"({triples} triples), and warming up spends it at a learning rate of 0; set "
                "train.warmup to 0, lower train.batch_size, or give more rows or epochs"
            )
    return plans


def optimizer_steps(config: RunConfig, triples: int, t: int) -> int:
    """Optimizer steps over all epochs; the last step of an epoch may hold fewer triples."""
    return at_iteration(config.train.epochs, t) * math.ceil(triples / config.train.batch_size)
