"""SPIN's loss with log-probs per token.

With Δ = log π_θ(y|x) − log π_t(y|x), Γ the same of y_gen, and |·| the number of response tokens:

    loss = −log σ(λ (Δ / |y| − Γ / |y_gen|))

It is TRL's loss `sigmoid_norm`. Rewards are small, so λ is larger than SPIN's. Source: TRL's code.
"""

from __future__ import annotations

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
    """The logistic loss of margins per token, against the newest checkpoint."""

    name: Literal["spin_norm"] = Field("spin_norm", description="SPIN with log-probs per token.")
    lambda_: Annotated[float, Field(gt=0, le=1e6)] = Field(
        2.0, alias="lambda", description="λ > 0: scale of the rewards (TRL calls it beta)."
    )

    needs: ClassVar = ObjectiveNeeds(references="newest")

    def __call__(self, logps: PairLogps) -> ObjectiveOutput:
        """See `Objective`. Rewards are per token."""
        target_B = self.lambda_ * logps.delta_B / logps.target_tokens_B.clamp(min=1)
        generated_B = self.lambda_ * logps.gamma_B / logps.generated_tokens_B.clamp(min=1)
        loss_B = -F.logsigmoid(target_B - generated_B)
        return ObjectiveOutput(loss_B, reward_metrics(target_B, generated_B))
