"""GSIL (arXiv 2410.10093): density-ratio estimation between the data and the policy's responses.

With u = α Δ + β and v = α Γ + β, where Δ = log π_θ(y|x) − log π_t(y|x) and Γ is the same of y_gen:

    logistic: −log σ(u) − log σ(−v)
    brier:    (σ(u) − 1)² + σ(v)²
    hinge:    max(0, 1 − u) + max(0, 1 + v)
    kliep:    −u + e^v
    lsif:     −e^u + e^(2v) / 2

Responses are greedy. Source: the authors' code (tengxiao1/GSIL). Its training script asks for the
logistic loss with α 0.01 and β 2, by a name that the trainer of the same commit does not know.
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
    """One of GSIL's losses, against the newest checkpoint."""

    name: Literal["gsil"] = Field("gsil", description="GSIL (arXiv 2410.10093).")
    loss: Literal["logistic", "brier", "hinge", "kliep", "lsif"] = Field(
        "logistic",
        description="Loss of the density ratio. With beta ≥ 1, hinge trains a target only after "
        "it lost more than (beta − 1) ÷ alpha nats.",
    )
    alpha: Annotated[float, Field(gt=0, le=1e6)] = Field(
        0.01, description="α > 0: scale of a log-ratio."
    )
    beta: Annotated[float, Field(ge=-1e6, le=1e6)] = Field(
        2.0, description="β: shift of a scaled log-ratio."
    )

    needs: ClassVar = ObjectiveNeeds(references="newest")

    def __call__(self, logps: PairLogps) -> ObjectiveOutput:
        """See `Objective`. Rewards are α times the log-ratios, without β."""
        target_B = self.alpha * logps.delta_B
        generated_B = self.alpha * logps.gamma_B
        loss_B = self._loss(target_B + self.beta, generated_B + self.beta)
        return ObjectiveOutput(loss_B, reward_metrics(target_B, generated_B))

    def _loss(self, u_B: Tensor, v_B: Tensor) -> Tensor:
        match self.loss:
            case "logistic":
                return -F.logsigmoid(u_B) - F.logsigmoid(-v_B)
            case "brier":
                return (u_B.sigmoid() - 1) ** 2 + v_B.sigmoid() ** 2
            case "hinge":
                return F.relu(1 - u_B) + F.relu(1 + v_B)
            case "kliep":
                return -u_B + v_B.exp()
            case "lsif":
                return -u_B.exp() + (2 * v_B).exp() / 2
