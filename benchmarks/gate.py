"""Contenders must compute the same thing before their times are compared."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from contender import Settings, Training
from torch import Tensor


class Tolerance(NamedTuple):
    """What rounding may do.

    Attributes:
        loss: largest absolute difference of a step's loss.
        gradient: of the first step, norm of the difference over the norm.
        update: of the weights over all steps, likewise. RMSprop divides by the gradient's size, so
            a weight whose gradient is rounding alone moves as far as any other.
    """

    loss: float
    gradient: float
    update: float


FP32 = Tolerance(loss=2e-5, gradient=1e-4, update=1e-3)
# RMSprop's first step moves each weight by the sign of its gradient. An error of ε in the gradient
# turns a share of arctan(ε)/π of the signs where both are normal, and the update differs by twice
# its root: .25 at 5e-2. Gradients with long tails gave .33 at 3.6e-2 (1.5B parameters).
BF16 = Tolerance(loss=5e-3, gradient=5e-2, update=5e-1)

STEPS = 2


def gate_settings(settings: Settings) -> Settings:
    """Steps that show a difference.

    One batch again and again, so that the order within it does not matter; the learning rate is
    large enough that the second step's loss has left log 2, where DPO begins.
    """
    return replace(settings, learning_rate=1e-5, epochs=STEPS, watch=True)


class GateError(Exception):
    """The contenders differ by more than rounding; no timing was taken."""


def check_equal(
    name: str, ours: Training, theirs: Training, start: Tensor, tolerance: Tolerance
) -> dict[str, float]:
    """Refuse contenders that do not take the same steps.

    Args:
        start: the weights before the first step, in one vector.

    Returns:
        The differences found.

    Raises:
        GateError: they differ.
    """
    if ours.gradient is None or ours.weights is None:
        raise ValueError("ours was not watched")
    if theirs.gradient is None or theirs.weights is None:
        raise ValueError(f"{name} was not watched")
    differences = [abs(a - b) for a, b in zip(ours.losses, theirs.losses, strict=False)]
    same_steps = len(ours.losses) == len(theirs.losses)
    found = Tolerance(
        loss=float(torch.tensor(differences).max()) if same_steps else math.inf,
        gradient=_relative(ours.gradient, theirs.gradient),
        update=_relative(ours.weights - start, theirs.weights - start),
    )
    # Written as "not (allowed)", so that a NaN is refused too.
    wrong = [f for f in found._fields if not getattr(found, f) <= getattr(tolerance, f)]
    if wrong:
        raise GateError(
            f"{name} does not compute what ours does: {found} is beyond {tolerance} in "
            f"{', '.join(wrong)}; losses {ours.losses} and {theirs.losses}. Nothing was timed."
        )
    return found._asdict()


def _relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())
