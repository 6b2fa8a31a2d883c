"""Self-training: SFT on the newest checkpoint's own responses (STaR, ReST, RFT, sharpening).

    loss = −log π_θ(y_gen|x)

over all responses, over those whose answer is right, or over the likeliest one of each prompt,

    argmax_k log π_t(y_gen,k|x).

The target only says which answer is right. With all responses, sampled at temperature 1, the
expected gradient of the first step is 0.

It goes on from the newest checkpoint and trains on its responses alone. STaR (arXiv 2203.14465) and
RFT (2308.01825) train the base model anew, RFT on the targets too, with repeated responses removed.
The likeliest of k is SFT-Sharpening (2412.01951), where θ_0 judges, and there is one iteration.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tpaw.objectives.base import Kept, NamedObjective, ObjectiveNeeds, ObjectiveOutput, PairLogps


class Settings(NamedObjective):
    """The negative log-prob of responses."""

    name: Literal["self_training"] = Field(
        "self_training", description="SFT on the policy's own responses."
    )
    keep: Kept = Field(
        "correct",
        description="Which responses to train on. correct: those that are right, as `checker` "
        "tells. likeliest: for each prompt, the one that the newest checkpoint finds likeliest "
        "(recipe sharpening); truncated responses are never kept.",
    )

    @property
    def needs(self) -> ObjectiveNeeds:  # type: ignore[override]
        """The responses alone that are kept. The newest checkpoint tells which are likeliest."""
        return ObjectiveNeeds("newest" if self.keep == "likeliest" else "none", responses=self.keep)

    def __call__(self, logps: PairLogps) -> ObjectiveOutput:
        """See `Objective`."""
        return ObjectiveOutput(-logps.policy_generated_B, {})
