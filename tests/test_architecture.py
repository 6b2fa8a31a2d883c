"""Imports point downward only, the public surface is what it says, and files stay small."""

from __future__ import annotations

import ast
from pathlib import Path

import tpaw

PACKAGE = Path(tpaw.__file__).parent

# Lower layers first. A module may import from its own layer and those before it.
LAYERS = [
    ["errors", "objective", "owned_arguments", "split_weights", "team", "token_table"],
    ["config", "config_data", "config_file", "artifacts", "interrupt", "plan"],
    ["packed_attention", "rows", "rundir", "shapes", "token_logps"],
    ["layout"],
    ["logprobs", "triple_batches"],
    ["logprob_model"],
    ["data", "logprob_store", "model"],
    ["checkpoints", "scoring", "trainer", "generation", "evaluation"],
    ["judge", "trl_trainers"],
    ["training_arguments"],
    ["inputs", "report"],
    ["answers", "judging", "suite_stage", "train_stage"],
    ["stages"],
    ["baseline_stages"],
    ["baselines"],
    ["selfplay"],
    ["study"],
    ["terminal"],
    ["evaluation_cli"],
    ["cli"],
]
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}
# A method that reads a file for people who have only the class.
ALLOWED_UPWARD = {("config", "config_file")}


def sources():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] not in ("__init__", "starter"):
            yield parts[0], path


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


def test_imports_point_downward():
    seen = 0
    for room, path in sources():
        for target in imported(path):
            seen += 1
            upward = LAYER_OF[target] > LAYER_OF[room]
            assert not upward or (room, target) in ALLOWED_UPWARD, f"{path.name} imports {target}"
    assert seen > 60


def test_the_objective_needs_torch_alone():
    assert list(imported(PACKAGE / "objective.py")) == []


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


def test_no_file_has_grown_past_350_lines():
    for _, path in sources():
        assert len(path.read_text().splitlines()) <= 350, path
