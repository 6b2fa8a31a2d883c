"""Players, the team of an iteration, and the rule that selects the team."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

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


class Newest(BaseModel):
    """The rule `last: n`: select the newest n checkpoints, or all if there are fewer than n."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    last: int = Field(
        ge=1,
        le=100,
        description="How many of the newest checkpoints play (the paper's N_max). Earlier "
        "iterations, which have fewer checkpoints, use all of them.",
    )

    def select(self, history: Sequence[PlayerOrIndex]) -> tuple[PlayerOrIndex, ...]:
        """Select players.

        Args:
            history: all checkpoints so far, oldest first.

        Returns:
            The selected checkpoints, newest first.
        """
        return tuple(reversed(history[-self.last :]))
