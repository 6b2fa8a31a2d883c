"""The check of an iteration's first step: the policy is the player that it starts as.

Before the first update log π_θ and log π_j of that player are equal, so their difference is
rounding alone. A wrong template, mask, dtype or checkpoint makes it larger.

Shape suffixes: B triples in a micro-batch, K players.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Nats per token. On a CPU rounding gives 1e-8 in fp32 and 4e-5 in bf16 (docs/log.md). A GPU chooses
# kernels by the shape of the batch, so there is room above that. A wrong template, mask or
# checkpoint gives 0.1 and more.
FIRST_STEP_TOLERANCE: Mapping[str, float] = {"fp32": 1e-4, "bf16": 2e-2}


def is_untouched(step: int, lr_scheduler: Any) -> bool:
    """Whether the weights are still those that training began with.

    They are before the first update, and before the second if warm-up makes the first one at a
    learning rate of 0. A function of the step alone, so that resuming changes nothing.
    """
    rates: Any = getattr(lr_scheduler, "lr_lambdas", None)
    first_rate_is_zero = rates is not None and rates[0](0) == 0
    return bool(step <= int(first_rate_is_zero))


def difference_per_token(policy_logps: Tensor, player_logps: Tensor, tokens: Tensor) -> Tensor:
    """Mean |log π_θ − log π_j| in nats per token, a scalar on the device; NaN becomes infinity."""
    difference = (policy_logps - player_logps).detach().abs().sum() / tokens.sum().clamp(min=1)
    return difference.nan_to_num(nan=torch.inf)


def with_policy_in_column(player_logps_BK: Tensor, policy_logps_B: Tensor, column: int) -> Tensor:
    """The players' log-probs with the policy's own in one column.

    The rewards of that player are then exactly 0, as they are in exact arithmetic. Equation 4 asks
    for their sign, which rounding would decide otherwise.
    """
    replaced_BK = player_logps_BK.clone()
    replaced_BK[:, column] = policy_logps_B.detach()
    return replaced_BK
