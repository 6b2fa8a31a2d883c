"""Statistics over seeds: one number a run, runs of one seed being pairs.

A seed is the unit here, not an item: these intervals say what another run would give, those of
`statistics` what other items would.
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
_ROUNDING = 1e-12  # of the largest score; a smaller spread is none


class OverSeeds(NamedTuple):
    """One method's scores over seeds.

    Attributes:
        seeds: how many.
        mean: in the unit of the scores.
        sd: standard deviation, ddof 1; None with one seed.
        interval_95: of the mean, by Student's t with seeds − 1 degrees of freedom; None with one
            seed, and of no width where all seeds agree.
    """

    seeds: int
    mean: float
    sd: float | None
    interval_95: Interval | None


class SeedDifference(NamedTuple):
    """A method against a baseline over the same seeds.

    Attributes:
        seeds: how many pairs.
        difference: mean of method − baseline, in the unit of the scores.
        sd: standard deviation of the differences, ddof 1; None with one seed.
        interval_95: of the difference, by Student's t; None with one seed.
        g_z: mean over standard deviation of the differences, d_z, times Hedges' correction for
            few seeds. 0 for identical runs; otherwise None with fewer than three seeds, whose
            correction is 0, and where every seed shows the same difference: d_z is infinite.
        t_p_value: paired t-test, two-sided. 1 for identical runs; None with one seed and where
            every seed shows the same difference: there is no spread to test it against, and the
            formula's 0 would be a certainty that nothing supports.
        sign_flip_p_value: exact for up to 20 seeds, two-sided; see `statistics`.
        smallest_p_value: the least that the sign flips could give with so many seeds, 2/2^n.
        note: a sentence on what cannot be said, or None.
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
    """Mean, spread and interval of one method.

    Raises:
        ValueError: no score, or one that is not finite.
    """
    data = _finite(scores)
    spread = _spread(data, float(np.abs(data).max()))
    return OverSeeds(len(data), float(data.mean()), spread, _t_interval(data, spread))


def seed_difference(baseline: Sequence[float], method: Sequence[float]) -> SeedDifference:
    """Compare two methods seed by seed; both in the same order of the same seeds.

    Raises:
        ValueError: the lengths differ, no score, or one that is not finite.
    """
    if len(baseline) != len(method):
        raise ValueError(f"{len(baseline)} scores and {len(method)}: not of the same seeds")
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
            "Every seed shows the same difference: without spread d_z is infinite and there is no "
            "t-test. Check that the seed changes anything."
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
    """J(m) = Γ(m/2) / (√(m/2) Γ((m−1)/2)), exactly (Hedges 1981); 0 for m = 1."""
    half = degrees_of_freedom / 2
    return float(np.exp(gammaln(half) - gammaln(half - 0.5)) / math.sqrt(half))


def smallest_p_value(seeds: int) -> float:
    """The least two-sided p-value of an exact paired test over signs: two patterns of 2^n."""
    return 2.0 ** (1 - seeds)


def too_few_seeds(seeds: int, tests: int = 1) -> str | None:
    """A sentence where so many seeds cannot show anything, or None.

    Args:
        tests: size of the family that Holm's adjustment covers.
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
    """Standard deviation; 0 where only rounding tells the values apart."""
    if len(data) < 2:
        return None
    return float(data.std(ddof=1)) if np.ptp(data) > _ROUNDING * largest else 0.0


def _finite(scores: Sequence[float]) -> NDArray[np.float64]:
    data = np.asarray(scores, dtype=np.float64)
    if not len(data) or not np.isfinite(data).all():
        raise ValueError(f"{list(scores)}: finite scores are needed, and at least one")
    return data
