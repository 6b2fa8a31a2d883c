"""What an objective is: a pure function of log-probs. To add one, write a file beside this one.

Shape suffixes: B triples, K players.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:  # configurations import this file, and must not wait for torch
    from torch import Tensor

References = Literal["none", "newest", "team"]
Kept = Literal["all", "correct", "likeliest"]

SATURATED = 5.0
"""Margin, with λ, from which on a logistic loss has less than 2 % of its first gradient left."""


class ObjectiveNeeds(NamedTuple):
    """Which log-probs an objective reads beside those of the policy on target and response.

    Attributes:
        references: "none", no player is scored; "newest", exactly one player; "team", one or more.
        initial_responses: whether it reads the policy's log-prob of θ_0's response too.
        responses: which are trained on. "all"; "correct", those that are right; "likeliest", of
            each prompt the whole one with the highest log-prob under the newest main player.
        one_response: whether each prompt must have one response of each opponent, not several.
    """

    references: References = "team"
    initial_responses: bool = False
    responses: Kept = "all"
    one_response: bool = False


class PairLogps(NamedTuple):
    """Log-probs of B pairs of a target and a generated response: natural, summed over tokens.

    Attributes:
        policy_target_B, policy_generated_B: log π_θ(y|x) and log π_θ(y_gen|x), with gradient.
        player_target_BK, player_generated_BK: the same under each player; K = 0 without references.
        target_tokens_B, generated_tokens_B: int64, response tokens.
        policy_initial_B: log π_θ of θ_0's response, with gradient; None unless it is needed.
    """

    policy_target_B: Tensor
    policy_generated_B: Tensor
    player_target_BK: Tensor
    player_generated_BK: Tensor
    target_tokens_B: Tensor
    generated_tokens_B: Tensor
    policy_initial_B: Tensor | None = None

    @property
    def delta_B(self) -> Tensor:
        """Δ = log π_θ(y|x) − log π_t(y|x), against the newest player θ_t."""
        return self.policy_target_B - self.player_target_BK[:, 0]

    @property
    def gamma_B(self) -> Tensor:
        """Γ, the same of the generated response."""
        return self.policy_generated_B - self.player_generated_BK[:, 0]


class ObjectiveOutput(NamedTuple):
    """What an objective returns.

    Attributes:
        loss_B: the loss of each triple, with gradient. Training minimises its mean over the batch.
        metrics: by name, a value for each triple (B,), without gradient; their means are logged.
    """

    loss_B: Tensor
    metrics: Mapping[str, Tensor]


@runtime_checkable
class Objective(Protocol):
    """A loss of each triple as a function of log-probs.

    It checks its settings when it is built. It must not wait for the device (`.item()`, `bool()` of
    a tensor): the trainer checks for NaN once for each batch.
    """

    @property
    def needs(self) -> ObjectiveNeeds:
        """Which log-probs it reads."""
        ...

    def __call__(self, logps: PairLogps) -> ObjectiveOutput:
        """Losses and metrics of B pairs."""
        ...


class NamedObjective(BaseModel):
    """An objective whose fields are the section `objective` of a configuration.

    A file beside this one, or a module outside of the package, has one such class, `Settings`.
    pydantic checks the fields.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    name: str = Field(
        description="The method: a file in tpaw/objectives, such as space, or the dotted name of "
        "a module of your own."
    )

    needs: ClassVar[ObjectiveNeeds]

    def __call__(self, logps: PairLogps) -> ObjectiveOutput:
        """See `Objective`."""
        raise NotImplementedError


def reward_metrics(target_reward_B: Tensor, generated_reward_B: Tensor) -> dict[str, Tensor]:
    """The rewards of target and generated response, and their margin, by TRL's names."""
    target_B, generated_B = target_reward_B.detach(), generated_reward_B.detach()
    margin_B = target_B - generated_B
    return {
        "rewards/target": target_B,
        "rewards/generated": generated_B,
        "rewards/margins": margin_B,
        "rewards/accuracies": (margin_B > 0).to(margin_B.dtype),
    }


class FakeObjective:
    """Raises the log-prob of targets and reports one metric. For tests of whatever trains."""

    def __init__(self, needs: ObjectiveNeeds | None = None) -> None:
        self.needs = needs or ObjectiveNeeds(references="none")

    def __call__(self, logps: PairLogps) -> ObjectiveOutput:
        """See `Objective`."""
        return ObjectiveOutput(
            loss_B=-logps.policy_target_B,
            metrics={
                "fake/players": logps.policy_target_B.detach().new_full(
                    logps.policy_target_B.shape, logps.player_target_BK.shape[1]
                )
            },
        )
