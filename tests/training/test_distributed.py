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
from distributed_driver import losses
from fork_server import Forked


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Losses with rows of 60 tokens, which hold two triples or so."""
    found = losses(tmp_path_factory.mktemp("one"), per_device_train_batch_size=8)
    assert len(found) == 10  # 33 triples in batches of 8, twice
    return found


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


def by_torchrun(folder, count, **options):
    """The same again, started as people start it."""
    out = folder / "losses.json"
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(count), "distributed_driver.py", str(out)),
            json.dumps(options),
        ],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
        timeout=120,
    )
    return json.loads(out.read_text())


def assert_same_steps(found, expected, tolerance=1e-5):
    assert len(found) == len(expected)
    assert np.allclose(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("tokens_per_row", [1, 130, 10_000])
def test_packing_does_not_change_a_step(one_process, tmp_path, tokens_per_row):
    found = losses(tmp_path, per_device_train_batch_size=8, tokens_per_row=tokens_per_row)
    assert_same_steps(found, one_process)


def test_accumulation_does_not_change_a_step(one_process, tmp_path):
    found = losses(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert_same_steps(found, one_process)


@pytest.mark.process
@pytest.mark.usefixtures("forks")
def test_two_processes_in_mixed_precision_stay_close(tmp_path):
    settings = {"bf16": True, "per_device_train_batch_size": 4, "fsdp": True, "dtype": "float32"}
    found = of_processes(tmp_path, 2, **settings)
    expected = losses(tmp_path, bf16=True, per_device_train_batch_size=8, dtype=torch.float32)
    assert_same_steps(found[:2], expected[:2], tolerance=2e-2)


@pytest.mark.process
@pytest.mark.usefixtures("forks")
@pytest.mark.parametrize(
    ("start", "options"),
    [
        (by_torchrun, {"per_device_train_batch_size": 4}),
        (
            of_processes,
            {
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 2,
                "tokens_per_row": 1,
            },
        ),
        (of_processes, {"per_device_train_batch_size": 4, "fsdp": True}),
    ],
    ids=["ddp", "ddp-accumulating", "fsdp2"],
)
def test_two_processes_do_not_change_a_step(one_process, tmp_path, start, options):
    assert_same_steps(start(tmp_path, 2, **options), one_process)


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
