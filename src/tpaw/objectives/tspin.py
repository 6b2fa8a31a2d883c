"""T-SPIN (arXiv 2601.08198): triplets with θ_0's response, without a reference model.

With ℓ(z) = −log σ(z), equation 7 of the paper:

    loss = ℓ(α (log π_θ(y|x) − log π_θ(y_gen|x))) + β ℓ(α (log π_θ(y_gen|x) − log π_θ(y_0|x)))

y_0 is θ_0's response, generated once. Nothing is scored. The paper sets β to 0 in the first
iteration. There y_gen is y_0, so the second term is the constant β log 2 without a gradient, and
the same β serves all iterations.

Source: the paper, and the PyTorch code in its appendix D.
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
    """T-SPIN's loss: the target before the newest response, and that before θ_0's."""

    name: Literal["tspin"] = Field("tspin", description="T-SPIN (arXiv 2601.08198).")
    alpha: Annotated[float, Field(gt=0, le=1e6)] = Field(
        1.0, description="α > 0: scale of every log-prob."
    )
    beta: Annotated[float, Field(ge=0, le=1e6)] = Field(
        0.1, description="β ≥ 0: weight of the advantage of a response over θ_0's response."
    )

    needs: ClassVar = ObjectiveNeeds(references="none", initial_responses=True)

    def __call__(self, logps: PairLogps) -> ObjectiveOutput:
        """See `Objective`. Rewards are α log π_θ."""
        assert logps.policy_initial_B is not None
        target_B = self.alpha * logps.policy_target_B
        generated_B = self.alpha * logps.policy_generated_B
        initial_B = self.alpha * logps.policy_initial_B
        current_B = target_B - generated_B
        historical_B = generated_B - initial_B
        loss_B = -F.logsigmoid(current_B) - self.beta * F.logsigmoid(historical_B)
        metrics = reward_metrics(target_B, generated_B)
        metrics["rewards/historical_margins"] = historical_B.detach()
        return ObjectiveOutput(loss_B, metrics)
