"""Players, the team of an iteration, and the rule that selects the team."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field

PlayerOrIndex = TypeVar("PlayerOrIndex")


@dataclass(frozen=True)
class Player:
    """A checkpoint that takes part in self-play: θ_0 (the SFT model) or a θ_t that the run made.

    Attributes:
        index: t of θ_t.
        path: folder of the model.
        fingerprint: hash of weights, configuration and tokenizer. It identifies a player: a moved
            or copied model is the same player, an edited model is a different one.
    """

    index: int
    path: str
    fingerprint: str


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
