"""TPAW: team-based self-play with dual adaptive weighting (arXiv 2605.09922).

Example:
    from tpaw import RunConfig, self_play

    self_play(RunConfig.load("starter"), "runs/starter")
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tpaw.config.schema import RunConfig
    from tpaw.errors import TpawError
    from tpaw.objectives.base import Objective, ObjectiveNeeds, ObjectiveOutput, PairLogps
    from tpaw.objectives.tpaw import TeamLoss, TeamObjective, team_loss
    from tpaw.selfplay import self_play
    from tpaw.team import Player, Team
    from tpaw.training.trainer import TeamTrainer

__version__ = version("tpaw")
__all__ = [
    "Objective",
    "ObjectiveNeeds",
    "ObjectiveOutput",
    "PairLogps",
    "Player",
    "RunConfig",
    "Team",
    "TeamLoss",
    "TeamObjective",
    "TeamTrainer",
    "TpawError",
    "self_play",
    "team_loss",
]

_HOME = {
    "Objective": "tpaw.objectives.base",
    "ObjectiveNeeds": "tpaw.objectives.base",
    "ObjectiveOutput": "tpaw.objectives.base",
    "PairLogps": "tpaw.objectives.base",
    "Player": "tpaw.team",
    "RunConfig": "tpaw.config.schema",
    "Team": "tpaw.team",
    "TeamLoss": "tpaw.objectives.tpaw",
    "TeamObjective": "tpaw.objectives.tpaw",
    "TeamTrainer": "tpaw.training.trainer",
    "TpawError": "tpaw.errors",
    "self_play": "tpaw.selfplay",
    "team_loss": "tpaw.objectives.tpaw",
}


def __getattr__(name: str) -> Any:
    # Importing torch takes seconds. Most commands do not need it, so import on first use.
    if name not in _HOME:
        raise AttributeError(f"module 'tpaw' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
