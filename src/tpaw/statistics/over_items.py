"""Intervals and tests over per-item outcomes.

Two systems answer the same items, so every test is paired. What is drawn at random is drawn from a
fixed seed: the same outcomes give the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, bootstrap, permutation_test

RESAMPLES = 9_999  # so that the smallest p-value of a drawn test is 2 / 10,000
_ENUMERATED = 20  # up to here all 2^n sign patterns are tried: a million sums
_NUMBERS_AT_ONCE = 1_000_000  # of a resampling; its memory
_SEED = 0


class Interval(NamedTuple):
    """A 95 % confidence interval."""

    low: float
    high: float


class McNemar(NamedTuple):
    """Exact McNemar test of two systems on the same items.

    Attributes:
        only_first: items that the first system alone got right.
        only_second: items that the second system alone got right.
        p_value: two-sided; 1 where the systems never disagree.
    """

    only_first: int
    only_second: int
    p_value: float


class PairedDifference(NamedTuple):
    """Continuous scores of two systems on the same items.

    Attributes:
        difference: mean of second − first, in the unit of the scores.
        interval_95: of the difference, by bootstrap over items.
        p_value: two-sided, by sign flips; 1 where every item has the same score twice.
    """

    difference: float
    interval_95: Interval
    p_value: float


def wilson_interval(correct: int, count: int) -> Interval:
    """Wilson's score interval of a proportion (count ≥ 1)."""
    interval = binomtest(correct, count).proportion_ci(confidence_level=0.95, method="wilson")
    return Interval(float(interval.low), float(interval.high))


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> McNemar:
    """Compare outcomes item by item; both in the same order of the same items."""
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    discordant = only_first + only_second
    p_value = float(binomtest(only_first, discordant).pvalue) if discordant else 1.0
    return McNemar(only_first, only_second, p_value)


def mean_interval(values: Sequence[float] | NDArray[np.float64]) -> Interval:
    """Interval of a mean over items: BCa bootstrap (Efron 1987), 9,999 resamples.

    Values that are all alike have an interval of no width.

    Raises:
        ValueError: fewer than two values, or one that is not finite.
    """
    data = _finite(values)
    if len(data) < 2:
        raise ValueError(f"{len(data)} value: an interval needs two")
    scale = float(np.abs(data).max())
    if np.ptp(data) <= 1e-9 * scale:  # BCa divides by the spread
        return Interval(float(data.mean()), float(data.mean()))
    found = bootstrap(
        (data / scale,),  # the third power of a tiny spread would be 0
        np.mean,
        n_resamples=RESAMPLES,
        batch=max(1, _NUMBERS_AT_ONCE // len(data)),
        method="BCa",
        rng=_SEED,
    ).confidence_interval
    return Interval(scale * float(found.low), scale * float(found.high))


def paired_difference(first: Sequence[float], second: Sequence[float]) -> PairedDifference:
    """Compare scores item by item; both in the same order of the same items.

    Raises:
        ValueError: see `mean_interval`; or the lengths differ.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} scores and {len(second)}: not of the same items")
    differences = _finite(second) - _finite(first)
    return PairedDifference(
        float(differences.mean()), mean_interval(differences), sign_flip_p_value(differences)
    )


def sign_flip_p_value(differences: Sequence[float] | NDArray[np.float64]) -> float:
    """Is the mean difference 0? Two-sided permutation test that flips the sign of each difference.

    Exact for up to 20 differences, where all 2^n patterns are tried and no p-value is below 2/2^n;
    beyond that 9,999 patterns are drawn and none is below 2/10,000.

    Raises:
        ValueError: no difference, or one that is not finite.
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
    rounding = 1e-9 * np.abs(data).sum()  # equal sums in another order are equal
    return float(np.mean(np.abs(sums) >= abs(data.sum()) - rounding))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment of a family of p-values, in the order given (Holm 1979).

    The smallest of m is multiplied by m, the next by m − 1, and so on; none gets smaller than the
    one before it, or larger than 1. Rejecting what stays below 0.05 is wrong about any true
    hypothesis of the family with a probability of 0.05 at most, however they depend on each other.

    Raises:
        ValueError: a value outside [0, 1].
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
        raise ValueError("no values")
    if not np.isfinite(data).all():
        raise ValueError(f"{data[~np.isfinite(data)][0]}: values must be finite")
    return data
