"""The plan of a run: who plays in each iteration, what it costs, and which weights it still needs.

It needs the configuration and the number of examples only, no model and no torch.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from tpaw.config.schema import RunConfig, at_iteration
from tpaw.errors import InputError


class IterationPlan(NamedTuple):
    """The players and the cost of one iteration.

    Attributes:
        iteration: i, the iteration that trains θ_i.
        starts_from: index of the checkpoint that the policy starts from.
        opponents: indices of the opponents, newest first. Empty for sft and dpo.
        main_players: indices of the main players, newest first. Empty for sft. For dpo it holds
            the reference model.
        triples: number of triples in D_O. For sft it is the number of examples, for dpo the
            number of preference pairs.
        optimizer_steps: optimizer steps over all epochs.
        learning_rate: peak learning rate.
        lambda_: λ of the objective.
        epochs: passes over the triples.
        to_generate: responses to sample.
        to_score: upper bound of the (player, sequence) pairs to score. Equal sequences are
            scored once, so the true number may be lower.
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
    """Plan every iteration.

    Args:
        config: the configuration of the run.
        examples: number of usable examples, N.

    Returns:
        One plan for each iteration, in order.

    Raises:
        InputError: an iteration has a single optimizer step and a warmup, so its learning rate
            would be 0 and θ would not change.
    """
    plans = []
    scored: set[tuple[int, int]] = set()
    for t in range(config.iterations):
        opponents, main_players = players_of(config, t)
        if config.method == "self_play":
            triples, responses, authors = len(opponents) * examples, examples, (-1, *opponents)
        else:
            triples, responses, authors = examples, 0, (-1, -2)
        # Identifies sequences by their author: -1 for the targets of the data, -2 for its rejected
        # responses, t for the responses of θ_t.
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
                to_generate=responses,
                to_score=len(needed - scored) * examples,
            )
        )
        scored |= needed
        if plans[-1].optimizer_steps == 1 and config.train.warmup > 0:
            raise InputError(
                f"train.warmup: {config.train.warmup}: iteration {t + 1} has a single step "
                f"({triples} triples), and the warmup gives this step a learning rate of 0; set "
                "train.warmup to 0, lower train.batch_size, or use more records or epochs"
            )
    return plans


def optimizer_steps(config: RunConfig, triples: int, t: int) -> int:
    """Optimizer steps of an iteration over all epochs.

    The last step of an epoch may hold fewer triples than `train.batch_size`.

    Args:
        config: the configuration of the run.
        triples: number of triples in one epoch.
        t: the iteration that trains θ_{t+1}; counts from 0.
    """
    return at_iteration(config.train.epochs, t) * math.ceil(triples / config.train.batch_size)


def players_of(config: RunConfig, t: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The opponents and the main players of an iteration.

    Args:
        config: the configuration of the run.
        t: the iteration that trains θ_{t+1}; counts from 0. It may be beyond the last iteration.

    Returns:
        Two tuples of indices, newest first. sft has no players. dpo has its reference model as the
        only main player.
    """
    if config.method == "self_play":
        history = range(t + 1)
        return config.team.opponents.select(history), config.team.main_players.select(history)
    return (), (t,) if config.method == "dpo" else ()


def kept_checkpoints(config: RunConfig, t: int, *, is_trained: bool) -> set[int]:
    """The checkpoints that keep their weights, by the setting `keep`.

    An opponent plays with its stored responses, so the run reads the weights of main players and of
    the newest checkpoint only. A checkpoint is scored as a main player in several iterations.

    Args:
        config: the configuration of the run.
        t: the iteration that trains θ_{t+1}; counts from 0.
        is_trained: True at the end of the iteration, when θ_{t+1} is evaluated. False when the
            log-probs of the iteration are stored and the training from θ_t has not begun.

    Returns:
        Indices of checkpoints that exist at this moment. θ_0 may be among them; it is not the
        run's, and stays.
    """
    newest = t + 1 if is_trained else t
    if config.keep == "all":
        return set(range(newest + 1))
    if config.keep == "team":
        # Also at the end of the run: the team that one more iteration would have.
        opponents, main_players = players_of(config, newest)
        return {newest, *opponents, *main_players}
    upcoming = players_of(config, t + 1)[1] if t + 1 < config.iterations else ()
    return {newest, *(j for j in upcoming if j <= newest)}
