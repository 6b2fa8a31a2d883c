"""The public surface is what it says, and the objective needs torch alone."""

from __future__ import annotations

import ast
from pathlib import Path

import tpaw

PACKAGE = Path(tpaw.__file__).parent


def imported(path):
    tree = ast.parse(path.read_text())
    type_checking = [
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    ]
    for node in ast.walk(tree):
        if node in type_checking:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("tpaw"):
            yield ([*node.module.split("."), node.names[0].name])[1]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("tpaw."):
                    yield alias.name.split(".")[1]


def test_the_objective_needs_torch_alone():
    assert list(imported(PACKAGE / "objectives" / "tpaw.py")) == []


def test_the_public_surface():
    assert tpaw.__all__ == [
        "Player",
        "RunConfig",
        "Team",
        "TeamLoss",
        "TeamTrainer",
        "TpawError",
        "self_play",
        "team_loss",
    ]
    for name in tpaw.__all__:
        assert getattr(tpaw, name).__module__.startswith("tpaw.")
