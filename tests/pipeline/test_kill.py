"""Killed anywhere and run again, a run gives the same bytes as one that was never interrupted."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml
from builders import contents, run_settings, sums, write_jsonl
from fork_server import Forked

from tpaw.config.files import to_yaml
from tpaw.config.methods import method_names
from tpaw.config.schema import RunConfig
from tpaw.storage.run_directory import RunDirectory

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


pytestmark = [pytest.mark.process, pytest.mark.usefixtures("forks")]


def run(folder, config, *points):
    out, err = (folder.with_name(f"{folder.name}-{name}.txt") for name in ("out", "err"))
    driver = Forked("kill_driver:main", config, folder, *points, out=out, err=err)
    assert driver.wait(timeout=600) == 0, err.read_text()
    lines = out.read_text().split("\n")[:-1]
    assert lines[-1] == "exit 0", err.read_text()
    return lines[:-1]


@pytest.fixture(scope="module")
def two_iterations(tmp_path_factory, forks, model_folder, data_file, heldout_file):
    """A configuration, and what a run of it gives that was never interrupted."""
    folder = tmp_path_factory.mktemp("two-iterations")
    settings = run_settings(model_folder, data_file, heldout_file) | {"iterations": 2}
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    assert run(folder / "whole", config) == []
    files = contents(folder / "whole")
    for kind in (
        "1/checkpoint/model.safetensors",
        "2/checkpoint/model.safetensors",
        "2/responses/shard-00002.parquet",
    ):
        assert f"iterations/{kind}" in files
    assert any(name.startswith("logprobs/") for name in files)
    return config, files


def test_killed_in_every_stage(tmp_path, two_iterations):
    config, uninterrupted = two_iterations
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
        settings["train"]["tokens_per_row"] = 96  # steps of four rows or so
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


@pytest.mark.parametrize("recipe", sorted({*method_names(), "sharpening", "spin"} - {"tpaw"}))
def test_a_method_killed_in_every_stage(tmp_path, settings, recipe):
    changes = {"iterations": 2, "evaluate": {}, "keep": "last"}
    # A random model is never right and seldom ends, and a quarter of the rows is few steps.
    own = {
        "self_training": ["objective.keep=all"],
        "sharpening": ["train.batch_size=1", "generate.samples=8"],
        "irft": ["train.batch_size=1"],
    }
    overrides = ["train.epochs=1", *own.get(recipe, [])]
    config = RunConfig.load(settings | changes, recipe, overrides=overrides)
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config, comments=False))
    assert run(tmp_path / "whole", path) == []
    score = [] if config.objective.needs.references == "none" else ["score:1"]
    points = ["generate:10", *score, "train:3", "saved:1", "generate:5", *score, "train:4"]
    outcomes = run(tmp_path / "killed", path, *points)
    assert outcomes == ["killed"] * len(points)
    files = contents(tmp_path / "whole")
    assert "iterations/2/checkpoint/model.safetensors" in files
    assert any(name.startswith("logprobs/") for name in files) == bool(score)
    assert contents(tmp_path / "killed") == files


def test_a_run_with_adapters_killed_in_every_stage(tmp_path, settings):
    settings |= {"iterations": 2, "evaluate": {}}
    settings["model"]["adapter"] = {"rank": 4}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    assert run(tmp_path / "whole", config) == []
    points = ["train:3", "save:1", "saved:1", "train:6", "score:3", "train:7"]
    assert run(tmp_path / "killed", config, *points) == ["killed"] * len(points)
    files = contents(tmp_path / "whole")
    assert "iterations/2/checkpoint/adapter_model.safetensors" in files
    assert contents(tmp_path / "killed") == files


def test_killed_between_any_two_publications(tmp_path, two_iterations):
    config, uninterrupted = two_iterations
    # Each process publishes three more files and dies, before or after the rename.
    points = ["publish:4", "published:3"] * 30
    outcomes = run(tmp_path / "killed", config, *points)
    assert outcomes.count("killed") > 12
    assert set(outcomes) <= {"killed", "exit 0"}
    assert contents(tmp_path / "killed") == uninterrupted


def test_killed_while_weights_are_removed(tmp_path, finished):
    whole, config = finished
    left = RunDirectory(shutil.copytree(whole.root, tmp_path / "left"))
    for path in (left.checkpoint(4), left.evaluation(4)):
        shutil.rmtree(path)
    left.training_log(4).unlink()
    settings = tmp_path / "config.yaml"
    settings.write_text(to_yaml(config.model_copy(update={"keep": "last"}), comments=False))
    # The log-probs of iteration 4 are stored, so θ_1 and θ_2 go, and then θ_4 trains from θ_3.
    points = ["withdraw:1", "withdrawn:1", "removed:1", "train:2"]
    assert run(left.root, settings, *points) == ["killed"] * len(points)
    removed = {f"iterations/{i}/checkpoint/model.safetensors" for i in (1, 2, 3)}
    files = contents(whole.root)
    assert contents(left.root) == {name: files[name] for name in files.keys() - removed}
    assert all(left.weights_removed(i) for i in (1, 2, 3))
    assert not list(left.root.rglob(".tmp-*"))
