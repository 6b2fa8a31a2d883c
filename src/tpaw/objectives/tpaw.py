"""The objective of TPAW (arXiv 2605.09922, equations 2 to 8) as a pure function of log-probs.

For triple (x, y, y_gen) and main players j, with P_j(x, ·) = λ (log π_θ(·|x) − log π_j(·|x)):

    loss = Σ_j β_j · log(1 + exp(−(α_j P_j(x, y) − P_j(x, y_gen))))

Shape suffixes: B triples in a batch, K main players.

The paper's symbols: lambda (λ) scales every implicit reward (DPO and TRL call it beta); the target
weight is α_j, the player weight is β_j, the margin is m_j; eta (η) and gamma (γ) are the sharpness
of the two weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tpaw.objectives.base import ObjectiveNeeds, ObjectiveOutput, PairLogps

TargetWeight = Literal["adaptive", "one"]
PlayerWeight = Literal["softmax", "uniform"]


class TeamLoss(NamedTuple):
    """What `team_loss` returns. Only `loss_B` carries a gradient.

    Attributes:
        loss_B: loss of each triple [8]; its mean over the global batch is the objective.
        target_reward_BK: P_j(x, y), the implicit reward of the target [2].
        generated_reward_BK: P_j(x, y_gen), the implicit reward of the generated response [2].
        margin_BK: m_j, target reward minus generated reward, without the target weight [6].
        target_weight_BK: α_j, eta where the target's reward is not positive, else 1 [4].
        player_weight_BK: β_j, sums to 1 over the players [7].
    """

    loss_B: Tensor
    target_reward_BK: Tensor
    generated_reward_BK: Tensor
    margin_BK: Tensor
    target_weight_BK: Tensor
    player_weight_BK: Tensor


def team_loss(
    policy_target_logps_B: Tensor,
    policy_generated_logps_B: Tensor,
    player_target_logps_BK: Tensor,
    player_generated_logps_BK: Tensor,
    *,
    lambda_: float,
    eta: float,
    gamma: float,
    min_player_weight: float = 0.01,
    target_weight: TargetWeight = "adaptive",
    player_weight: PlayerWeight = "softmax",
) -> TeamLoss:
    """Weighted logistic loss of the policy against a team of main players, per triple.

    Every log-prob is natural, summed over response tokens; float64 is advised, because rewards are
    small differences of large sums. Both weights are constants for the gradient.

    Args:
        policy_target_logps_B: log π_θ(y|x), with gradient.
        policy_generated_logps_B: log π_θ(y_gen|x), with gradient.
        player_target_logps_BK: log π_j(y|x) of every main player.
        player_generated_logps_BK: log π_j(y_gen|x) of every main player.
        lambda_: λ > 0.
        eta: η ≥ 1.
        gamma: γ ≥ 0.
        min_player_weight: player weights below it become 0; at most 1/K, so that one remains.
        target_weight: "adaptive" is [4], "one" switches it off.
        player_weight: "softmax" is [7], "uniform" switches it off.

    Returns:
        The loss and every quantity that it is made of, per triple and player.

    Raises:
        ValueError: a setting outside its range, shapes that do not fit, or a log-prob that is NaN
            or infinite.
    """
    objective = TeamObjective(lambda_, eta, gamma, min_player_weight, target_weight, player_weight)
    _check_logps(
        policy_target_logps_B=policy_target_logps_B,
        policy_generated_logps_B=policy_generated_logps_B,
        player_target_logps_BK=player_target_logps_BK,
        player_generated_logps_BK=player_generated_logps_BK,
    )
    return objective.team_loss(
        policy_target_logps_B,
        policy_generated_logps_B,
        player_target_logps_BK,
        player_generated_logps_BK,
    )


@dataclass(frozen=True)
class TeamObjective:
    """`team_loss` as an `Objective`: the settings are checked once, when it is built.

    Attributes: see the arguments of `team_loss`.

    Raises:
        ValueError: a setting outside its range.
    """

    lambda_: float
    eta: float
    gamma: float
    min_player_weight: float = 0.01
    target_weight: TargetWeight = "adaptive"
    player_weight: PlayerWeight = "softmax"

    def __post_init__(self) -> None:
        _check_settings(
            self.lambda_,
            self.eta,
            self.gamma,
            self.min_player_weight,
            self.target_weight,
            self.player_weight,
        )

    @property
    def needs(self) -> ObjectiveNeeds:
        """The log-probs of every main player."""
        return ObjectiveNeeds(references="team")

    def __call__(self, logps: PairLogps) -> ObjectiveOutput:
        """See `Objective`. Metrics have TRL's names; `…/player_k` is column k of the players."""
        team = self.team_loss(
            logps.policy_target_B,
            logps.policy_generated_B,
            logps.player_target_BK,
            logps.player_generated_BK,
        )
        metrics: dict[str, Tensor] = {}
        for name, value_BK in (
            ("rewards/target", team.target_reward_BK),
            ("rewards/generated", team.generated_reward_BK),
            ("rewards/margins", team.margin_BK),
            ("rewards/accuracies", (team.margin_BK > 0).to(team.margin_BK.dtype)),
        ):
            metrics[name] = value_BK.mean(dim=1)
            for k, value_B in enumerate(value_BK.unbind(dim=1)):
                metrics[f"{name}/player_{k}"] = value_B
        is_weighted_BK = (team.target_weight_BK > 1).to(team.margin_BK.dtype)
        metrics["weights/target"] = is_weighted_BK.mean(dim=1)
        for k, value_B in enumerate(team.player_weight_BK.unbind(dim=1)):
            metrics[f"weights/player_{k}"] = value_B
        return ObjectiveOutput(team.loss_B, metrics)

    def team_loss(
        self,
        policy_target_logps_B: Tensor,
        policy_generated_logps_B: Tensor,
        player_target_logps_BK: Tensor,
        player_generated_logps_BK: Tensor,
    ) -> TeamLoss:
        """`team_loss` without a check of the log-probs, which would wait for the device."""
        K = player_target_logps_BK.shape[1]
        if self.min_player_weight * K > 1:
            raise ValueError(
                f"min_player_weight is {self.min_player_weight}; with {K} players at most 1/{K}"
            )
        target_reward_BK = implicit_reward(
            policy_target_logps_B, player_target_logps_BK, self.lambda_
        )
        generated_reward_BK = implicit_reward(
            policy_generated_logps_B, player_generated_logps_BK, self.lambda_
        )
        margin_BK = (target_reward_BK - generated_reward_BK).detach()  # [6] m_j

        if self.target_weight == "adaptive":
            target_weight_BK = adaptive_target_weight(target_reward_BK.detach(), self.eta)
        else:
            target_weight_BK = torch.ones_like(margin_BK)
        if self.player_weight == "softmax":
            player_weight_BK = adaptive_player_weight(margin_BK, self.gamma, self.min_player_weight)
        else:
            player_weight_BK = torch.full_like(margin_BK, 1.0 / K)

        logit_BK = target_weight_BK * target_reward_BK - generated_reward_BK
        player_loss_BK = -F.logsigmoid(logit_BK)  # [5] log(1 + exp(-t)), which never overflows
        loss_B = (player_weight_BK * player_loss_BK).sum(dim=1)  # [8]
        return TeamLoss(
            loss_B=loss_B,
            target_reward_BK=target_reward_BK.detach(),
            generated_reward_BK=generated_reward_BK.detach(),
            margin_BK=margin_BK,
            target_weight_BK=target_weight_BK,
            player_weight_BK=player_weight_BK,
        )


def implicit_reward(policy_logps_B: Tensor, player_logps_BK: Tensor, lambda_: float) -> Tensor:
    """P_j(x, ·) of every player, shape (B, K) [2]."""
    return lambda_ * (policy_logps_B[:, None] - player_logps_BK)  # [2]


def adaptive_target_weight(target_reward_BK: Tensor, eta: float) -> Tensor:
    """α_j, shape (B, K) [4]. A reward of exactly 0 counts as not positive."""
    one = torch.ones_like(target_reward_BK)
    return torch.where(target_reward_BK <= 0, eta * one, one)  # [4]


def adaptive_player_weight(margin_BK: Tensor, gamma: float, min_player_weight: float) -> Tensor:
    """β_j, shape (B, K): a smaller margin, which is poorer judgment, gets a higher weight [7]."""
    weight_BK = torch.softmax(-gamma * margin_BK, dim=1)  # [7]
    weight_BK = torch.where(weight_BK < min_player_weight, 0.0, weight_BK)
    return weight_BK / weight_BK.sum(dim=1, keepdim=True)


def _check_settings(
    lambda_: float,
    eta: float,
    gamma: float,
    min_player_weight: float,
    target_weight: str,
    player_weight: str,
) -> None:
    # Written as "not (allowed)", so that a NaN setting is refused too.
    if not lambda_ > 0:
        raise ValueError(f"lambda_ is {lambda_}; it must be greater than 0")
    if not eta >= 1:
        raise ValueError(f"eta is {eta}; it must be at least 1")
    if not gamma >= 0:
        raise ValueError(f"gamma is {gamma}; it must be at least 0")
    if not 0 <= min_player_weight < 1:
        raise ValueError(f"min_player_weight is {min_player_weight}; it must be in [0, 1)")
    if target_weight not in ("adaptive", "one"):
        raise ValueError(f"target_weight is {target_weight!r}; it must be 'adaptive' or 'one'")
    if player_weight not in ("softmax", "uniform"):
        raise ValueError(f"player_weight is {player_weight!r}; it must be 'softmax' or 'uniform'")
    if not all(map(math.isfinite, (lambda_, eta, gamma))):
        raise ValueError(f"lambda_ {lambda_}, eta {eta} and gamma {gamma} must be finite")


def _check_logps(**logps: Tensor) -> None:
    B = logps["policy_target_logps_B"].shape[:1]
    K = logps["player_target_logps_BK"].shape[1:2]
    if len(K) != 1 or K[0] == 0:
        shape = tuple(logps["player_target_logps_BK"].shape)
        raise ValueError(f"player_target_logps_BK has shape {shape}; it must be (B, K), K ≥ 1")
    for name, tensor in logps.items():
        expected = (*B, *K) if name.endswith("_BK") else (*B,)
        if tuple(tensor.shape) != expected or not B:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {expected}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} has dtype {tensor.dtype}; log-probs are floating point")
        if not tensor.isfinite().all():
            count = int((~tensor.isfinite()).sum())
            raise ValueError(f"{name} is NaN or infinite in {count} places")
