"""A few steps of TeamTrainer: one of the processes that write OUT, with OPTIONS as JSON."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from builders import PAPER, arguments, make_model, score, team_rows
from torch.distributed.tensor import DTensor

import tpaw.training.trainer
from tpaw.errors import TpawError
from tpaw.logprobs.response import response_logps
from tpaw.objectives.tpaw import TeamObjective
from tpaw.training.trainer import TeamTrainer


def rows_with_players(count=11):
    """Triples of three opponents with their log-probs under two float64 players."""
    rows = team_rows(count, 3)
    for kind in ("target", "generated"):
        sequences = [(row["prompt_ids"], row[f"{kind}_ids"]) for row in rows]
        of_players = [
            score(
                make_model("llama", seed).double(),
                sequences,
                tokens_per_row=500,
            )
            for seed in (1, 2)
        ]
        for row, *logps in zip(rows, *of_players, strict=True):
            row[f"player_{kind}_logps"] = logps
    return rows


def turn_fsdp_on(args, expected=DistributedType.MULTI_CPU):
    """Let accelerate take the processes for those of GPUs: on CPUs it uses DDP instead of FSDP.

    Device, backend and everything that runs stay those of a CPU.
    """
    assert args.device.type == "cpu"  # sets the state up
    assert PartialState._shared_state["distributed_type"] == expected
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


class UpdatingInOneCall(TeamTrainer):
    """Updates all weights in one call, as torch does on CUDA; on CPUs it goes weight by weight."""

    def create_optimizer(self, model=None):
        optimizer = super().create_optimizer(model)
        for group in optimizer.param_groups:
            assert group["foreach"] is None
            group["foreach"] = True
        return optimizer


def losses(
    folder,
    *,
    fsdp=False,
    foreach=False,
    dtype=torch.float64,
    tokens_per_row=60,
    save=False,
    **changes,
):
    """Loss, gradient norm and one metric of every step: 33 triples in batches of 8, twice."""
    if fsdp:
        layers = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        changes |= {"fsdp": True, "fsdp_config": layers}
    args = arguments(folder, **({"num_train_epochs": 2, "learning_rate": 1e-2} | changes))
    if fsdp:
        turn_fsdp_on(args)
    trainer = (UpdatingInOneCall if foreach else TeamTrainer)(
        model=make_model("llama", seed=1).to(dtype),
        args=args,
        train_dataset=rows_with_players(),
        processing_class=None,
        objective=TeamObjective(**PAPER),
        tokens_per_row=tokens_per_row,
    )
    trainer.train()
    assert trainer.is_fsdp_enabled == fsdp
    if fsdp:
        kinds = {(type(p.data), p.dtype, p.device.type) for p in trainer.model_wrapped.parameters()}
        assert kinds == {(DTensor, dtype, "cpu")}
        policy = trainer.accelerator.state.fsdp_plugin.mixed_precision_policy
        assert (policy is not None and policy.param_dtype == torch.bfloat16) == args.bf16
    if save:
        trainer.save_model(str(folder / "saved"))
    names = ("loss", "grad_norm", "rewards/target", "logps/generated_per_token")
    return [[line[n] for n in names] for line in trainer.state.log_history if "loss" in line]


class PoisonedOnOneRank(TeamTrainer):
    """On the last rank alone, the policy's log-probs turn NaN or leave the player it starts as."""

    fault = ""

    def compute_loss(self, model, inputs, *args, **kwargs):
        is_faulty = self.accelerator.process_index == self.accelerator.num_processes - 1
        if is_faulty and self.fault == "divergence":
            with torch.no_grad():
                original = response_logps
                tpaw.training.trainer.response_logps = lambda *a: original(*a) * math.nan
        if is_faulty and self.fault == "mismatch":
            inputs = dict(inputs)
            inputs["player_target_logps_BK"] = inputs["player_target_logps_BK"] - 5.0
        return super().compute_loss(model, inputs, *args, **kwargs)


def fail_on_one_rank(folder, fault):
    """The error that training ends with on this rank, and the seconds until then."""
    PoisonedOnOneRank.fault = fault
    trainer = PoisonedOnOneRank(
        model=make_model("llama", seed=1).double(),
        args=arguments(folder, per_device_train_batch_size=4),
        train_dataset=rows_with_players(),
        processing_class=None,
        objective=TeamObjective(**PAPER),
        start_column=0,
        tokens_per_row=60,
    )
    began = time.monotonic()
    try:
        trainer.train()
    except TpawError as error:
        return {
            "error": type(error).__name__,
            "step": trainer.state.global_step,
            "seconds": time.monotonic() - began,
            "processes": trainer.accelerator.num_processes,
        }
    return {"error": None}


def main():
    torch.set_num_threads(1)
    out, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    if "dtype" in options:
        options["dtype"] = getattr(torch, options["dtype"])
    if "fault" in options:
        found = fail_on_one_rank(out.parent, options["fault"])
        rank = torch.distributed.get_rank()
        out.with_name(f"rank-{rank}.json").write_text(json.dumps(found))
    elif (found := losses(out.parent, **options)) and torch.distributed.get_rank() == 0:
        out.write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
