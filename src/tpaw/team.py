"""Players, the team of an iteration, and the rules that select it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

PlayerOrIndex = TypeVar("PlayerOrIndex")


@dataclass(frozen=True)
class Base:
    """The model that an adapter belongs to.

    Attributes:
        path: folder of the model.
        fingerprint: hash of weights, configuration and tokenizer.
        name: what others call it: a Hub id, or the absolute path of the folder.
        revision: commit of a Hub model; None for a folder.
    """

    path: str
    fingerprint: str
    name: str
    revision: str | None = None


@dataclass(frozen=True)
class Player:
    """A checkpoint that takes part in self-play: θ_0 (the SFT model) or a θ_t that the run made.

    Attributes:
        index: t of θ_t.
        path: folder of the model, or of the adapter in PEFT's layout.
        fingerprint: hash of weights, configuration and tokenizer, those of the base included. It
            identifies a player: a moved or copied model is the same player, an edited model is a
            different one.
        base: the model that the adapter in `path` belongs to; None for a player that is a whole
            model. θ_0 of a run with adapters is a base without an adapter: `path` is the base.
    """

    index: int
    path: str
    fingerprint: str
    base: Base | None = None

    @property
    def base_folder(self) -> str:
        """Folder of the model: the base, or the whole model."""
        return self.path if self.base is None else self.base.path

    @property
    def adapter_folder(self) -> str | None:
        """Folder of the adapter that goes on top of `base_folder`; None if there is none."""
        return None if self.path == self.base_folder else self.path


@dataclass(frozen=True)
class Team:
    """The players of one iteration.

    Attributes:
        opponents: the players whose responses the policy learns to reject; newest first.
        main_players: the reference models of the objective; newest first, as in the paper's
            j ∈ {t, t-1, t-2}.
    """

    opponents: tuple[Player, ...]
    main_players: tuple[Player, ...]


class Rule(BaseModel):
    """Which of the checkpoints so far play. Every rule selects the newest one."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    def select(self, history: Sequence[PlayerOrIndex]) -> tuple[PlayerOrIndex, ...]:
        """Select players.

        Args:
            history: all checkpoints so far, oldest first.

        Returns:
            The selected checkpoints, newest first.
        """
        return tuple(history[j] for j in sorted(set(self._indices(len(history))), reverse=True))

    def _indices(self, count: int) -> Iterable[int]:
        """The selected ones of so many checkpoints, in any order."""
        raise NotImplementedError


class Newest(Rule):
    """The rule `last: n`: the newest n checkpoints, or all if there are fewer than n."""

    last: int = Field(
        ge=1,
        le=100,
        description="How many of the newest checkpoints play (the paper's N_max). Earlier "
        "iterations, which have fewer checkpoints, use all of them.",
    )

    def _indices(self, count: int) -> Iterable[int]:
        return range(max(count - self.last, 0), count)


class All(Rule):
    """The rule `all: true`: every checkpoint, θ_0 included."""

    all: Literal[True] = Field(description="true: every checkpoint plays, θ_0 included.")

    def _indices(self, count: int) -> Iterable[int]:
        return range(count)


class FirstAndLast(Rule):
    """The rule `first_and_last: true`: the newest checkpoint and θ_0."""

    first_and_last: Literal[True] = Field(
        description="true: the newest checkpoint and θ_0 play. In the first iteration they are one."
    )

    def _indices(self, count: int) -> Iterable[int]:
        return (0, count - 1)


class Spaced(Rule):
    """The rule `spaced: n`: n checkpoints at equal distances, from θ_0 to the newest."""

    spaced: int = Field(
        ge=1,
        le=100,
        description="How many checkpoints play, at equal distances from θ_0 to the newest. With 1 "
        "it is the newest. Earlier iterations, which have fewer checkpoints, use all of them.",
    )

    def _indices(self, count: int) -> Iterable[int]:
        if self.spaced == 1 or count <= self.spaced:
            return range(max(count - self.spaced, 0), count)
        return (i * (count - 1) // (self.spaced - 1) for i in range(self.spaced))


class Draw(BaseModel):
    """How many checkpoints `Sampled` draws, and its seed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    count: int = Field(
        ge=1, le=100, description="How many checkpoints play, the newest one included."
    )
    seed: int = Field(
        0,
        ge=0,
        lt=2**31,
        description="Seed of the draw. An iteration draws the same checkpoints on every machine.",
    )


class Sampled(Rule):
    """The rule `sampled`: the newest checkpoint, and others that each iteration draws."""

    sampled: Draw = Field(
        description="The newest checkpoint plays, and others that each iteration draws anew."
    )

    def _indices(self, count: int) -> Iterable[int]:
        newest = count - 1
        # Of newest, the iteration: another checkpoint more makes another draw.
        drawn = np.random.default_rng((self.sampled.seed, newest)).permutation(newest)
        return (newest, *map(int, drawn[: self.sampled.count - 1]))


RULES = (Newest, All, FirstAndLast, Spaced, Sampled)


def rule_keys() -> dict[str, type[Rule]]:
    """The key of each rule in a configuration."""
    return {key: rule for rule in RULES for key in rule.model_fields}
