"""A few steps of TeamTrainer: `torchrun distributed_driver.py OUT OPTIONS`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from builders import PAPER, arguments, make_model, team_rows

from tpaw.scoring.score import Precision, score_sequences
from tpaw.training.trainer import TeamTrainer


def rows_with_players(count=11):
    """Triples of three opponents with their log-probs under two float64 players."""
    rows = team_rows(count, 3)
    precision = Precision("cpu", use_bf16=False)
    for kind in ("target", "generated"):
        sequences = [(row["prompt_ids"], row[f"{kind}_ids"]) for row in rows]
        of_players = [
            score_sequences(
                make_model("llama", seed).double(),
                sequences,
                tokens_per_row=500,
                precision=precision,
            )
            for seed in (1, 2)
        ]
        for row, *logps in zip(rows, *of_players, strict=True):
            row[f"player_{kind}_logps"] = logps
    return rows


def losses(folder, *, fsdp=False, dtype=torch.float64, tokens_per_row=60, **changes):
    """Loss, gradient norm and one metric of every step: 33 triples in batches of 8, twice."""
    trainer = TeamTrainer(
        model=make_model("llama", seed=1).to(dtype),
        args=arguments(
            folder,
            num_train_epochs=2,
            learning_rate=1e-2,
            fsdp=fsdp,
            fsdp_config={"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
            if fsdp
            else None,
            **changes,
        ),
        train_dataset=rows_with_players(),
        processing_class=None,
        objective=PAPER,
        tokens_per_row=tokens_per_row,
    )
    trainer.train()
    names = ("loss", "grad_norm", "rewards/target", "logps/generated_per_token")
    return [[line[n] for n in names] for line in trainer.state.log_history if "loss" in line]


if __name__ == "__main__":
    torch.set_num_threads(1)
    out, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    if "dtype" in options:
        options["dtype"] = getattr(torch, options["dtype"])
    found = losses(out.parent, **options)
    if torch.distributed.get_rank() == 0:
        out.write_text(json.dumps(found))
    torch.distributed.destroy_process_group()
