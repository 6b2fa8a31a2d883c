"""SPACE (arXiv 2512.07175): tell the target from the response, each for itself.

With Δ = log π_θ(y|x) − log π_t(y|x), and Γ the same of y_gen:

    loss = −log σ_μ(Δ) − μ log σ_{1/μ}(−Γ),    σ_μ(z) = 1 / (1 + μ e^{−z})

This is noise-contrastive estimation with the newest checkpoint as the noise: σ_μ(Δ) is the
probability that y is real, if there are μ responses for each target. It assumes responses that are
sampled at temperature 1. With μ = 1 it is TRL's loss `bco_pair` with beta 1.

Source: two summaries of the paper, which agree. The paper itself was not read, and it has no public
code.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch.nn import functional as F

from tpaw.objectives.base import (
    NamedObjective,
    ObjectiveNeeds,
    ObjectiveOutput,
    PairLogps,
    reward_metrics,
)


class Settings(NamedObjective):
    """SPACE's loss, against the newest checkpoint."""

    name: Literal["space"] = Field("space", description="SPACE (arXiv 2512.07175).")
    mu: Annotated[float, Field(gt=0, le=1e6)] = Field(
        1.0,
        description="μ > 0: weight of a response beside its target. If each prompt has k "
        "responses, D_O has each target k times, so 1 already gives NCE with k.",
    )

    needs: ClassVar = ObjectiveNeeds(references="newest")

    def __call__(self, logps: PairLogps) -> ObjectiveOutput:
        """See `Objective`."""
        delta_B, gamma_B = logps.delta_B, logps.gamma_B
        # σ_μ(z) = σ(z − log μ), which never overflows.
        log_mu = math.log(self.mu)
        loss_B = -F.logsigmoid(delta_B - log_mu) - self.mu * F.logsigmoid(log_mu - gamma_B)
        return ObjectiveOutput(loss_B, reward_metrics(delta_B, gamma_B))
