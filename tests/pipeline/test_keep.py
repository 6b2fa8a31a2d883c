"""Weights that nothing reads again are removed, the results stay the same, and the plan is true."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections import namedtuple

import pytest
from builders import contents, save_model
from messages import refused, says

import tpaw.pipeline.space
import tpaw.pipeline.training
from tpaw.config.plan import plan_run
from tpaw.config.schema import RunConfig
from tpaw.data.inputs import load_inputs
from tpaw.errors import ArtifactError, StorageError
from tpaw.generation.responses import read_responses
from tpaw.models.loading import load_model
from tpaw.models.references import checkpoint_of, find_checkpoint, find_checkpoints
from tpaw.models.size import ModelSize, model_size
from tpaw.pipeline.preflight import read_and_check
from tpaw.pipeline.space import (
    BYTES_OF_OTHER_FILES,
    BYTES_PER_RECORD,
    BYTES_PER_SHARD,
    bytes_of_inputs,
    bytes_of_temporary_files,
    described_space,
    memory_of_training,
    plan_space,
    space_for_run,
)
from tpaw.runtime.interrupt import StopSignal
from tpaw.runtime.watch import Watch
from tpaw.selfplay import self_play
from tpaw.storage.artifacts import read_json, read_manifest
from tpaw.storage.run_directory import RunDirectory, restart_iteration

WEIGHTS = "model.safetensors"
SIZE = {"size": re.compile(r"[\d.]+ [kM]B")}
Usage = namedtuple("Usage", "total used free")


def with_weights(run):
    """Indices of the checkpoints whose weights are there."""
    return [i for i in range(1, 5) if (run.checkpoint(i) / WEIGHTS).exists()]


def size_of(paths):
    return sum(path.stat().st_size for path in paths if path.is_file())


@pytest.fixture(scope="module")
def last(finished, tmp_path_factory):
    """The finished run again with `keep: last`, its configuration, and what was seen meanwhile."""
    _, config = finished
    train = config.train.model_copy(update={"save_every": 2})
    config = config.model_copy(update={"keep": "last", "train": train})
    run = RunDirectory(tmp_path_factory.mktemp("keep") / "run")
    seen = {"trained with": [], "bytes": 0, "bytes of weights": 0}
    train_iteration = tpaw.pipeline.training.train_iteration

    def training(*args, **kwargs):
        seen["trained with"].append(with_weights(run))
        return train_iteration(*args, **kwargs)

    def measuring(original):
        def operation(*args, **kwargs):
            files = [path for path in run.root.rglob("*") if path.is_file()]
            large = [path for path in files if path.name in (WEIGHTS, "optimizer.pt")]
            seen["bytes"] = max(seen["bytes"], size_of(files))
            seen["bytes of weights"] = max(seen["bytes of weights"], size_of(large))
            return original(*args, **kwargs)

        return operation

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tpaw.pipeline.training, "train_iteration", training)
        for module, name in ((os, "replace"), (os, "unlink"), (shutil, "rmtree")):
            patch.setattr(module, name, measuring(getattr(module, name)))
        assert self_play(config, run.root).index == 4
    return run, config, seen


def test_weights_go_as_soon_as_nothing_reads_them_and_change_no_result(finished, last):
    whole, (run, _, seen) = contents(finished[0].root), last
    # Three main players: θ_1 and θ_2 are scored for the last time before θ_4 trains, from θ_3.
    assert seen["trained with"] == [[], [1], [1, 2], [3]]
    assert with_weights(run) == [4]
    removed = {f"iterations/{i}/checkpoint/{WEIGHTS}" for i in (1, 2, 3)}
    assert removed < whole.keys()
    assert contents(run.root) == {n: found for n, found in whole.items() if n not in removed}
    for i in (1, 2, 3):
        assert run.weights_removed(i) == f"the weights of θ_{i} were removed by keep: last"
        fingerprints = [read_manifest(r.checkpoint(i))["fingerprint"] for r in (run, finished[0])]
        assert fingerprints[0] == fingerprints[1]
    assert run.weights_removed(0) is run.weights_removed(4) is None


def test_the_plan_is_an_upper_bound_of_what_is_measured(last):
    run, config, seen = last
    size = model_size(config.model)
    plans = plan_run(config, 24)
    inputs = size_of(run.inputs.rglob("*"))
    spaces, without_weights = (
        plan_space(config, plans, one, 10, inputs) for one in (size, ModelSize(0, size.vocabulary))
    )
    assert seen["bytes"] <= max(s.peak for s in spaces)
    weights = max(a.peak - b.peak for a, b in zip(spaces, without_weights, strict=True))
    # While θ_3 trains: θ_1, θ_2 and two saved steps. Headers and names count as other files.
    assert weights == (2 * 4 + 2 * 8) * size.parameters
    assert seen["bytes of weights"] / 1.1 <= weights <= 1.3 * seen["bytes of weights"]
    assert [list(s.kept) for s in spaces] == seen["trained with"]
    assert size_of(run.root.rglob("*")) <= spaces[-1].after
    # What is left of a finished run is what is there, its log-probs and logs included.
    left = plan_space(config, plans, size, 10, 0, run)[-1].after
    aside = ("lock", "run.json", "config.yaml", "summary.json", "report.html", "0.json")
    counted = [path for path in run.root.rglob("*") if path.name not in aside]
    manifests = size_of((run.root / "logprobs").rglob("manifest.json"))
    assert left == size_of(counted) - manifests


def test_a_finished_run_goes_on_and_a_stricter_rule_is_applied(finished, last, tmp_path, tpaw_):
    run, config, _ = last
    before = contents(run.root)
    assert self_play(config, run.root).index == 4
    assert contents(run.root) == before
    copy = RunDirectory(shutil.copytree(finished[0].root, tmp_path / "copy"))
    for keep, left in (("team", [2, 3, 4]), ("all", [2, 3, 4]), ("last", [4])):
        code, out, _ = tpaw_("run", copy.root, "--set", f"keep={keep}")
        assert code == 0
        assert with_weights(copy) == left
    says(out.partition("The weights")[2].partition("Results")[0], "θ_1", "θ_2, θ_3", "keep: last")
    assert contents(copy.root) == before
    code, out, _ = tpaw_("status", copy.root)
    assert code == 0
    assert "The weights of θ_1 were removed by keep: team." in out
    assert "The weights of θ_2, θ_3 were removed by keep: last." in out
    entries = read_json(copy.summary_file)["players"]
    assert [e.get("weights_removed_by") for e in entries] == [
        *(None, "keep: team", "keep: last", "keep: last", None)
    ]
    assert ["checkpoint" in e for e in entries] == [False, True, True, True, True]


def test_what_needs_the_weights_says_that_they_were_removed(last, tpaw_, tmp_path):
    run, config, _ = last
    with refused(f"{run.root}@2", "θ_2", "keep: last", "@0, @4"):
        find_checkpoint(f"{run.root}@2")
    assert find_checkpoint(str(run.root)).player.index == 4
    assert [c.player.index for c in find_checkpoints(str(run.root))] == [0, 1, 2, 3, 4]
    code, _, err = tpaw_("answer", f"{run.root}@2", "-o", tmp_path / "a")
    assert code == 2
    says(err, "θ_2", "keep: last")
    with refused("2/checkpoint", "keep: last"):
        player = checkpoint_of(run, 2, trust=False).player
        load_model(player, config.model, dtype=None, device=None)
    with refused("--restart-iteration 2", "θ_2", "keep: last"):
        restart_iteration(run.root, 2)
    code, _, err = tpaw_("plan", run.root, "--set", f"model.path={run.checkpoint(2)}")
    assert code == 2
    says(err, run.checkpoint(2), "keep: last")
    # Stored evaluations are compared as before.
    code, _, _ = tpaw_("compare", f"{run.root}@1", f"{run.root}@4")
    assert code == 0
    code, _, err = tpaw_("compare", f"{run.root}@1", f"{run.root}@4", "--suite", "gsm8k")
    assert code == 2
    says(err, "@1", "gsm8k", "θ_1", "keep: last")


def test_a_damaged_checkpoint_is_no_removed_one(last, tmp_path):
    run, config, _ = last
    copy = RunDirectory(shutil.copytree(run.root, tmp_path / "copy"))
    (copy.checkpoint(4) / WEIGHTS).unlink()
    with refused(f"4/checkpoint/{WEIGHTS}", error=ArtifactError):
        self_play(config, copy.root)


def test_a_run_that_does_not_fit_is_refused_before_anything_is_written(
    settings, tmp_path, monkeypatch
):
    config = RunConfig.load(settings | {"iterations": 4})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 2_000_000))
    with refused(tmp_path / "r", "MB", "keep", "last needs up to", error=StorageError, hide=SIZE):
        self_play(config, tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_what_is_left_of_a_run_must_fit(finished, tmp_path, monkeypatch):
    run, config = finished
    copy = RunDirectory(shutil.copytree(run.root, tmp_path / "copy"))
    shutil.rmtree(copy.checkpoint(4))
    shutil.rmtree(copy.evaluation(4))
    size = model_size(config.model)
    # θ_4, and a saved step if somebody stops the run. A file of somebody else is no space.
    (copy.root / "iterations" / "suite.bin").write_bytes(bytes(100_000))
    space = 4 * size.parameters + BYTES_OF_OTHER_FILES
    for free, fits in ((space, False), (4 * space, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: Usage(0, 0, free))
        with (
            contextlib.nullcontext() if fits else refused("this run", error=StorageError, hide=SIZE)
        ):
            assert read_and_check(config, copy.root, Watch(StopSignal())) is None
    # A finished run needs nothing.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 0))
    assert read_and_check(config, run.root, Watch(StopSignal())) is None


def test_temporary_files_are_bounded_by_the_columns_of_the_rows(finished):
    run, config = finished
    inputs = load_inputs(run.inputs, config)
    held = sum(
        column.flat.nbytes
        for part in (inputs.examples, inputs.heldout)
        for column in part.columns().values()
    )
    for t in (1, 2, 3):  # the responses that θ_4 trains on
        answers = read_responses(run.responses(t + 1))
        for column in (answers.example_ids, answers.token_ids, answers.texts):
            held += column.flat.nbytes
    size = bytes_of_inputs(read_manifest(run.inputs)["tokens"], 34)
    plans = plan_run(config, 24)
    without_records = 34 * BYTES_PER_RECORD + 72 * BYTES_PER_RECORD + 7 * BYTES_PER_SHARD
    bound = bytes_of_temporary_files(config, plans, size)
    assert held <= bound <= 2 * held + without_records
    assert bytes_of_temporary_files(config, [], size) == 0
    sft = config.model_copy(update={"method": "sft"})
    assert bytes_of_temporary_files(sft, plans, size) == 2 * size


def test_temporary_files_must_fit_on_their_own_disk_or_on_the_runs(finished, tmp_path, monkeypatch):
    _, config = finished
    plans = plan_run(config, 24)
    needs = (tmp_path / "r", config, plans, model_size(config.model), 10, 9_000)
    temporary = bytes_of_temporary_files(config, plans, 9_000)
    asked = []
    with monkeypatch.context() as patch:
        note = lambda folder, needed, *_: asked.append((str(folder), needed))  # noqa: E731
        patch.setattr(tpaw.pipeline.space, "require_space", note)
        for folder in (tmp_path, "/proc"):  # /proc is never on the disk of another folder
            patch.setattr(tempfile, "tempdir", str(folder))
            space_for_run(*needs)
    (_, together), (where, alone), other = asked
    assert where == str(tmp_path / "r")
    assert together == alone + temporary
    assert other == ("/proc", temporary)
    monkeypatch.setattr(tempfile, "tempdir", "/proc")
    free = {"/proc": temporary - 1}
    usage = lambda path: Usage(0, 0, free.get(str(path), 10**9))  # noqa: E731
    monkeypatch.setattr(shutil, "disk_usage", usage)
    with refused("/proc", "TMPDIR", error=StorageError, hide=SIZE):
        space_for_run(*needs)


RAY = {"engine": "ray"}


@pytest.mark.parametrize(
    ("changes", "bytes_each"),
    [
        # The table in training/split_weights.py, and Adam with its second moment.
        ({"precision": "bf16"}, 14),
        ({"precision": "fp32"}, 12),
        ({"precision": "bf16", "train": {"weights": "split"}}, 8),
        ({"precision": "fp32", "train": {"optimizer": "adamw_torch"}}, 16),
        # DDP sends a copy of the gradients. Of sharded weights, no whole bf16 copy exists.
        ({"precision": "bf16", "launch": RAY}, 14 + 4),
        ({"precision": "bf16", "launch": RAY | {"workers": 1}}, 14),
        ({"precision": "bf16", "launch": RAY | {"workers": 1, "gpus_per_worker": 2}}, 14 + 4),
        ({"precision": "bf16", "launch": RAY, "train": {"parallel": "fsdp2"}}, 12),
        ({"precision": "bf16", "train": {"parallel": "fsdp2"}}, 14),
    ],
)
def test_memory_of_training(settings, changes, bytes_each):
    settings["train"] |= changes.pop("train", {})
    config = RunConfig.load(settings | changes)
    assert memory_of_training(config, ModelSize(1000, 320)) == bytes_each * 1000


# Of the tiny model's two layers: q and o are 32×32, k and v 32×16, and three of the MLP 32×64.
LINEAR = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
OF_RANK_4 = 2 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))
EMBEDDINGS, NORMS, BIASES = 320 * 32, 5 * 32, 2 * (32 + 16 + 16)
REST = {"qwen2": EMBEDDINGS + NORMS + BIASES, "llama": 2 * EMBEDDINGS + NORMS}  # Qwen2's are tied


@pytest.mark.parametrize("kind", REST)
@pytest.mark.parametrize(
    ("precision", "quantization", "of_linear", "of_rest", "of_adapter"),
    [
        ("fp32", None, 4, 4, 12),
        ("bf16", None, 2, 2, 14),
        # Scales: one byte for 64 weights, and four for 256 of these bytes.
        ("bf16", "nf4", 0.5 + 1 / 64 + 4 / (64 * 256), 2, 14),
        ("fp32", "nf4", 0.5 + 1 / 64 + 4 / (64 * 256), 4, 12),
    ],
    ids=["fp32", "bf16", "nf4 and bf16", "nf4 and fp32"],
)
def test_memory_of_training_an_adapter(
    settings, tmp_path, kind, precision, quantization, of_linear, of_rest, of_adapter
):
    model = {"path": str(save_model(tmp_path / "m", kind)), "quantization": quantization}
    settings |= {"model": model | {"adapter": {"rank": 4}}, "precision": precision}
    config = RunConfig.load(settings)
    found = memory_of_training(config, model_size(config.model))
    expected = of_linear * LINEAR + of_rest * REST[kind] + of_adapter * OF_RANK_4
    assert found == pytest.approx(expected, abs=1)


@pytest.mark.parametrize(
    "launch", [{}, RAY, RAY | {"workers": 1}], ids=["in process", "ray", "one worker"]
)
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_the_plan_says_whose_memory_it_is(settings, launch, parallel):
    settings["train"] |= {"parallel": parallel}
    config = RunConfig.load(settings | {"launch": launch})
    *_, rows, memory = described_space(config, plan_run(config, 24), ModelSize(1000, 320), 10, 0)
    is_group = launch == RAY
    assert rows.startswith("Temporary files of each process:" if is_group else "Temporary files:")
    says(rows, "kB", "TMPDIR")
    who = "training" if not is_group else "each process" if parallel == "ddp" else "together"
    says(memory, "Memory", who, f"{16 if is_group and parallel == 'ddp' else 12}.0 kB")
