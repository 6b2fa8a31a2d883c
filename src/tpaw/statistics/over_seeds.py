"""Statistics over seeds: each run gives one score, and runs with the same seed form a pair.

The unit is a seed, not an item. The intervals in this file say what other seeds would give. The
intervals in `over_items.py` say what other items would give.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln
from scipy.stats import t as student
from scipy.stats import ttest_1samp

from tpaw.statistics.over_items import Interval, sign_flip_p_value

ALPHA = 0.05
_ROUNDING = 1e-12  # relative to the largest score; a smaller spread counts as 0


class OverSeeds(NamedTuple):
    """Scores of one method over seeds.

    Attributes:
        seeds: number of seeds.
        mean: in the unit of the scores.
        sd: standard deviation with ddof 1; None for one seed.
        interval_95: interval of the mean, by Student's t with seeds − 1 degrees of freedom. None
            for one seed; its width is 0 if all scores are equal.
    """

    seeds: int
    mean: float
    sd: float | None
    interval_95: Interval | None


class SeedDifference(NamedTuple):
    """Comparison of a method with a baseline over the same seeds.

    Attributes:
        seeds: number of pairs.
        difference: mean of method − baseline, in the unit of the scores.
        sd: standard deviation of the differences with ddof 1; None for one seed.
        interval_95: interval of the difference, by Student's t; None for one seed.
        g_z: effect size: d_z (mean / standard deviation of the differences) times Hedges'
            correction for few seeds. 0 if the runs are identical. Otherwise None for fewer than
            three seeds, because the correction is then 0, and None if all differences are equal,
            because d_z is then infinite.
        t_p_value: two-sided paired t-test. 1 if the runs are identical. None for one seed, and None
            if all differences are equal: the test has no spread to compare with, and a p-value of 0
            would claim too much.
        sign_flip_p_value: two-sided; exact for up to 20 seeds. See `over_items.sign_flip_p_value`.
        smallest_p_value: the smallest possible p-value of an exact sign-flip test, 2/2^n.
        note: a warning about what the numbers cannot show, or None.
    """

    seeds: int
    difference: float
    sd: float | None
    interval_95: Interval | None
    g_z: float | None
    t_p_value: float | None
    sign_flip_p_value: float
    smallest_p_value: float
    note: str | None


def over_seeds(scores: Sequence[float]) -> OverSeeds:
    """Compute mean, standard deviation and interval of one method.

    Args:
        scores: one score for each seed.

    Raises:
        ValueError: there is no score, or one is not finite.
    """
    data = _finite(scores)
    spread = _spread(data, float(np.abs(data).max()))
    return OverSeeds(len(data), float(data.mean()), spread, _t_interval(data, spread))


def seed_difference(baseline: Sequence[float], method: Sequence[float]) -> SeedDifference:
    """Compare a method with a baseline.

    Args:
        baseline, method: one score for each seed, in the same order of the same seeds.

    Raises:
        ValueError: the lengths differ, there is no score, or one is not finite.
    """
    if len(baseline) != len(method):
        raise ValueError(
            f"{len(baseline)} scores and {len(method)}: not of the same seeds; "
            "give one score of each method for each seed"
        )
    first, second = _finite(baseline), _finite(method)
    data = second - first
    seeds, mean = len(data), float(data.mean())
    largest = float(max(np.abs(first).max(), np.abs(second).max()))
    if np.abs(data).max() <= _ROUNDING * largest:
        data, mean = np.zeros(seeds), 0.0
    sd = _spread(data, largest)
    g_z = t_p_value = None
    notes = [sentence] if (sentence := too_few_seeds(seeds)) else []
    if seeds > 1 and mean == 0 == sd:
        g_z, t_p_value = 0.0, 1.0
    elif sd == 0:
        notes.append(
            "All seeds show the same difference, so d_z is infinite and there is no t-test. "
            "Check that the seed changes the run."
        )
    elif sd is not None:
        g_z = mean / sd * hedges_correction(seeds - 1) if seeds > 2 else None
        t_p_value = float(ttest_1samp(data, 0.0).pvalue)
    return SeedDifference(
        seeds,
        mean,
        sd,
        _t_interval(data, sd),
        g_z,
        t_p_value,
        sign_flip_p_value(data),
        smallest_p_value(seeds),
        " ".join(notes) or None,
    )


def hedges_correction(degrees_of_freedom: int) -> float:
    """Compute Hedges' correction J(m) = Γ(m/2) / (√(m/2) Γ((m−1)/2)) exactly (Hedges 1981).

    Args:
        degrees_of_freedom: m.

    Returns:
        A factor below 1; 0 for m = 1.
    """
    half = degrees_of_freedom / 2
    return float(np.exp(gammaln(half) - gammaln(half - 0.5)) / math.sqrt(half))


def smallest_p_value(seeds: int) -> float:
    """Return the smallest possible two-sided p-value of an exact sign-flip test.

    It is 2/2^n, because at least two of the 2^n patterns are as extreme as the observed one.
    """
    return 2.0 ** (1 - seeds)


def too_few_seeds(seeds: int, tests: int = 1) -> str | None:
    """Return a warning if no exact test can reach 0.05 with this number of seeds, else None.

    Args:
        seeds: number of seeds.
        tests: number of tests that Holm's correction covers.
    """
    if seeds == 1:
        return "1 seed: nothing is known of the spread between runs, so no difference can be told."
    least = min(1.0, tests * smallest_p_value(seeds))
    if least <= ALPHA:
        return None
    needed = math.ceil(math.log2(2 * tests / ALPHA))
    family = f" after Holm over {tests} tests" if tests > 1 else ""
    return (
        f"{seeds} seeds: no exact paired test can go below p = {least:.4g}{family}, whatever the "
        f"runs show; {needed} seeds could."
    )


def _t_interval(data: NDArray[np.float64], sd: float | None) -> Interval | None:
    if sd is None:
        return None
    mean, seeds = float(data.mean()), len(data)
    half = float(student.ppf(0.975, seeds - 1)) * sd / math.sqrt(seeds)
    return Interval(mean - half, mean + half)


def _spread(data: NDArray[np.float64], largest: float) -> float | None:
    """Compute the standard deviation; 0 if the values differ only by rounding."""
    if len(data) < 2:
        return None
    return float(data.std(ddof=1)) if np.ptp(data) > _ROUNDING * largest else 0.0


def _finite(scores: Sequence[float]) -> NDArray[np.float64]:
    data = np.asarray(scores, dtype=np.float64)
    if not len(data) or not np.isfinite(data).all():
        raise ValueError(f"{list(scores)}: finite scores are needed, at least one")
    return data
