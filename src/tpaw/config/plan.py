"""The plan of a run: who plays in each iteration, what it costs, and which weights it still needs.

It needs the configuration and the number of examples only, no model and no torch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from tpaw.config.schema import ObjectiveConfig, RunConfig, at_iteration
from tpaw.errors import InputError
from tpaw.team import PlayerOrIndex, Rule


class IterationPlan(NamedTuple):
    """The players and the cost of one iteration.

    Attributes:
        iteration: i, the iteration that trains θ_i.
        starts_from: index of the checkpoint that the policy starts from.
        opponents: indices of the opponents, newest first. Empty for sft and dpo.
        main_players: indices of the main players, newest first. Empty for sft, and for an
            objective without references. For dpo it holds the reference model.
        triples: number of triples in D_O. For sft, and for critic by sft, it is the number of
            examples; for dpo the number of preference pairs.
        optimizer_steps: optimizer steps over all epochs.
        is_at_most: whether triples and steps are upper bounds, because the responses decide which
            triples are kept.
        learning_rate: peak learning rate.
        lambda_: λ of the objective; None if it has none.
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
    is_at_most: bool
    learning_rate: float
    lambda_: float | None
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
    if config.data.chunks > examples:
        raise InputError(
            f"data.chunks: {config.data.chunks}: there are {examples} examples; it must be at most "
            "as many"
        )
    plans = []
    # By player, author and part of the examples.
    scored: set[tuple[int, int, int]] = set()
    for t in range(config.iterations):
        opponents, main_players = players_of(config, range(t + 1))
        used = chunk_size(config, examples, t)
        responses = used * config.generate.samples
        if config.method == "self_play":
            triples, authors = len(opponents) * responses, (-1, *opponents)
            if config.objective.needs.responses == "likeliest":  # one of each prompt
                triples = used
        elif config.method == "critic":  # its targets are responses too
            triples = len(opponents) * responses if config.has_objective else used
            authors = opponents
        else:
            triples, responses, authors = used, 0, (-1, -2)
        # Identifies sequences by their author: -1 for the targets of the data, -2 for its rejected
        # responses, t for the responses of θ_t.
        part = t % config.data.chunks
        needed = {(j, author, part) for j in main_players for author in authors}
        missing = needed - scored
        scored |= needed
        targets = sum(author < 0 for _, author, _ in missing)
        steps = optimizer_steps(config, triples, t)
        check_steps(config, triples, t)
        lambda_ = getattr(config.objective, "lambda_", None)
        plans.append(
            IterationPlan(
                iteration=t + 1,
                starts_from=t,
                opponents=opponents,
                main_players=main_players,
                triples=triples,
                optimizer_steps=steps,
                is_at_most=config.method == "critic"
                or (config.method == "self_play" and config.objective.needs.responses != "all"),
                learning_rate=at_iteration(config.train.learning_rate, t),
                lambda_=None if lambda_ is None else at_iteration(lambda_, t),
                epochs=at_iteration(config.train.epochs, t),
                to_generate=responses,
                to_score=targets * used + (len(missing) - targets) * used * config.generate.samples,
            )
        )
    return plans


def check_steps(config: RunConfig, triples: int, t: int) -> None:
    """Refuse an iteration that would change nothing.

    Args:
        config: the configuration of the run.
        triples: number of triples in one epoch.
        t: the iteration that trains θ_{t+1}; counts from 0.

    Raises:
        InputError: it has a single optimizer step and a warmup.
    """
    if optimizer_steps(config, triples, t) == 1 and config.train.warmup > 0:
        raise InputError(
            f"train.warmup: {config.train.warmup}: iteration {t + 1} has a single step "
            f"({triples} triples), and the warmup gives this step a learning rate of 0; set "
            "train.warmup to 0, lower train.batch_size, or use more records or epochs"
        )


def as_in_the_first_iteration(config: RunConfig) -> RunConfig:
    """The configuration with the per-iteration settings of the first iteration in all of them."""
    rate, epochs = (at_iteration(v, 0) for v in (config.train.learning_rate, config.train.epochs))
    train = config.train.model_copy(update={"learning_rate": rate, "epochs": epochs})
    objective: Any = config.objective
    if isinstance(objective, ObjectiveConfig):
        lambda_ = at_iteration(objective.lambda_, 0)
        objective = objective.model_copy(update={"lambda_": lambda_})
    critic = config.critic.model_copy(update={"steps": at_iteration(config.critic.steps, 0)})
    return config.model_copy(update={"train": train, "objective": objective, "critic": critic})


def chunk_size(config: RunConfig, examples: int, t: int) -> int:
    """Number of examples that an iteration uses; see `data.chunks`.

    Args:
        config: the configuration of the run.
        examples: number of all examples.
        t: the iteration that trains θ_{t+1}; counts from 0.
    """
    size, larger = divmod(examples, config.data.chunks)
    return size + (t % config.data.chunks < larger)


def optimizer_steps(config: RunConfig, triples: int, t: int) -> int:
    """Optimizer steps of an iteration over all epochs.

    The last step of an epoch may hold fewer triples than `train.batch_size`.

    Args:
        config: the configuration of the run.
        triples: number of triples in one epoch.
        t: the iteration that trains θ_{t+1}; counts from 0.
    """
    return at_iteration(config.train.epochs, t) * math.ceil(triples / config.train.batch_size)


def players_of(
    config: RunConfig, history: Sequence[PlayerOrIndex]
) -> tuple[tuple[PlayerOrIndex, ...], tuple[PlayerOrIndex, ...]]:
    """The opponents and the main players of an iteration.

    Args:
        config: the configuration of the run.
        history: all checkpoints so far, oldest first: those of the iteration that trains θ_{t+1}
            are θ_0 to θ_t. t may be beyond the last iteration.

    Returns:
        Two tuples, newest first. sft has no players. dpo has its reference model as the only main
        player. An objective without references has no main players.
    """
    if config.generates:
        has_none = not config.has_objective or config.objective.needs.references == "none"
        main_players = () if has_none else config.team.main_players.select(history)
        return config.team.opponents.select(history), main_players
    return (), (history[-1],) if config.method == "dpo" else ()


def kept_checkpoints(config: RunConfig, t: int, *, is_trained: bool) -> set[int]:
    """The checkpoints that keep their weights, by the setting `keep`.

    An opponent plays with its stored responses, so the run reads the weights of main players and of
    the newest checkpoint only. A checkpoint is scored as a main player in several iterations, which
    need not follow each other.

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
    kept = {newest}
    if config.has_objective and config.objective.needs.references != "none":
        uses = _last_uses(config.team.main_players, config.iterations)
        kept |= {j for j, last in enumerate(uses[: newest + 1]) if last > t}
    if config.keep == "team":
        # Also at the end of the run: the team that one more iteration would have.
        opponents, main_players = players_of(config, range(newest + 1))
        kept |= {*opponents, *main_players}
    return kept


@functools.lru_cache
def _last_uses(rule: Rule, iterations: int) -> tuple[int, ...]:
    """Of each checkpoint, the last iteration (from 0) that a rule selects it in; -1 if none."""
    uses = [-1] * iterations
    for t in range(iterations):
        for j in rule.select(range(t + 1)):
            uses[j] = t
    return tuple(uses)
