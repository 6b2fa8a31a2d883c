"""Processes that hold one model together give the log-probs of one process, to the bit."""

from __future__ import annotations

import json
import socket

import pytest
from builders import make_model, score
from fork_server import Forked
from sharding_driver import SEED, SEQUENCES, TOKENS_PER_ROW

import tpaw.scoring.score

pytestmark = [pytest.mark.process, pytest.mark.cpu, pytest.mark.usefixtures("forks")]


@pytest.mark.parametrize("size", [2, 3])
def test_a_sharded_model_gives_the_log_probs_of_a_whole_one(tmp_path, monkeypatch, size):
    passes = []
    compute = tpaw.scoring.score.response_logps

    def counting(*arguments):
        passes.append(arguments)
        return compute(*arguments)

    monkeypatch.setattr(tpaw.scoring.score, "response_logps", counting)
    expected = score(make_model(seed=SEED), SEQUENCES, tokens_per_row=TOKENS_PER_ROW)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    members = [
        Forked(
            "sharding_driver:main",
            *(tmp_path / f"{rank}.json", address, str(rank), str(size)),
            out=tmp_path / f"{rank}.txt",
        )
        for rank in range(size)
    ]
    for member in members:
        assert member.wait(timeout=120) == 0, member.out.read_text()
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(size)]
    for facts in found:
        assert facts["logps"] == [x.hex() for x in expected.tolist()]
        assert facts["done"] == len(SEQUENCES)
        assert 0.9 / size < facts["part"] < 1.2 / size
        assert facts["passes"] == -(-len(passes) // size)  # each computes its part of them
    assert len(passes) % size != 0  # so the last turn has too few
