"""What one iteration trains, for any process that has the run directory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tpaw.team import Player


@dataclass(frozen=True)
class TrainingJob:
    """What one iteration trains.

    Attributes:
        t: the iteration that trains θ_{t+1}; counts from 0.
        steps: number of optimizer steps.
        policy: θ_t.
        opponents: their responses are rejected. Empty for SFT and DPO.
        players: the reference models. Empty for SFT, and for an objective without references.
        kept: for an objective that trains on some responses alone, what its manifest says of them:
            `triples` of `responses` in play are kept. Where the likeliest are kept and responses
            can be checked, also the shares that are right, `right_share` and `right_share_of_all`.
    """

    t: int
    steps: int
    policy: Player
    opponents: tuple[Player, ...] = ()
    players: tuple[Player, ...] = ()
    kept: Mapping[str, float] | None = None
