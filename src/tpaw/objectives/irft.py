"""IRFT (arXiv 2405.17888): SPIN's loss, or its linear form, with responses that are often fresh.

With Δ = log π_θ(y|x) − log π_t(y|x), and Γ the same of y_gen:

    logistic: loss = −log σ(λ (Δ − Γ))        linear: loss = −λ (Δ − Γ)

What differs from SPIN is the loop: each iteration takes the next part of the prompts
(`data.chunks`), so the policy answers anew several times an epoch.

Source: the authors' code (JasonJiaxiangLi/Reward_learning_SFT). Its runs use the logistic form. The
linear one is in a trainer that no script of theirs selects.
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
    """SPIN's loss or its linear form, against the newest checkpoint."""

    name: Literal["irft"] = Field("irft", description="IRFT (arXiv 2405.17888).")
    lambda_: Annotated[float, Field(gt=0, le=1e6)] = Field(
        0.1, alias="lambda", description="λ > 0: scale of the rewards (TRL calls it beta)."
    )
    loss: Literal["logistic", "linear"] = Field(
        "logistic",
        description="logistic: SPIN's loss. linear: minus the margin. It has no lower bound, so "
        "give an iteration few steps.",
    )

    needs: ClassVar = ObjectiveNeeds(references="newest")

    def __call__(self, logps: PairLogps) -> ObjectiveOutput:
        """See `Objective`."""
        target_B = self.lambda_ * logps.delta_B
        generated_B = self.lambda_ * logps.gamma_B
        margin_B = target_B - generated_B
        loss_B = -F.logsigmoid(margin_B) if self.loss == "logistic" else -margin_B
        return ObjectiveOutput(loss_B, reward_metrics(target_B, generated_B))
