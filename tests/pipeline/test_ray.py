"""Shards and training on a Ray cluster of two nodes: the same bytes as in one process."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path

import generation_server
import pytest
import ray
import ray.cluster_utils
import ray_driver
import torch
from builders import contents, run_settings, save_adapter, save_model
from messages import refused
from ray.util.placement_group import (
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from safetensors.torch import load_file, save_file

import tpaw.pipeline.critic_task
import tpaw.pipeline.players
import tpaw.storage.artifacts
from tpaw.config.schema import RunConfig
from tpaw.errors import InputError, Interrupted, NonFiniteError, WorkerError
from tpaw.pipeline import ray_engine, ray_placement
from tpaw.pipeline.worker import AnswerTask, LogpsTask
from tpaw.runtime.interrupt import StopSignal
from tpaw.selfplay import self_play
from tpaw.storage.artifacts import ShardedArtifact, read_manifest
from tpaw.storage.run_directory import RunDirectory, open_run

pytestmark = [pytest.mark.process, pytest.mark.cpu]

# Ray without what costs time here: low priority, slow looks and actors that a test does not need.
QUICK = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.3",
}


@pytest.fixture(scope="module")
def cluster():
    """Two nodes with a core each. Their workers find the test's modules, and say nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]))
        for name, value in QUICK.items():
            patch.setenv(name, value)
        node = {"num_cpus": 1, "include_dashboard": False}
        nodes = ray.cluster_utils.Cluster(initialize_head=True, head_node_args=node)
        nodes.add_node(num_cpus=1)
        ray.init(nodes.address, log_to_driver=False, logging_level="ERROR")
        yield nodes
        ray.shutdown()
        nodes.shutdown()


@pytest.fixture(autouse=True)
def deadline():
    """A test that waits for ever fails, and the others go on."""

    def fail(number, frame):
        pytest.fail("five minutes have passed")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(300)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def settings_of(model_folder, data_file, heldout_file):
    settings = run_settings(model_folder, data_file, heldout_file) | {"iterations": 1}
    settings["generate"] |= {"shard_size": 4}
    settings["score"] |= {"shard_size": 8}
    return settings


def by_two_workers(settings):
    return settings | {"launch": {"engine": "ray", "workers": 2}}


@pytest.fixture
def settings(model_folder, data_file, heldout_file):
    return by_two_workers(settings_of(model_folder, data_file, heldout_file))


@pytest.fixture(scope="module")
def alone(tmp_path_factory, model_folder, data_file, heldout_file):
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone") / "r"
    self_play(RunConfig.load(settings_of(model_folder, data_file, heldout_file)), folder)
    return RunDirectory(folder)


@pytest.fixture
def with_adapters(tmp_path, model_folder, data_file, heldout_file):
    """Settings whose θ_0 has an adapter already, and the run of one process."""

    def make(each_iteration):
        sft = save_adapter(tmp_path / "sft", model_folder)
        settings = settings_of(model_folder, data_file, heldout_file)
        adapter = {"rank": 4, "each_iteration": each_iteration}
        settings |= {"model": {"path": str(sft), "adapter": adapter}}
        self_play(RunConfig.load(settings), tmp_path / "alone")
        return settings, RunDirectory(tmp_path / "alone")

    return make


def copied_without(run, folder, *parts):
    """A copy of a run that lacks some folders, so it has to do that work again."""
    shutil.copytree(run.root, folder)
    for part in parts:
        shutil.rmtree(folder / part)


@pytest.fixture
def unscored(alone, tmp_path):
    """The folder of a run of one process that is about to score."""
    copied_without(
        alone, tmp_path / "r", "logprobs", "iterations/1/checkpoint", "iterations/1/evaluation"
    )
    return tmp_path / "r"


def before_training(run):
    """Everything that a run publishes before its first training."""
    files, after = contents(run.root), ("iterations/1/checkpoint", "iterations/1/evaluation")
    return {name: text for name, text in files.items() if not name.startswith(after)}


class Enough(Exception):
    """The test has seen enough of the run."""


@pytest.fixture
def untrained(monkeypatch):
    """Run until the first training."""

    def train(*args):
        raise Enough

    def run(settings, folder):
        monkeypatch.setattr(ray_engine.RayEngine, "train", train)
        with pytest.raises(Enough):
            self_play(RunConfig.load(settings), folder)
        return RunDirectory(folder)

    return run


@pytest.fixture
def trained_by_fsdp(tmp_path, monkeypatch):
    """Go on with a run of one process that is about to train, and train with FSDP2 by Ray.

    Every process writes down what it sees at each step. So many of them are killed once.
    """

    def do(*args):
        raise Enough  # the training is over

    def run(settings, alone, killed):
        folder = tmp_path / "facts"
        folder.mkdir()
        if not killed:
            (folder / "killed").touch()

        @ray.remote(num_cpus=0)
        def group(*arguments):
            ray_driver.run_fsdp_group(str(folder), *arguments)

        copied_without(alone, tmp_path / "r", "iterations/1/checkpoint", "iterations/1/evaluation")
        settings["train"] = settings["train"] | {"parallel": "fsdp2", "save_every": 1}
        monkeypatch.setattr(ray_engine, "GROUP", group)
        monkeypatch.setattr(ray_engine.RayEngine, "do", do)
        with pytest.raises(Enough):
            self_play(RunConfig.load(settings), tmp_path / "r")
        assert (folder / "killed").exists()
        facts = [(folder / f"rank-{rank}.jsonl").read_text().splitlines() for rank in range(2)]
        return RunDirectory(tmp_path / "r"), [[json.loads(line) for line in f] for f in facts]

    return run


def losses(run):
    lines = run.iteration(0).training_log.read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def worker_pids():
    """Processes of actors that do shards, in the cluster of this test."""
    address, found = f"--gcs-address={ray.get_runtime_context().gcs_address}".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes()
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            raylet = Path("/proc", parent, "cmdline").read_bytes()
        except OSError:
            continue
        if line.startswith(b"ray::ShardWorker") and address in raylet:
            found.append(int(folder.name))
    return found


def test_two_workers_give_the_bytes_of_one_process(cluster, settings, alone, tmp_path, monkeypatch):
    # The process of the run can load no player: others did the work.
    monkeypatch.setattr(tpaw.pipeline.players, "load_model", None)
    do, reported, parts = ray_engine.RayEngine.do, defaultdict(list), []

    def counting(self, task, shards, on_done):
        def count(number):
            reported[type(task).__name__].append(number)
            on_done(number)

        if isinstance(task, AnswerTask | LogpsTask):  # of held-out data
            parts.append(len(shards))
        return do(self, task, shards, count)

    monkeypatch.setattr(ray_engine.RayEngine, "do", counting)
    self_play(RunConfig.load(settings), tmp_path / "r")
    run = RunDirectory(tmp_path / "r")
    # One bar for all workers: what they report adds up, and never goes back.
    assert sum(reported["GenerateTask"]) == 24
    assert sum(reported["ScoreTask"]) == 48
    assert all(min(numbers) >= 0 for numbers in reported.values())
    # Two workers do not cut held-out data into other parts than one process.
    assert parts
    assert set(parts) == {1}
    assert before_training(run) == before_training(alone)
    assert len(before_training(run)) > 10
    assert read_manifest(run.checkpoint(1))["processes"] == 2
    assert read_manifest(alone.checkpoint(1))["processes"] == 1
    assert losses(run) == pytest.approx(losses(alone), rel=1e-5)
    assert not list(run.root.rglob("delivered-*"))
    assert not list(run.root.rglob(".tmp-*"))


@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        ("tspin", {"generate": {"samples": 2}}),
        ("irft", {"data": {"chunks": 2}}),
        ("sharpening", {"generate": {"samples": 8}, "train": {"batch_size": 2, "warmup": 0.0}}),
    ],
)
def test_what_methods_ask_of_the_loop_reaches_the_group_that_trains(
    cluster, model_folder, data_file, heldout_file, tmp_path, recipe, more
):
    """Responses of θ_0 and several answers to a prompt; a part of the data; the kept responses."""
    settings = settings_of(model_folder, data_file, heldout_file) | {"evaluate": {}}
    configs = [
        RunConfig.load(s, recipe, more, overrides=["train.epochs=1"])
        for s in (settings, by_two_workers(settings))
    ]
    runs = [RunDirectory(tmp_path / name) for name in ("alone", "r")]
    for config, run in zip(configs, runs, strict=True):
        self_play(config, run.root)
    alone, run = runs
    assert before_training(run) == before_training(alone)
    assert read_manifest(run.checkpoint(1))["processes"] == 2
    kept = read_manifest(run.checkpoint(1)).get("triples", 0)
    assert len(losses(alone)) == {"tspin": 6, "irft": 2, "sharpening": math.ceil(kept / 2)}[recipe]
    assert losses(run) == pytest.approx(losses(alone), rel=1e-5)


def test_fsdp_shards_the_model_and_goes_on_after_a_process_dies(
    cluster, settings, alone, trained_by_fsdp
):
    run, facts = trained_by_fsdp(settings, alone, killed=1)
    for seen in facts:
        assert {kind for step in seen for kind in step["kinds"]} == {"DTensor"}
        assert {f"__{i}_0.distcp" for i in range(2)} <= set(seen[-1]["saved"])
        # The process that dies is killed at step 2, after step 1 was saved.
        assert [step["step"] for step in seen].count(1) == 1
        assert [step["step"] for step in seen].count(2) == 2
    assert losses(run) == pytest.approx(losses(alone), rel=1e-5)
    weights = load_file(Path(run.checkpoint(1)) / "model.safetensors")
    for name, expected in load_file(Path(alone.checkpoint(1)) / "model.safetensors").items():
        assert weights[name].dtype == torch.float32
        assert torch.allclose(weights[name], expected, atol=1e-4)


def test_players_that_are_adapters(cluster, with_adapters, tmp_path, monkeypatch, untrained):
    settings, alone = with_adapters("fresh")
    monkeypatch.setattr(tpaw.pipeline.players, "load_base", None)
    run = untrained(by_two_workers(settings), tmp_path / "r")
    assert before_training(run) == before_training(alone)
    assert len(before_training(run)) > 10


def test_fsdp_shards_a_base_and_its_adapter(cluster, with_adapters, trained_by_fsdp):
    settings, alone = with_adapters("continue")
    run, facts = trained_by_fsdp(by_two_workers(settings), alone, killed=0)
    assert [seen[-1]["kinds"] for seen in facts] == [["DTensor"]] * 2
    assert losses(run) == pytest.approx(losses(alone), rel=1e-5)
    same_adapters(run, alone)


def same_adapters(run, alone):
    """Checkpoints hold an adapter alone, in fp32, and the two differ by rounding."""
    found, expected = (r.checkpoint(1) / "adapter_model.safetensors" for r in (run, alone))
    assert not (run.checkpoint(1) / "model.safetensors").exists()
    weights, others = load_file(found), load_file(expected)
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert weight.dtype == torch.float32
        assert torch.allclose(weight, others[name], atol=1e-4)


def test_a_worker_that_dies_costs_nothing(
    cluster, settings, alone, tmp_path, monkeypatch, capfd, untrained
):
    receive, killed = ShardedArtifact.receive, []

    def killing(self, record):
        receive(self, record)
        if len(killed) < 2 and "responses" in str(record):
            pid = worker_pids()[0]
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    monkeypatch.setattr(ShardedArtifact, "receive", killing)
    run = untrained(settings, tmp_path / "r")
    assert len(set(killed)) == 2
    assert before_training(run) == before_training(alone)
    assert "its worker died; another one does it again" in capfd.readouterr().err


def test_workers_that_hold_a_player_together_score_the_same_bytes(
    cluster, settings, alone, unscored, monkeypatch, capfd, untrained
):
    settings["score"] |= {"sharded": True}
    joined, receive, killed = ray_engine.RayEngine._joined, ShardedArtifact.receive, []
    sizes = set()

    def noting(self):
        group = joined(self)
        sizes.add((len(group), len(self._actors)))
        return group

    def killing(self, record):
        receive(self, record)
        if not killed and "logprobs" in str(record):
            os.kill(worker_pids()[1], signal.SIGKILL)  # the others wait for it in vain
            killed.append(record)

    monkeypatch.setattr(ray_engine.RayEngine, "_joined", noting)
    monkeypatch.setattr(ShardedArtifact, "receive", killing)
    run = untrained(settings, unscored)
    assert sizes == {(2, 0)}  # nobody else holds a player meanwhile
    assert killed
    assert before_training(run) == before_training(alone)
    assert "its worker died; another one does it again" in capfd.readouterr().err
    assert not list(run.root.rglob("delivered-*"))


def test_a_process_that_dies_while_all_score_together_costs_one_try(
    cluster, settings, alone, unscored, monkeypatch, capfd, untrained
):
    """The others may fail first, because they lose it."""
    settings["score"] |= {"sharded": True}
    given, killed = ray_engine.RayEngine._given, []

    def killing(self, actor, task, work):
        answer = given(self, actor, task, work)
        if not killed and self._group and actor is self._group[-1]:
            killed.append(max(worker_pids()))
            threading.Timer(0.3, os.kill, (killed[0], signal.SIGKILL)).start()
        return answer

    monkeypatch.setattr(ray_engine.RayEngine, "_given", killing)
    run = untrained(settings, unscored)
    assert killed
    assert before_training(run) == before_training(alone)


def test_paths_may_be_relative_to_the_folder_that_the_run_was_started_from(
    cluster, settings, alone, tmp_path, monkeypatch, untrained
):
    monkeypatch.chdir(tmp_path)
    settings["model"]["path"] = os.path.relpath(settings["model"]["path"])
    run = untrained(settings, "runs/r")
    assert len(ShardedArtifact(run.iteration(0).responses).names) > 2
    expected = {n: c for n, c in before_training(alone).items() if n.endswith(".parquet")}
    assert {n: c for n, c in before_training(run).items() if n.endswith(".parquet")} == expected


def test_no_server_is_left_of_a_worker(cluster, settings, tmp_path, untrained):
    file = tmp_path / "pids"
    stub = f"{sys.executable} {generation_server.__file__} --port {{port}} --model {{model}}"
    server = {"command": f"{stub} --pids {file}"}
    settings["generate"] |= {"backend": "server", "server": server}
    untrained(settings, tmp_path / "r")
    pids = [int(line) for line in file.read_text().split()]
    assert len(pids) >= 2  # one for each worker
    assert not [pid for pid in pids if Path("/proc", str(pid)).exists()]


def test_a_worker_that_dies_too_often_ends_the_run(cluster, settings, tmp_path, monkeypatch):
    settings["launch"] |= {"max_retries": 0}
    receive, given, ends = ShardedArtifact.receive, ray_engine.RayEngine._given, []

    def kill():
        for pid in worker_pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def killing(self, record):
        receive(self, record)
        if not ends:
            kill()
        ends.append(record)

    def giving(self, *arguments):
        answer = given(self, *arguments)
        if ends:  # a worker that has begun anew loads its player first
            threading.Timer(0.5, kill).start()
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(ShardedArtifact, "receive", killing)
        patch.setattr(ray_engine.RayEngine, "_given", giving)
        with pytest.raises(WorkerError, match=r"θ_0 generates .*launch\.max_retries: 0"):
            self_play(RunConfig.load(settings), tmp_path / "r")
    folder = RunDirectory(tmp_path / "r").iteration(0).responses
    assert 0 < len(ShardedArtifact(folder).names) < 6
    settings["launch"] |= {"engine": "in_process"}
    assert self_play(RunConfig.load(settings), tmp_path / "r").index == 1  # it goes on without Ray


def test_a_worker_tells_its_error_as_a_whole(cluster, settings, tmp_path):
    model = save_model(tmp_path / "broken")
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    settings["model"] = {"path": str(model)}
    settings["launch"] |= {"workers": 1}  # with two, either may fail first
    with refused("model.norm.weight", "θ_0 answers", "machine", error=NonFiniteError):
        self_play(RunConfig.load(settings), tmp_path / "r")


def test_a_stop_reaches_the_processes_that_train_and_one_process_goes_on(
    cluster, settings, tmp_path, monkeypatch, capfd
):
    settings["train"] |= {"save_every": 1000, "epochs": 40}
    stop = StopSignal()
    look = ray_engine.RayEngine._look

    def stopping(self):
        counts = look(self)
        if counts.get("training"):
            stop.signal_number = signal.SIGTERM
        return counts

    monkeypatch.setattr(ray_engine.RayEngine, "_look", stopping)
    with pytest.raises(Interrupted):
        self_play(RunConfig.load(settings), tmp_path / "r", stop)
    run = RunDirectory(tmp_path / "r")
    saved = run.iteration(0).last_saved_step()
    assert saved is not None
    assert read_manifest(saved)["processes"] == 2
    step = int(saved.name.rpartition("-")[2])
    assert 0 < step < 120

    settings["launch"] = {}
    copied_without(run, tmp_path / "alone", "iterations/1/training")
    self_play(RunConfig.load(settings), tmp_path / "alone")
    capfd.readouterr()
    self_play(RunConfig.load(settings), tmp_path / "r")
    assert "trained by 2 processes up to the saved step" in capfd.readouterr().err
    found, expected = losses(run), losses(RunDirectory(tmp_path / "alone"))
    assert len(found) == len(expected) == 120
    assert found[: step + 3] == pytest.approx(expected[: step + 3], rel=1e-4)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_the_command_ends_the_servers_that_its_workers_use(
    cluster, settings, tmp_path, number
):
    """The workers are in the middle of a shard, because their servers do not answer."""
    file, config = tmp_path / "pids", tmp_path / "config.yaml"
    stub = f"{sys.executable} {generation_server.__file__} --port {{port}} --model {{model}}"
    server = {"command": f"{stub} --mode hangs --pids {file}"}
    settings["generate"] |= {"backend": "server", "server": server}
    settings["launch"] |= {"address": cluster.address}
    config.write_text(json.dumps(settings))
    command = [sys.executable, "-m", "tpaw", "run", str(config), "-o", str(tmp_path / "r")]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        try:
            pids = waited_for(lambda: file.exists() and file.read_text().split())
            process.send_signal(number)
            began = time.monotonic()
            assert process.wait(60) == (143 if number == signal.SIGTERM else -number)
            # The workers heard of the stop; nobody waited for a server that does not answer.
            assert time.monotonic() - began < ray_engine.SECONDS_TO_CLOSE - 5
        finally:
            process.kill()
    waited_for(lambda: not [pid for pid in pids if Path("/proc", pid).exists()])


def waited_for(condition):
    deadline = time.monotonic() + 90
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found


@pytest.fixture
def engine(cluster, settings, alone, tmp_path):
    """Make an engine over a copy of a run."""
    with contextlib.ExitStack() as stack:

        def make(**launch):
            config = RunConfig.load(settings, {"launch": launch})
            copied_without(alone, tmp_path / "copy")
            run = stack.enter_context(open_run(tmp_path / "copy", config))
            made = ray_engine.RayEngine(config, run, StopSignal())
            stack.callback(made.release)
            return made

        yield make


def test_a_worker_that_died_as_often_as_ray_restarts_it_is_replaced(engine, tmp_path):
    task = ray_driver.DyingTask(str(tmp_path))
    found = engine(workers=1, max_retries=1).do(task, [1, 2, 3], lambda count: None)
    assert sorted(found) == [10, 20, 30]  # the worker died three times


def test_an_unforeseen_error_of_a_worker_arrives_with_its_traceback(engine):
    parts = ("shard 7", "on the machine", "ray_driver.py", "ZeroDivisionError: division by zero")
    with pytest.raises(WorkerError) as caught:
        list(engine().do(ray_driver.FailingTask(), [7], lambda count: None))
    assert all(part in str(caught.value) for part in parts)


def test_a_worker_that_cannot_start_ends_the_run(engine, monkeypatch):
    broken = ray.remote(ray_driver.BrokenWorker)
    monkeypatch.setattr(ray_engine, "SHARD_WORKER", broken)
    with pytest.raises(WorkerError, match=r"did not start(.|\n)*No module named 'nowhere'"):
        list(engine().do(ray_driver.FailingTask(), [7], lambda count: None))


def test_devices_that_a_group_was_given_too_late_are_free_for_the_next_group(cluster):
    others = set(placement_group_table())
    given_up = placement_group([{"CPU": 1}] * 2)
    ray.get(given_up.ready(), timeout=60)
    ray_placement.free_what_is_left(others)  # nobody else waits
    assert placement_group_table(given_up)["state"] == "CREATED"
    wanted = placement_group([{"CPU": 1}] * 2)
    assert not wanted.wait(1)
    ray_placement.free_what_is_left(others)
    ray.get(wanted.ready(), timeout=60)
    assert placement_group_table(given_up)["state"] == "REMOVED"
    remove_placement_group(wanted)


def test_an_unforeseen_error_of_training_arrives_with_its_traceback(
    cluster, settings, alone, tmp_path, monkeypatch
):
    copied_without(alone, tmp_path / "r", "iterations/1/checkpoint", "iterations/1/evaluation")
    settings["launch"] |= {"max_retries": 0}
    group = ray.remote(num_cpus=0)(ray_driver.run_failing_group)
    monkeypatch.setattr(ray_engine, "GROUP", group)
    with pytest.raises(WorkerError, match=r"training of θ_1 failed(.|\n)*ZeroDivisionError"):
        self_play(RunConfig.load(settings), tmp_path / "r")


@pytest.mark.parametrize(
    ("launch", "parts"),
    [
        ({"workers": 3}, ("launch.workers", 3, "2 CPU cores")),
        ({"workers": 2}, ("train.batch_size", 7, "2 processes")),
    ],
)
def test_what_the_cluster_cannot_do_is_refused_beforehand(
    cluster, settings, tmp_path, launch, parts
):
    settings["launch"] |= launch
    settings["train"] |= {"batch_size": 7}
    with refused(*parts):
        self_play(RunConfig.load(settings), tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_a_folder_that_a_machine_does_not_see_is_named(cluster, settings, tmp_path, monkeypatch):
    place = ray_engine.Place

    def elsewhere(config, root, *others):
        return place(config, str(Path(root).with_name("elsewhere")), *others)

    monkeypatch.setattr(ray_engine, "Place", elsewhere)
    with refused("--output", tmp_path / "elsewhere", "shares", error=InputError):
        self_play(RunConfig.load(settings), tmp_path / "r")


def test_a_critic_that_a_worker_fits_is_that_of_one_process(cluster, tmp_path, monkeypatch):
    changes = {
        "iterations": 1,
        "data": {"limit": 32},
        "generate": {"samples": 2, "shard_size": 16},
        "critic": {"steps": 8, "evaluate_every": 4, "heldout": 0.25, "at_chance": "go_on"},
        "train": {"epochs": 1, "batch_size": 16, "weights": "fp32"},
        "evaluate": {},
    }
    runs = []
    for name, launch in (("alone", {}), ("r", {"engine": "ray", "workers": 2})):
        config = RunConfig.load("starter", "critic", changes | {"launch": launch})
        if launch:  # the process of the run fits none
            monkeypatch.setattr(tpaw.pipeline.critic_task, "fit", None)
        self_play(config, tmp_path / name)
        runs.append(RunDirectory(tmp_path / name))
    critics = [run.iteration(0).critic for run in runs]
    for name in ("model.safetensors", "scores.npy"):
        one, other = ((folder / name).read_bytes() for folder in critics)
        assert one == other
    results = [json.loads((folder / "results.json").read_text()) for folder in critics]
    for found in results:
        del found["seconds"]
    assert results[0] == results[1]
    assert results[0]["samples"] == 2
    assert all(run.checkpoint(1).exists() for run in runs)
