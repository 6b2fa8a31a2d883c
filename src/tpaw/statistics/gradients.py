"""Signal and noise in the gradients of batches.

The mean gradient of B batches is the expected gradient plus noise, and its norm holds both.
Products of different batches hold the signal alone, because the noise of two batches is
independent.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# Of the mean scale of the coordinates; coordinates that are nearly 0 stay so.
SMALLEST_SCALE = 0.1
SIGN_FLIPS = 2000


class Signal(NamedTuple):
    """What is signal in the gradients of batches.

    Attributes:
        squared_norm: unbiased estimate of ‖E g‖². It is negative where there is little signal.
        share: of a batch's squared gradient, the part that is signal; at most 1, and about 0 or
            negative where everything is noise.
        p_value: that the sum of gradients with random signs is as large as the sum itself, each
            coordinate on its own scale. Small: the expected gradient is not 0. It is exact if the
            noise is symmetric.
        batches: B.
    """

    squared_norm: float
    share: float
    p_value: float
    batches: int


def inner_product(one_BP: NDArray[np.float64], other_BP: NDArray[np.float64]) -> float:
    """Unbiased estimate of ⟨E a, E b⟩: the mean over pairs of different batches.

    Args:
        one_BP: a gradient for each batch.
        other_BP: the same batches, another gradient.
    """
    batches = len(one_BP)
    products_BB = one_BP @ other_BP.T
    return float((products_BB.sum() - np.trace(products_BB)) / (batches * (batches - 1)))


def expected_cosine(one_BP: NDArray[np.float64], other_BP: NDArray[np.float64]) -> float:
    """Cosine of two expected gradients, without the noise of their estimates.

    It may lie a little outside of [−1, 1]. NaN where one of the two has no signal.
    """
    norms = inner_product(one_BP, one_BP) * inner_product(other_BP, other_BP)
    if inner_product(one_BP, one_BP) <= 0 or norms <= 0:
        return math.nan
    return inner_product(one_BP, other_BP) / math.sqrt(norms)


def expected_norm_ratio(one_BP: NDArray[np.float64], other_BP: NDArray[np.float64]) -> float:
    """‖E a‖ / ‖E b‖, without the noise of their estimates. NaN where one of them has no signal."""
    squares = [inner_product(part, part) for part in (one_BP, other_BP)]
    return math.sqrt(squares[0] / squares[1]) if min(squares) > 0 else math.nan


def signal_in(gradients_BP: NDArray[np.float64], seed: int = 0) -> Signal:
    """How much of the gradients of batches is signal.

    Args:
        gradients_BP: a gradient for each of two or more batches of the same size.
        seed: of the random signs.
    """
    batches = len(gradients_BP)
    squares = float((gradients_BP**2).sum() / batches)
    signal = inner_product(gradients_BP, gradients_BP)
    scaled_BP = _on_one_scale(gradients_BP)
    gram_BB = scaled_BP @ scaled_BP.T
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(SIGN_FLIPS, batches))
    sums = np.einsum("sb,bc,sc->s", signs, gram_BB, signs)
    larger = int((sums >= gram_BB.sum() * (1 - 1e-12)).sum())
    return Signal(
        signal,
        signal / squares if squares > 0 else math.nan,
        (larger + 1) / (SIGN_FLIPS + 1),
        batches,
    )


def _on_one_scale(gradients_BP: NDArray[np.float64]) -> NDArray[np.float64]:
    """Divide each coordinate by its root mean square, nearly as Adam does.

    Otherwise the noise of a few large coordinates hides the signal of all others. Random signs do
    not change a root mean square, so the test stays exact.
    """
    scale_P = np.sqrt((gradients_BP**2).mean(axis=0))
    divisor_P = scale_P + SMALLEST_SCALE * scale_P.mean()
    return gradients_BP / np.where(divisor_P > 0, divisor_P, 1)
