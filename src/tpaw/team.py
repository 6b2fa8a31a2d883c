"""Who plays: players, the team of an iteration, and the rules that pick it from the history."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field

PlayerOrIndex = TypeVar("PlayerOrIndex")


@dataclass(frozen=True)
class Player:
    """A checkpoint that plays: θ_0, the SFT model, or a θ_t made by the run.

    Attributes:
        index: t of θ_t.
        path: the model's folder.
        fingerprint: hash of the weights' content, so that a moved or copied model is the same
            player and an edited one is not.
    """

    index: int
    path: str
    fingerprint: str


@dataclass(frozen=True)
class Team:
    """Opponents (whose responses are played against) and main players (the references).

    Both newest first, as the paper's j ∈ {t, t-1, t-2}.
    """

    opponents: tuple[Player, ...]
    main_players: tuple[Player, ...]


class Newest(BaseModel):
    """The rule `last: n`: the newest n checkpoints, or all there are while they are fewer."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    last: int = Field(ge=1, description="How many of the newest checkpoints (the paper's N_max).")

    def select(self, history: Sequence[PlayerOrIndex]) -> tuple[PlayerOrIndex, ...]:
        """Pick from the history (oldest first); the result is newest first."""
        return tuple(reversed(history[-self.last :]))
