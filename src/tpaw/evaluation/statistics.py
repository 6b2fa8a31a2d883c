"""Intervals and tests over per-item outcomes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from scipy.stats import binomtest


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
