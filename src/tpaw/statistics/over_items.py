"""Confidence intervals and tests over items.

Both systems are evaluated on the same items, so every test is paired. Resampling uses a fixed seed,
so the same scores always give the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, bootstrap, permutation_test

RESAMPLES = 9_999  # the smallest p-value of a resampling test is then 2 / 10,000
# Up to this many items, the sign-flip test enumerates all 2^n patterns: about a million sums.
_ENUMERATED = 20
_NUMBERS_AT_ONCE = 1_000_000  # of one batch of resampling; limits its memory
_SEED = 0


class Interval(NamedTuple):
    """A 95 % confidence interval."""

    low: float
    high: float


class McNemar(NamedTuple):
    """Result of the exact McNemar test of two systems on the same items.

    Attributes:
        only_first: number of items that only the first system solved.
        only_second: number of items that only the second system solved.
        p_value: two-sided; 1 if the systems never disagree.
    """

    only_first: int
    only_second: int
    p_value: float


class PairedDifference(NamedTuple):
    """Comparison of the continuous scores of two systems on the same items.

    Attributes:
        difference: mean of second − first, in the unit of the scores.
        interval_95: bootstrap interval of the difference, over items.
        p_value: two-sided, by the sign-flip test; 1 if both systems have equal scores on all items.
    """

    difference: float
    interval_95: Interval
    p_value: float


def wilson_interval(correct: int, count: int) -> Interval:
    """Compute the 95 % Wilson score interval of a proportion.

    Args:
        correct: number of successes.
        count: number of trials, at least 1.

    Returns:
        An interval within [0, 1].
    """
    interval = binomtest(correct, count).proportion_ci(confidence_level=0.95, method="wilson")
    return Interval(float(interval.low), float(interval.high))


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> McNemar:
    """Compare the right-or-wrong outcomes of two systems.

    Args:
        first, second: one outcome for each item, in the same order of the same items.
    """
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    discordant = only_first + only_second
    p_value = float(binomtest(only_first, discordant).pvalue) if discordant else 1.0
    return McNemar(only_first, only_second, p_value)


def mean_interval(values: Sequence[float] | NDArray[np.float64]) -> Interval:
    """Compute the 95 % interval of a mean by BCa bootstrap (Efron 1987) with 9,999 resamples.

    If all values are equal, the interval has width 0.

    Args:
        values: one value for each item.

    Returns:
        The interval, in the unit of the values.

    Raises:
        ValueError: there are fewer than two values, or a value is not finite.
    """
    data = _finite(values)
    if len(data) < 2:
        raise ValueError(f"{len(data)} value: an interval needs two or more")
    scale = float(np.abs(data).max())
    if np.ptp(data) <= 1e-9 * scale:  # BCa divides by the spread, which is 0 here
        return Interval(float(data.mean()), float(data.mean()))
    found = bootstrap(
        (data / scale,),  # without the scale, the third power of a tiny spread underflows to 0
        np.mean,
        n_resamples=RESAMPLES,
        batch=max(1, _NUMBERS_AT_ONCE // len(data)),
        method="BCa",
        rng=_SEED,
    ).confidence_interval
    return Interval(scale * float(found.low), scale * float(found.high))


def paired_difference(first: Sequence[float], second: Sequence[float]) -> PairedDifference:
    """Compare the continuous scores of two systems.

    Args:
        first, second: one score for each item, in the same order of the same items.

    Raises:
        ValueError: the lengths differ, there are fewer than two scores, or a score is not finite.
    """
    if len(first) != len(second):
        raise ValueError(
            f"{len(first)} scores and {len(second)}: not of the same items; "
            "give one score of each system for each item"
        )
    differences = _finite(second) - _finite(first)
    return PairedDifference(
        float(differences.mean()), mean_interval(differences), sign_flip_p_value(differences)
    )


def sign_flip_p_value(differences: Sequence[float] | NDArray[np.float64]) -> float:
    """Test whether the mean difference is 0. The test flips the sign of each difference.

    Up to 20 differences the test is exact: it enumerates all 2^n sign patterns, and the smallest
    possible p-value is 2/2^n. For more differences it samples 9,999 patterns, and the smallest
    possible p-value is 2/10,000.

    Args:
        differences: one difference for each item.

    Returns:
        The two-sided p-value.

    Raises:
        ValueError: there is no difference, or one is not finite.
    """
    data = _finite(differences)
    if len(data) > _ENUMERATED:
        found = permutation_test(
            (data,),
            np.mean,
            permutation_type="samples",
            n_resamples=RESAMPLES,
            batch=max(1, _NUMBERS_AT_ONCE // len(data)),
            rng=_SEED,
        )
        return float(found.pvalue)
    sums = np.zeros(1)
    for difference in data:
        sums = np.concatenate([sums + difference, sums - difference])
    # Two sums of the same numbers in another order may differ by rounding, but must count as equal.
    rounding = 1e-9 * np.abs(data).sum()
    return float(np.mean(np.abs(sums) >= abs(data.sum()) - rounding))


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct a family of p-values by Holm's step-down method (Holm 1979).

    The smallest of m p-values is multiplied by m, the next one by m − 1, and so on. A corrected
    value is never smaller than the one before it and never larger than 1. If all hypotheses with a
    corrected p-value below 0.05 are rejected, the probability of one or more false rejections is at
    most 0.05. The tests may depend on each other in any way.

    Returns:
        The corrected p-values, in the order given.

    Raises:
        ValueError: a value is outside [0, 1].
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    for rank, i in enumerate(order):
        if not 0 <= p_values[i] <= 1:
            raise ValueError(f"{p_values[i]}: a p-value lies in [0, 1]")
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def _finite(values: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    data = np.asarray(values, dtype=np.float64)
    if not len(data):
        raise ValueError("no values; at least one is needed")
    if not np.isfinite(data).all():
        raise ValueError(f"{data[~np.isfinite(data)][0]}: values must be finite")
    return data
