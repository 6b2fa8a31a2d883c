"""IPO's loss (arXiv 2310.12036) in the loop of SPIN.

With Δ = log π_θ(y|x) − log π_t(y|x), Γ the same of y_gen, and |·| the number of response tokens:

    loss = (Δ / |y| − Γ / |y_gen| − 1 / (2 λ))²

It is TRL's loss `ipo`, which divides by the lengths where the paper's equation 17 does not. Source:
TRL's code. SPACE's paper compares with such a loss, whose details were not read.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tpaw.objectives.base import (
    NamedObjective,
    ObjectiveNeeds,
    ObjectiveOutput,
    PairLogps,
    reward_metrics,
)


class Settings(NamedObjective):
    """IPO's loss, against the newest checkpoint."""

    name: Literal["spin_ipo"] = Field("spin_ipo", description="IPO in SPIN's loop.")
    lambda_: Annotated[float, Field(gt=0, le=1e6)] = Field(
        0.1,
        alias="lambda",
        description="λ > 0: the margin per token goes to 1 ÷ 2λ (TRL calls it beta).",
    )

    needs: ClassVar = ObjectiveNeeds(references="newest")

    def __call__(self, logps: PairLogps) -> ObjectiveOutput:
        """See `Objective`. Rewards are per token."""
        target_B = logps.delta_B / logps.target_tokens_B.clamp(min=1)
        generated_B = logps.gamma_B / logps.generated_tokens_B.clamp(min=1)
        loss_B = (target_B - generated_B - 1 / (2 * self.lambda_)) ** 2
        return ObjectiveOutput(loss_B, reward_metrics(target_B, generated_B))
