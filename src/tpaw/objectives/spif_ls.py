"""Least squares on both rewards, as the χ² divergence of SPIF suggests (arXiv 2602.01357).

With Δ = log π_θ(y|x) − log π_t(y|x), and Γ the same of y_gen:

    loss = (λ Δ − c)² + (λ Γ + c)²

The target's reward goes to c, the response's to −c, and both stop there. It is λ² times TRL's loss
`sppo_hard` with beta λ ÷ 2c.

Source: derived from the abstract, which names the divergence and bounded rewards. The loss of the
paper itself was not read. Do not take this for SPIF's own.
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
    """Least squares on both rewards, against the newest checkpoint."""

    name: Literal["spif_ls"] = Field(
        "spif_ls", description="Least squares, derived from SPIF (arXiv 2602.01357)."
    )
    lambda_: Annotated[float, Field(gt=0, le=1e6)] = Field(
        0.1, alias="lambda", description="λ > 0: scale of the rewards (TRL calls it beta)."
    )
    bound: Annotated[float, Field(gt=0, le=1e6)] = Field(
        0.5, description="c > 0: the reward of a target that is told from a response for certain."
    )

    needs: ClassVar = ObjectiveNeeds(references="newest")

    def __call__(self, logps: PairLogps) -> ObjectiveOutput:
        """See `Objective`."""
        target_B = self.lambda_ * logps.delta_B
        generated_B = self.lambda_ * logps.gamma_B
        loss_B = (target_B - self.bound) ** 2 + (generated_B + self.bound) ** 2
        return ObjectiveOutput(loss_B, reward_metrics(target_B, generated_B))
