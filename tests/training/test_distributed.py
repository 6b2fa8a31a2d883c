"""The loss of a step, however it is packed, accumulated and spread over processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import make_model
from distributed_driver import losses
from fork_server import Forked
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Steps and weights with rows of 60 tokens, which hold two triples or so."""
    folder = tmp_path_factory.mktemp("one")
    found = losses(folder, per_device_train_batch_size=8, save=True)
    assert len(found) == 10  # 33 triples in batches of 8, twice
    return found, saved(folder)


def of_processes(folder, count, **options):
    """The same by processes that find each other over gloo, as torchrun sets them up."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    processes = [
        Forked(
            "distributed_driver:main",
            *(folder / "losses.json", json.dumps(options)),
            out=folder / f"rank-{rank}.txt",
            env=meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(count)
    ]
    for process in processes:
        assert process.wait(timeout=120) == 0, process.out.read_text()
    out = folder / "losses.json"
    return json.loads(out.read_text()) if out.exists() else None


def by(*launcher):
    """The same again, started as people start it."""

    def start(folder, count, **options):
        out = folder / "losses.json"
        subprocess.run(
            [
                *(sys.executable, "-m", *launcher, str(count)),
                *("distributed_driver.py", str(out), json.dumps(options)),
            ],
            cwd=Path(__file__).parents[1],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
            check=True,
            timeout=120,
        )
        return json.loads(out.read_text())

    return start


BY_TORCHRUN = by("torch.distributed.run", "--standalone", "--nproc-per-node")
# With --cpu it would start one process. The processes themselves choose the CPU, by `use_cpu`.
BY_ACCELERATE = by(
    *("accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"),
    *("--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"),
    "--num_processes",
)


def saved(folder):
    """Weights that `save_model` wrote."""
    return load_file(folder / "saved" / "model.safetensors")


def assert_same_steps(found, expected, tolerance=1e-5):
    assert len(found) == len(expected)
    assert np.allclose(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("tokens_per_row", [1, 130, 10_000])
def test_packing_does_not_change_a_step(one_process, tmp_path, tokens_per_row):
    found = losses(tmp_path, per_device_train_batch_size=8, tokens_per_row=tokens_per_row)
    assert_same_steps(found, one_process[0])


def test_accumulation_does_not_change_a_step(one_process, tmp_path):
    found = losses(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert_same_steps(found, one_process[0])


@pytest.mark.process
@pytest.mark.cpu
@pytest.mark.usefixtures("forks")
def test_fsdp2_in_mixed_precision_computes_in_bf16_and_moves_fp32_weights(tmp_path):
    """At a learning rate at which no bf16 weight would move."""
    settings = {"bf16": True, "save": True, "learning_rate": 1e-7}
    one, two = tmp_path / "one", tmp_path / "two"
    two.mkdir()
    found = of_processes(
        two, 2, fsdp=True, dtype="float32", per_device_train_batch_size=4, **settings
    )
    expected = losses(one, dtype=torch.float32, per_device_train_batch_size=8, **settings)
    # The policy is its first player for two steps. Then rounding decides the target weights.
    assert_same_steps(found[:2], expected[:2], tolerance=1e-3)
    before = make_model("llama", seed=1).state_dict()
    moved = {name: weight - before[name] for name, weight in saved(two).items()}
    assert all(weight.dtype == torch.float32 for weight in saved(two).values())
    # A step of RMSprop is at most 10 learning rates long.
    assert all(0 < change.abs().max() < len(found) * 10 * 1e-7 for change in moved.values())


@pytest.mark.process
@pytest.mark.usefixtures("forks")
@pytest.mark.parametrize(
    ("start", "options"),
    [
        (BY_TORCHRUN, {"per_device_train_batch_size": 4}),
        (BY_ACCELERATE, {"per_device_train_batch_size": 4}),
        (
            of_processes,
            {
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 2,
                "tokens_per_row": 1,
            },
        ),
        (of_processes, {"per_device_train_batch_size": 4, "fsdp": True, "foreach": True}),
        (
            of_processes,
            {
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 2,
                "tokens_per_row": 1,
                "fsdp": True,
            },
        ),
    ],
    ids=[
        "ddp-torchrun",
        "ddp-accelerate-launch",
        "ddp-accumulating",
        "fsdp2-foreach",
        "fsdp2-accumulating",
    ],
)
def test_two_processes_do_not_change_a_step(one_process, tmp_path, start, options):
    steps, weights = one_process
    assert_same_steps(start(tmp_path, 2, save=True, **options), steps)
    for name, weight in saved(tmp_path).items():
        assert float((weight - weights[name]).norm()) < 1e-5 * float(weights[name].norm())


@pytest.mark.process
@pytest.mark.usefixtures("forks")
@pytest.mark.parametrize(
    ("fault", "error"), [("divergence", "DivergenceError"), ("mismatch", "PolicyMismatchError")]
)
def test_what_fails_on_one_rank_ends_on_both_in_seconds(tmp_path, fault, error):
    of_processes(tmp_path, 2, fault=fault)
    for rank in (0, 1):
        found = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert (found["error"], found["step"], found["processes"]) == (error, 0, 2)
        assert found["seconds"] < 30
