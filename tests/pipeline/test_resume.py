"""A run goes on: from anywhere, after anything, and never over damaged files."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from builders import stopped_at_step
from messages import refused, says

import tpaw.pipeline.players
import tpaw.pipeline.space
import tpaw.pipeline.stages
import tpaw.pipeline.training
import tpaw.training.iteration
from tpaw.config.changes import differences
from tpaw.config.schema import RunConfig, at_iteration
from tpaw.errors import (
    ArtifactError,
    DivergenceError,
    MemoryShortageError,
    StorageError,
    TpawError,
)
from tpaw.models.references import find_checkpoint
from tpaw.models.size import ModelSize
from tpaw.report.summary import summarise
from tpaw.selfplay import self_play
from tpaw.storage.artifacts import describe_file, read_json, write_manifest
from tpaw.storage.run_directory import RunDirectory, restart_iteration
from tpaw.storage.seals import seal_facts
from tpaw.training.callbacks import Recorder
from tpaw.training.iteration import _lower_rate
from tpaw.training.trainer import TeamTrainer


def test_a_finished_run_comes_back_at_once_from_anywhere(finished, tmp_path, monkeypatch):
    run, config = finished
    moved = tmp_path / "elsewhere" / "run"
    shutil.copytree(run.root, moved)

    def load_model(*args, **kwargs):
        raise AssertionError("a finished run needs no model")

    monkeypatch.setattr(tpaw.pipeline.players, "load_model", load_model)

    def state():
        """Of all but the lock, which is opened and names its holder."""
        paths = [p for p in moved.rglob("*") if p.name != "lock"]
        assert len(paths) > 50
        return {p: (p.stat().st_mtime_ns, p.is_file() and p.read_bytes()) for p in paths}

    before = state()
    assert self_play(config, moved).path == str(moved / "iterations" / "4" / "checkpoint")
    assert state() == before
    private = str(run.root).encode()
    for path in moved.rglob("*"):
        if path.is_file():
            assert private not in path.read_bytes(), f"{path} names the run's own folder"


@pytest.mark.parametrize(
    "name",
    [
        "inputs/train.parquet",
        "iterations/1/responses/shard-00001.parquet",
        "iterations/2/checkpoint/model.safetensors",
        "iterations/3/evaluation/exact_match.jsonl",
        "logprobs/*/iteration-1-00000.parquet",
    ],
)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_artifact_is_named_and_refused_and_not_redone(finished, tmp_path, name, damage):
    run, config = finished
    shutil.copytree(run.root, tmp_path / "run")
    path = next((tmp_path / "run").glob(name))
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "truncate":
        path.write_bytes(content[:-1])
    else:
        path.unlink()
    damaged = path.read_bytes() if path.exists() else None
    with refused(path.name, error=ArtifactError):
        self_play(config, tmp_path / "run")
    assert (path.read_bytes() if path.exists() else None) == damaged


def test_a_saved_step_that_is_damaged_is_refused_too(settings, tmp_path):
    from tpaw.errors import Interrupted
    from tpaw.runtime.interrupt import StopSignal

    config, stop = RunConfig.load(settings), StopSignal()

    original = tpaw.pipeline.training.train_iteration

    def stopping(*args, advance, **kwargs):
        def step(count, note=""):
            advance(count, note)
            stop.signal_number = 15

        return original(*args, advance=step, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tpaw.pipeline.training, "train_iteration", stopping)
        with pytest.raises(Interrupted) as caught:
            self_play(config, tmp_path / "r", stop)
    assert caught.value.exit_code == 143
    saved = tmp_path / "r" / "iterations" / "1" / "training" / "checkpoint-1"
    stop.signal_number = None
    state = saved / "optimizer.pt"
    content = bytearray(state.read_bytes())
    content[100] ^= 1
    state.write_bytes(content)
    with refused("checkpoint-1/optimizer.pt", error=ArtifactError):
        self_play(config, tmp_path / "r", stop)
    # With a checksum that fits, as somebody else can write it: torch does not run it.
    state.write_bytes(b"cposix\nsystem\n(S'touch %s'\ntR." % bytes(tmp_path / "touched"))
    write_manifest(saved, {"seconds": 1.0})
    with refused("checkpoint-1", "--restart-iteration 1", error=ArtifactError):
        self_play(config, tmp_path / "r", stop)
    assert not (tmp_path / "touched").exists()


def test_a_lost_manifest_is_named_and_nothing_is_redone_over_it(finished, tmp_path):
    run, config = finished
    for name in ("iterations/2/checkpoint", "iterations/0/evaluation", "inputs"):
        copy = tmp_path / name.replace("/", "-")
        shutil.copytree(run.root, copy)
        (copy / name / "manifest.json").unlink()
        before = {path: path.read_bytes() for path in copy.rglob("*.safetensors")}
        with refused(copy / name, "manifest.json", error=ArtifactError):
            self_play(config, copy)
        assert before == {path: path.read_bytes() for path in copy.rglob("*.safetensors")}


def test_other_files_in_a_run_are_left_alone(finished, tmp_path):
    run, config = finished
    shutil.copytree(run.root, tmp_path / "run")
    (tmp_path / "run" / "notes").mkdir()
    (tmp_path / "run" / "notes" / "manifest.json").write_text('{"mine": 1}')
    self_play(config, tmp_path / "run")
    assert (tmp_path / "run" / "notes" / "manifest.json").read_text() == '{"mine": 1}'


@pytest.mark.parametrize("damage", ["removed", "empty", "cut", "bit", "edited", "not of ours"])
def test_a_damaged_log_is_said_costs_its_metrics_and_nothing_else(finished, tmp_path, damage):
    run, config = finished
    shutil.copytree(run.root, tmp_path / "run")
    copy = RunDirectory(tmp_path / "run")
    whole = summarise(copy, config)
    assert whole["notes"] == []
    log = copy.training_log(2)
    content = log.read_bytes()
    if damage == "removed":
        log.unlink()
    else:
        reward = json.loads(content.splitlines()[-1])["rewards/target"]
        edited = content.replace(str(reward).encode(), b"61.5")
        assert edited != content
        flipped = bytes([content[0] ^ 1]) + content[1:]
        others = {"empty": b"", "cut": content[:-9], "bit": flipped, "edited": edited}
        log.write_bytes(others.get(damage, b"[]\n"))
    assert self_play(config, copy.root).index == 4
    summary = read_json(copy.summary_file)
    for of_the_log in ("training", "lines_not_finite", "first_step"):
        assert of_the_log not in summary["players"][2]
        del whole["players"][2][of_the_log]
    [note] = summary["notes"]
    says(note, "iterations/2/training.jsonl", "θ_2")
    assert summary["players"] == whole["players"]
    log.write_bytes(content)
    self_play(config, copy.root)
    assert read_json(copy.summary_file) == summarise(run, config)


def test_a_metric_that_is_not_finite_is_read(finished, tmp_path):
    run, config = finished
    shutil.copytree(run.root, tmp_path / "run")
    copy = RunDirectory(tmp_path / "run")
    lines = [json.loads(line) for line in copy.training_log(2).read_text().splitlines()]
    lines[-1] |= {"grad_norm": "inf", "rewards/target": "nan"}
    copy.training_log(2).write_text("".join(json.dumps(line) + "\n" for line in lines))
    manifest = copy.checkpoint(2) / "manifest.json"
    entry = describe_file(copy.training_log(2).parent, copy.training_log(2))
    changed = seal_facts(json.loads(manifest.read_text()) | {"training_log": entry})
    manifest.write_text(json.dumps(changed))
    summary = summarise(copy, config)
    assert math.isnan(summary["players"][2]["training"]["rewards/target"])


def test_a_lost_record_of_the_initial_player_is_not_made_anew(finished, tmp_path):
    run, config = finished
    copy = RunDirectory(shutil.copytree(run.root, tmp_path / "run"))
    content = copy.initial_player_file.read_text()
    copy.initial_player_file.unlink()
    for use in (lambda: self_play(config, copy.root), lambda: find_checkpoint(f"{copy.root}@0")):
        with refused(copy.initial_player_file, error=ArtifactError):
            use()
    assert not copy.initial_player_file.exists()
    edited = content.replace('"revision": null', '"revision": "main"')
    assert edited != content
    for damaged in (edited, "{}", "[]"):
        copy.initial_player_file.write_text(damaged)
        with refused(copy.initial_player_file, error=ArtifactError):
            self_play(config, copy.root)
        assert copy.initial_player_file.read_text() == damaged


def test_a_folder_that_goes_away_is_said_and_nothing_takes_its_place(
    settings, tmp_path, monkeypatch
):
    settings |= {"iterations": 1}
    config = RunConfig.load(settings)
    original = tpaw.pipeline.stages.generate_responses

    def moving(*args, **kwargs):
        (tmp_path / "r").rename(tmp_path / "elsewhere")
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(tpaw.pipeline.stages, "generate_responses", moving)
        with refused(tmp_path / "r", error=StorageError):
            self_play(config, tmp_path / "r")
    assert not (tmp_path / "r").exists()
    assert self_play(config, tmp_path / "elsewhere").index == 1


def test_each_stage_asks_for_its_space_before_it_writes(settings, tmp_path, monkeypatch):
    settings |= {"iterations": 1}
    settings["train"] |= {"epochs": 4}
    asked, peak = {}, 0
    run, rmtree = RunDirectory(tmp_path / "r"), shutil.rmtree

    def require_space(folder, needed, work, advice=""):
        places = (run.evaluation(0), run.responses(1), run.root / "logprobs", run.checkpoint(1))
        asked[work] = needed, [place.name for place in places if place.exists()]

    def measure(path, *args, **kwargs):  # a saved step goes once the next one is whole
        nonlocal peak
        if "checkpoint-" in str(path):
            large = ("model.safetensors", "optimizer.pt")
            files = [p for p in Path(path).parent.rglob("*") if p.name in large]
            peak = max(peak, sum(p.stat().st_size for p in files))
        return rmtree(path, *args, **kwargs)

    monkeypatch.setattr(tpaw.pipeline.space, "require_space", require_space)
    monkeypatch.setattr(shutil, "rmtree", measure)
    config = RunConfig.load(settings)
    self_play(config, run.root)
    assert {work: there for work, (_, there) in asked.items()} == {
        "this run": [],
        # Of θ_1, with the words of θ_0's.
        "evaluating 10 held-out records": ["evaluation", "responses", "logprobs", "checkpoint"],
        "generating 24 responses": ["evaluation"],
        "scoring 48 sequences": ["evaluation", "responses"],
        "training θ_1": ["evaluation", "responses", "logprobs"],
    }
    # The tiny model's files have headers and names, which are not among the weights.
    needed = asked["training θ_1"][0]
    assert peak <= needed
    without_weights = tpaw.pipeline.space.bytes_of_training(config, ModelSize(0, 320), 12)
    assert needed - without_weights == pytest.approx(peak, rel=0.2)


def test_a_full_disk_stops_a_run_before_the_stage_that_would_fill_it(
    settings, tmp_path, monkeypatch
):
    settings |= {"iterations": 1}
    usage = namedtuple("usage", "total used free")

    def free(path):  # somebody else fills the disk after the run has begun
        return usage(0, 0, 300_000 if RunDirectory(tmp_path / "r").has_begun() else 10**9)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", free)
        with refused(tmp_path / "r", "training θ_1", "300.0 kB", error=StorageError):
            self_play(RunConfig.load(settings), tmp_path / "r")
    assert not RunDirectory(tmp_path / "r").checkpoint(1).exists()
    assert self_play(RunConfig.load(settings), tmp_path / "r").index == 1


def test_training_that_ends_early_without_a_signal_publishes_nothing(
    settings, tmp_path, monkeypatch
):
    settings |= {"iterations": 1}
    original = Recorder.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        control = original(self, args, state, control, **kwargs)
        control.should_training_stop = True
        return control

    monkeypatch.setattr(Recorder, "on_step_end", on_step_end)
    with pytest.raises(RuntimeError, match="step 1 of 3"):
        self_play(RunConfig.load(settings), tmp_path / "r")
    assert not RunDirectory(tmp_path / "r").checkpoint(1).exists()


def test_several_processes_are_refused_before_anything_is_written(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with refused("WORLD_SIZE", "2", "launch.engine", "TeamTrainer"):
        self_play(RunConfig.load(settings), tmp_path / "r")
    assert not (tmp_path / "r").exists()
    monkeypatch.setenv("WORLD_SIZE", "1")
    settings |= {"iterations": 1}
    assert self_play(RunConfig.load(settings), tmp_path / "r").index == 1


def test_a_resumed_iteration_obeys_the_new_intervals_and_logs_the_same(settings, tmp_path):
    settings |= {"iterations": 1}
    settings["train"] |= {"epochs": 4, "log_every": 5, "save_every": 5}
    config = RunConfig.load(settings)
    self_play(config, tmp_path / "whole")
    stopped_at_step(7, config, tmp_path / "cut")
    log = RunDirectory(tmp_path / "cut").training_log(1)
    log.write_bytes(log.read_bytes()[:-7])  # as a power cut leaves it
    self_play(config, tmp_path / "cut")

    def lines(name):
        path = tmp_path / name / "iterations" / "1" / "training.jsonl"
        return {line["step"]: line for line in map(json.loads, path.read_text().splitlines())}

    whole, cut = lines("whole"), lines("cut")
    # The stop logged what was summed up to it; the rest of that window is a line of its own.
    assert sorted(whole) == [1, 5, 10, 12]
    assert sorted(cut) == [1, 5, 7, 10, 12]
    for name, weights in (("rewards/target", (2, 3)), ("loss", (2, 3))):
        together = (weights[0] * cut[7][name] + weights[1] * cut[10][name]) / 5
        assert together == pytest.approx(whole[10][name], abs=1e-6)
    stopped_at_step(3, config, tmp_path / "changed")
    settings["train"] |= {"log_every": 1}
    self_play(RunConfig.load(settings), tmp_path / "changed")
    assert sorted(lines("changed")) == [1, *range(3, 13)]


def test_a_model_that_moved_is_found_by_its_weights(settings, tmp_path, model_folder):
    settings |= {"iterations": 2}
    shutil.copytree(model_folder, tmp_path / "here")
    settings["model"] = {"path": str(tmp_path / "here")}
    stopped_at_step(2, RunConfig.load(settings), tmp_path / "r")
    (tmp_path / "here").rename(tmp_path / "there")
    with refused(tmp_path / "here", "θ_0", error=TpawError):
        self_play(RunConfig.load(settings), tmp_path / "r")
    settings["model"] = {"path": str(tmp_path / "there")}
    assert self_play(RunConfig.load(settings), tmp_path / "r").index == 2


@pytest.mark.parametrize("when", ["during", "at the last step"])
def test_divergence_publishes_nothing_and_can_be_left(settings, tmp_path, monkeypatch, when):
    settings |= {"iterations": 1}
    original = TeamTrainer.compute_loss

    def poisoned(self, model, inputs, *args, **kwargs):
        loss = original(self, model, inputs, *args, **kwargs)
        last = self.state.global_step == self.state.max_steps - 1
        return loss * math.nan if when == "during" or last else loss

    monkeypatch.setattr(TeamTrainer, "compute_loss", poisoned)
    run = tmp_path / "r"
    advice = f"tpaw run {run} --restart-iteration 1 --set train.learning_rate=RATE"
    with refused("train.learning_rate", advice, error=DivergenceError):
        self_play(RunConfig.load(settings), run)
    assert not (run / "iterations" / "1" / "checkpoint").exists()
    monkeypatch.undo()
    shards = {path: path.read_bytes() for path in run.rglob("*.parquet")}
    settings["train"] |= {"learning_rate": [1e-4]}
    with refused("train.learning_rate"):
        self_play(RunConfig.load(settings), run)  # the iteration has begun
    restart_iteration(run, 1)
    assert self_play(RunConfig.load(settings), run).index == 1
    assert all(path.read_bytes() == content for path, content in shards.items())


@pytest.mark.parametrize("rates", [1e-4, [1e-4, 2e-4, 3e-4]])
@pytest.mark.parametrize("t", [0, 1, 2])
def test_the_lower_rate_that_a_diverged_run_advises_is_accepted(settings, rates, t):
    settings |= {"iterations": 3}
    settings["train"] |= {"learning_rate": rates}
    config = RunConfig.load(settings)
    advised = _lower_rate(config, t).replace("RATE", "1e-9")
    changed = RunConfig.load(settings, overrides=[advised])
    assert differences(config, changed, begun=t) == []
    assert [at_iteration(changed.train.learning_rate, i) for i in range(t, 3)] == [1e-9] * (3 - t)


@pytest.mark.parametrize("number", [0, 1, 2, 9])
def test_only_an_iteration_that_is_under_way_can_be_restarted(finished, number):
    run, _ = finished
    checkpoints = [run.checkpoint(i) for i in range(1, 5)]
    with refused(f"--restart-iteration {number}"):
        restart_iteration(run.root, number)
    assert all(checkpoint.exists() for checkpoint in checkpoints)
    with refused(run.root / "nowhere"):
        restart_iteration(run.root / "nowhere", number)


SHORTAGES = {
    # Two for the held-out rows, and one shard of the three.
    "generate.tokens_per_batch": ("tpaw.generation.hf.generate_continuously", 3),
    "score.tokens_per_row": ("tpaw.scoring.score.response_logps", 1),
    "train.tokens_per_row": ("tpaw.training.trainer.response_logps", 5),
}


def test_a_run_that_is_out_of_memory_goes_on_with_less(settings, tmp_path):
    settings["iterations"] = 1
    kept = {}
    for key, (where, calls) in SHORTAGES.items():
        module, _, name = where.rpartition(".")
        section, _, field = key.partition(".")
        work, done = getattr(sys.modules[module], name), []

        def starved(*args, done=done, calls=calls, work=work, **kwargs):
            if len(done) == calls:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            done.append(args)
            return work(*args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(where, starved)
            with refused(key, settings[section][field], error=MemoryShortageError):
                self_play(RunConfig.load(settings), tmp_path / "run")
        settings[section][field] //= 2
        assert kept.items() <= _times(tmp_path / "run").items()
        kept = _times(tmp_path / "run")
    self_play(RunConfig.load(settings), tmp_path / "run")
    assert kept.items() <= _times(tmp_path / "run").items()


def _times(folder):
    """When each published table was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}
