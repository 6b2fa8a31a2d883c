"""α-SPIN (arXiv 2404.04291): SPIN's loss against a mixture of θ_t and θ_0.

The reference is the geometric mixture π_t^(1−a) π_0^a, whose normaliser cancels:

    loss = −log σ(λ (Δ − Γ)),    Δ = log π_θ(y|x) − (1 − a) log π_t(y|x) − a log π_0(y|x)

and Γ is the same of y_gen. With a = 0 it is SPIN's loss. The opponents are those of the team, so
`team.opponents: {last: h}` is the paper's history of h iterates.

Source: the abstract. The paper itself was not read and has no public code, so which model has the
weight a, and every value, is ours.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from tpaw.objectives.base import (
    NamedObjective,
    ObjectiveNeeds,
    ObjectiveOutput,
    PairLogps,
    reward_metrics,
)


class Settings(NamedObjective):
    """SPIN's loss, with θ_t and θ_0 as one reference."""

    name: Literal["alpha_spin"] = Field("alpha_spin", description="α-SPIN (arXiv 2404.04291).")
    lambda_: Annotated[float, Field(gt=0, le=1e6)] = Field(
        0.1, alias="lambda", description="λ > 0: scale of the rewards (TRL calls it beta)."
    )
    mixture: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5, description="a between 0 and 1: share of θ_0 in the reference."
    )

    needs: ClassVar = ObjectiveNeeds(references="team")

    def __call__(self, logps: PairLogps) -> ObjectiveOutput:
        """See `Objective`. Players are newest first, so θ_0 is the last one."""
        target_B = self.lambda_ * (logps.policy_target_B - self._mixed(logps.player_target_BK))
        generated_B = self.lambda_ * (
            logps.policy_generated_B - self._mixed(logps.player_generated_BK)
        )
        loss_B = -F.logsigmoid(target_B - generated_B)
        return ObjectiveOutput(loss_B, reward_metrics(target_B, generated_B))

    def _mixed(self, player_BK: Tensor) -> Tensor:
        return (1 - self.mixture) * player_BK[:, 0] + self.mixture * player_BK[:, -1]
