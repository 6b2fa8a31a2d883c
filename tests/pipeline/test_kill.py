"""Killed anywhere and run again, a run gives the same bytes as one that was never interrupted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from builders import contents, sums, write_jsonl

DRIVER = Path(__file__).parents[1] / "kill_driver.py"

# Points of one run directory, one after the other; counts begin anew with each process.
IN_EACH_STAGE = [
    "evaluate:1",  # θ_0's evaluation
    "generate:80",  # inside the second shard of D_0
    "publish:1",  # a shard is written and not yet there
    "published:1",  # it is there and not yet in the manifest
    "score:2",
    "publish:1",
    "train:3",  # before the first saved step
    "save:1",  # a saved step is half written
    "saved:1",  # it is written and not yet declared whole
    "train:6",  # after a saved step
    "evaluate:1",  # θ_1's
    "generate:30",
    "score:3",
    "train:7",
]


def run(folder, config, *points):
    command = [sys.executable, str(DRIVER), str(config), str(folder), *points]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.split("\n")[:-1]
    assert lines[-1] == "exit 0", done.stderr
    return lines[:-1]


@pytest.fixture
def config(tmp_path, settings):
    settings["iterations"] = 2
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture
def uninterrupted(tmp_path, config):
    assert run(tmp_path / "whole", config) == []
    files = contents(tmp_path / "whole")
    for kind in (
        "1/checkpoint/model.safetensors",
        "2/checkpoint/model.safetensors",
        "2/responses/shard-00002.parquet",
    ):
        assert f"iterations/{kind}" in files
    assert any(name.startswith("logprobs/") for name in files)
    return files


def test_killed_in_every_stage(tmp_path, config, uninterrupted):
    outcomes = run(tmp_path / "killed", config, *IN_EACH_STAGE)
    assert outcomes == ["killed"] * len(IN_EACH_STAGE)
    assert contents(tmp_path / "killed") == uninterrupted
    assert not list((tmp_path / "killed").rglob(".tmp-*"))
    assert not list((tmp_path / "killed").rglob("training"))


@pytest.mark.parametrize(
    ("method", "points"),
    [
        # Steps of four micro-batches. Killed before the first saved step, while it is written,
        # before it is declared whole, and after it; then in the second iteration.
        ("sft", ["step:6", "save:1", "saved:1", "step:15", "step:10"]),
        ("dpo", ["score:2", "saved:1", "step:15"]),
    ],
)
def test_a_baseline_killed_in_every_stage(tmp_path, settings, method, points):
    settings |= {"method": method, "iterations": 2}
    settings["train"] |= {"epochs": 2, "optimizer": "adamw_torch"}
    if method == "dpo":
        rows = [
            {"prompt": r["question"], "chosen": r["answer"], "rejected": "no " * (i % 3 + 1)}
            for i, r in enumerate(sums(24))
        ]
        settings["data"] = {"path": str(write_jsonl(tmp_path / "pairs.jsonl", rows))}
        settings["train"]["tokens_per_row"] = 512
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    assert run(tmp_path / "whole", config) == []
    outcomes = run(tmp_path / "killed", config, *points)
    assert outcomes == ["killed"] * len(points)
    files = contents(tmp_path / "whole")
    assert "iterations/2/checkpoint/model.safetensors" in files
    assert contents(tmp_path / "killed") == files
    for i in (1, 2):
        logs = [tmp_path / r / f"iterations/{i}/training.jsonl" for r in ("whole", "killed")]
        whole, killed = ([json.loads(line) for line in log.open()] for log in logs)
        assert whole == killed


def test_killed_between_any_two_publications(tmp_path, config, uninterrupted):
    # Each process publishes three more files and dies, before or after the rename.
    points = ["publish:4", "published:3"] * 30
    outcomes = run(tmp_path / "killed", config, *points)
    assert outcomes.count("killed") > 12
    assert set(outcomes) <= {"killed", "exit 0"}
    assert contents(tmp_path / "killed") == uninterrupted
