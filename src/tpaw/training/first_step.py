"""The check of an iteration's first step: the policy is the player that it starts as.

Before the first update log π_θ and log π_j of that player are equal, so their difference is
rounding alone. A wrong template, mask, dtype or checkpoint makes it larger.

Shape suffixes: B triples in a micro-batch, K players.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from tpaw.objectives.base import PairLogps

# Nats per token. On a CPU rounding gives 1e-8 in fp32 and 4e-5 in bf16 (docs/log.md). A GPU chooses
# kernels by the shape of the batch, so there is room above that. A wrong template, mask or
# checkpoint gives 0.1 and more.
FIRST_STEP_TOLERANCE: Mapping[str, float] = {"fp32": 1e-4, "bf16": 2e-2}


def tolerance_for(model: nn.Module, args: TrainingArguments) -> float:
    """The `FIRST_STEP_TOLERANCE` of the precision that a model computes in, in nats per token."""
    half = (torch.bfloat16, torch.float16)
    is_half = args.bf16 or args.fp16 or any(p.dtype in half for p in model.parameters())
    return FIRST_STEP_TOLERANCE["bf16" if is_half else "fp32"]


def is_untouched(step: int, lr_scheduler: Any) -> bool:
    """Whether the weights are still those that training began with.

    They are before the first update, and before the second if warm-up makes the first one at a
    learning rate of 0. A function of the step alone, so that resuming changes nothing.
    """
    rates: Any = getattr(lr_scheduler, "lr_lambdas", None)
    first_rate_is_zero = rates is not None and rates[0](0) == 0
    return bool(step <= int(first_rate_is_zero))


def total_differences(logps: PairLogps) -> tuple[Tensor, Tensor]:
    """Sum of |log π_θ − log π_j| in nats for each player j, (K,), and the number of tokens."""
    differences_BK = (logps.policy_target_B.detach()[:, None] - logps.player_target_BK).abs()
    differences_BK = (
        differences_BK
        + (logps.policy_generated_B.detach()[:, None] - logps.player_generated_BK).abs()
    )
    tokens = logps.target_tokens_B.sum() + logps.generated_tokens_B.sum()
    return differences_BK.sum(dim=0), tokens


def started_as(logps: PairLogps, column: int) -> PairLogps:
    """The log-probs with the policy's own, without gradient, in the column of one player.

    The rewards of that player are then exactly 0, as they are in exact arithmetic. Equation 4 asks
    for their sign, which rounding would decide otherwise.
    """
    target_BK, generated_BK = logps.player_target_BK.clone(), logps.player_generated_BK.clone()
    target_BK[:, column] = logps.policy_target_B.detach()
    generated_BK[:, column] = logps.policy_generated_B.detach()
    return logps._replace(player_target_BK=target_BK, player_generated_BK=generated_BK)
