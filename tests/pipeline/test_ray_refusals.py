"""What a cluster lacks is said before anything is written. No Ray is started here."""

from __future__ import annotations

import socket
import sys

import pytest
import transformers
from builders import run_settings
from messages import refused

from tpaw.config.schema import RunConfig
from tpaw.pipeline import ray_cluster
from tpaw.pipeline.preflight import read_and_check
from tpaw.runtime.interrupt import StopSignal
from tpaw.runtime.watch import Watch
from tpaw.selfplay import self_play


@pytest.fixture
def settings(model_folder, data_file, heldout_file):
    return run_settings(model_folder, data_file, heldout_file) | {"launch": {"engine": "ray"}}


def test_ray_that_is_not_installed_is_named_with_the_extra(settings, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "tpaw.pipeline.ray_cluster")
    with refused("launch.engine", "ray", "pip install 'tpaw[ray]'"):
        self_play(RunConfig.load(settings), tmp_path / "r")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("kind", ["nobody listens", "no address"])
def test_a_cluster_that_is_not_there_is_named_by_its_address(settings, tmp_path, monkeypatch, kind):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"127.0.0.1:{free.getsockname()[1]}"
    address = nobody if kind == "nobody listens" else "there"
    settings["launch"] |= {"address": address}
    with refused("launch.address", address, "ray start --head", hide={"address": nobody}):
        self_play(RunConfig.load(settings), tmp_path / "r")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("there", "launch", "parts"),
    [
        ({"CPU": 64.0}, {}, ("device", "cuda", "no GPU")),
        ({"CPU": 64.0, "GPU": 8.0}, {"workers": 9}, ("launch.workers", 9, "8 GPUs")),
        (
            {"CPU": 64.0, "GPU": 8.0},
            {"workers": 3, "gpus_per_worker": 4},
            ("launch.workers", 3, "8 GPUs", "launch.gpus_per_worker: 4"),
        ),
    ],
    ids=["no GPU", "too few GPUs", "too few for servers"],
)
def test_gpus_that_the_cluster_lacks_are_counted(settings, monkeypatch, there, launch, parts):
    monkeypatch.setattr(ray_cluster.ray, "cluster_resources", lambda: there)
    settings["launch"] |= launch
    config = RunConfig.load(settings).model_copy(update={"device": "cuda"})
    with refused(*parts):
        ray_cluster.worker_count(config)


@pytest.mark.parametrize(
    ("there", "processes"),
    [({"CPU": 2.0}, 2), ({"CPU": 4.0, "GPU": 4.0}, 4), ({"CPU": 4.0, "GPU": 1.0}, 1)],
    ids=["CPU cores", "GPUs", "one GPU"],
)
def test_split_weights_train_in_one_process(settings, monkeypatch, there, processes):
    monkeypatch.setattr(ray_cluster.ray, "cluster_resources", lambda: there)
    settings["train"] |= {"weights": "split"}
    config = RunConfig.load(settings | {"precision": "bf16"})
    config = config.model_copy(update={"device": "auto"})
    if processes == 1:
        assert ray_cluster.worker_count(config) == 1
        return
    with refused("train.weights: split", processes, "fp32", "launch.workers"):
        ray_cluster.worker_count(config)


def test_without_bitsandbytes_nothing_is_written(settings, tmp_path, monkeypatch):
    def absent(requirement):
        if requirement.startswith("bitsandbytes"):
            raise ImportError(f"no {requirement}")

    monkeypatch.setattr(transformers.utils.versions, "require_version", absent)
    settings["model"] |= {"adapter": {}, "quantization": "nf4"}
    with refused("model.quantization", "tpaw[qlora]"):
        read_and_check(RunConfig.load(settings), tmp_path / "r", Watch(StopSignal()))
    assert not (tmp_path / "r").exists()


def test_all_workers_are_as_many_as_there_are_gpus_for(settings, monkeypatch):
    monkeypatch.setattr(ray_cluster.ray, "cluster_resources", lambda: {"CPU": 3.0, "GPU": 8.0})
    settings["launch"] |= {"gpus_per_worker": 2}
    settings["train"] |= {"batch_size": 16}
    config = RunConfig.load(settings).model_copy(update={"device": "cuda"})
    assert ray_cluster.worker_count(config) == 4
