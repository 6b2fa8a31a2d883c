"""One member of a group that scores with one model. It writes what it found to OUT."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from builders import make_model, scorer
from oracles import ragged
from torch.distributed.tensor import DTensor

import tpaw.scoring.score
from tpaw.models.sharding import Member, join_group, shard
from tpaw.scoring.score import score_sequences

SEED, TOKENS_PER_ROW, SEQUENCES = 3, 60, ragged(23, seed=4)


def main():
    torch.set_num_threads(1)
    out, address, rank, size = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    member = Member(rank, size)
    join_group(address, member, "gloo")
    prepared = scorer(make_model(seed=SEED))._replace(member=member)
    whole = sum(p.numel() for p in prepared.model.parameters())
    shard(prepared.model, torch.device("cpu"))
    weights = list(prepared.model.parameters())
    assert all(isinstance(p, DTensor) for p in weights)
    passes, done = [], []
    compute = tpaw.scoring.score.response_logps

    def counting(model, batch, head):
        passes.append(len(batch["distinct_S"]))
        return compute(model, batch, head)

    tpaw.scoring.score.response_logps = counting
    logps = score_sequences(prepared, SEQUENCES, tokens_per_row=TOKENS_PER_ROW, on_done=done.append)
    facts = {
        "logps": [x.hex() for x in logps.tolist()],
        "passes": len(passes),
        "done": sum(done),
        "part": sum(p.to_local().numel() for p in weights) / whole,
    }
    out.write_text(json.dumps(facts))
    torch.distributed.destroy_process_group()
