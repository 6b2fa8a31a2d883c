"""Self-training: SFT on the newest checkpoint's own responses (STaR, ReST, RFT).

    loss = −log π_θ(y_gen|x)

over all responses, or over those whose answer is right. Nothing is scored, and the target only says
which answer is right. With all responses, sampled at temperature 1, the expected gradient of the
first step is 0.

It goes on from the newest checkpoint and trains on its responses alone. STaR (arXiv 2203.14465) and
RFT (2308.01825) train the base model anew, RFT on the targets too, with repeated responses removed.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tpaw.objectives.base import NamedObjective, ObjectiveNeeds, ObjectiveOutput, PairLogps


class Settings(NamedObjective):
    """The negative log-prob of responses."""

    name: Literal["self_training"] = Field(
        "self_training", description="SFT on the policy's own responses."
    )
    keep: Literal["all", "correct"] = Field(
        "correct",
        description="Which responses to train on. correct: those that are right, as `checker` "
        "tells.",
    )

    @property
    def needs(self) -> ObjectiveNeeds:  # type: ignore[override]
        """No references; the responses alone that are kept."""
        return ObjectiveNeeds(references="none", correct_responses=self.keep == "correct")

    def __call__(self, logps: PairLogps) -> ObjectiveOutput:
        """See `Objective`."""
        return ObjectiveOutput(-logps.policy_generated_B, {})
