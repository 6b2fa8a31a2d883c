"""Statistics against hand-derived values and scipy."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from messages import refused, says
from scipy import stats

from tpaw.statistics.over_items import holm, mean_interval, paired_difference, sign_flip_p_value
from tpaw.statistics.over_seeds import (
    hedges_correction,
    over_seeds,
    seed_difference,
    smallest_p_value,
    too_few_seeds,
)


def test_holm_by_hand():
    # Sorted: 4 · 0.005, 3 · 0.01, 2 · 0.03, and 0.04 is not less than the one before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.2]) == [0.2]
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([0.02, 0.02]) == pytest.approx([0.04, 0.04])
    assert holm([]) == []


def test_holm_is_closed_testing_with_bonferroni():
    rng = np.random.default_rng(0)
    for size in (2, 3, 5, 6):
        p = rng.beta(0.3, 1, size)
        subsets = [s for k in range(1, size + 1) for s in itertools.combinations(range(size), k)]
        expected = [
            max(min(1.0, len(s) * min(p[j] for j in s)) for s in subsets if i in s)
            for i in range(size)
        ]
        assert holm(list(p)) == pytest.approx(expected)


@pytest.mark.parametrize("wrong", [-0.1, 1.1, math.nan])
def test_holm_refuses_what_is_no_p_value(wrong):
    with refused(wrong, "[0, 1]", error=ValueError):
        holm([0.5, wrong])


def test_sign_flips_by_hand():
    assert sign_flip_p_value([1, 2, 3]) == 2 / 8  # only all + and all - reach 6
    assert sign_flip_p_value([3, -1]) == 1.0  # every |sum| is 2 or 4
    # |sums| of four ones: 4 twice, 2 eight times, 0 six times.
    assert sign_flip_p_value([1, 1, 1, -1]) == 10 / 16
    assert sign_flip_p_value([0.0, 0.0]) == 1.0
    # Rounding tells equal sums of tenths apart; sums of whole numbers it does not.
    whole = [3, -2, 6, -5, 1, 3]
    assert sign_flip_p_value([0.1 * d for d in whole]) == sign_flip_p_value(whole)


def test_sign_flips_are_scipys_exact_test():
    data = np.random.default_rng(1).normal(0.4, 1, 11)
    exact = stats.permutation_test((data,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip_p_value(data) == pytest.approx(exact.pvalue, abs=1e-12)


def test_sign_flips_of_many_ones_are_the_sign_test():
    # Beyond enumeration; the sum of flipped ones is binomial.
    exact = stats.binomtest(10, 30).pvalue
    drawn = sign_flip_p_value([1.0] * 20 + [-1.0] * 10)
    assert drawn == pytest.approx(exact, abs=4 * math.sqrt(exact / 9999))
    assert drawn == sign_flip_p_value([1.0] * 20 + [-1.0] * 10)
    assert sign_flip_p_value([1.0] * 40) == 2 / 10_000
    assert sign_flip_p_value([0.0] * 40) == 1.0


def test_the_bootstrap_of_two_values():
    # Means of a resample: 0, 1/2, 1 with 1/4, 1/2, 1/4; so 2.5 % and 97.5 % are the ends.
    assert mean_interval([0.0, 1.0]) == (0.0, 1.0)


def test_the_bootstrap_of_normal_values_is_the_normal_interval():
    data = np.random.default_rng(2).normal(5, 2, 3000)
    half = 1.96 * data.std() / math.sqrt(3000)
    low, high = mean_interval(data)
    assert low == pytest.approx(data.mean() - half, abs=0.05 * half)
    assert high == pytest.approx(data.mean() + half, abs=0.05 * half)


def test_the_bootstrap_leans_towards_the_long_tail():
    # To second order (Hall 1988) both ends move by skewness · (2z² + 1) / (6 √n) standard errors;
    # plain percentiles move by a third of it.
    data = np.random.default_rng(3).exponential(1, 100)
    low, high = mean_interval(data)
    lean = (low + high - 2 * data.mean()) / (data.std() / 10)
    assert lean == pytest.approx(2 * stats.skew(data) * (2 * 1.96**2 + 1) / 60, abs=0.12)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "values", [[0, 0, 0], [0.3, 0.3], [0] * 500 + [1], [1e-300, 2e-300, 0.0], [1.0, 1.0 + 1e-8]]
)
def test_no_interval_is_nan(values):
    low, high = mean_interval(values)
    assert min(values) <= low <= high <= max(values) + 1e-12
    if len(set(values)) == 1:
        assert (low, high) == (values[0], values[0])


def test_identical_scores_and_a_known_shift():
    scores = np.random.default_rng(4).normal(-3, 2, 200)
    assert paired_difference(scores, scores) == (0.0, (0.0, 0.0), 1.0)
    # Scores vary by 2 and their differences by 0.1: the pairing finds what the means hide.
    noise = np.random.default_rng(5).normal(0, 0.1, 200)
    found = paired_difference(scores, scores + 0.05 + noise)
    assert found.difference == pytest.approx(0.05 + noise.mean())
    expected = stats.t.interval(0.95, 199, 0.05 + noise.mean(), stats.sem(noise))
    assert found.interval_95 == pytest.approx(expected, abs=2e-3)
    assert found.p_value == 2 / 10_000
    back = paired_difference(scores + 0.05 + noise, scores)
    assert back.difference == -found.difference
    assert back.p_value == found.p_value


def test_scores_that_cannot_be_compared():
    with refused(2, 1, error=ValueError):
        paired_difference([1, 2], [1])
    with refused(1, error=ValueError):
        paired_difference([1], [1])
    with refused("nan", error=ValueError):
        paired_difference([1, math.nan], [1, 2])
    with refused(error=ValueError):
        sign_flip_p_value([])


def test_one_method_over_seeds():
    found = over_seeds([1, 2, 3, 4])
    assert found.seeds == 4
    assert found.mean == 2.5
    assert found.sd == pytest.approx(math.sqrt(5 / 3))
    half = 3.182446 * math.sqrt(5 / 3) / 2  # t of 3 degrees of freedom, from a printed table
    assert found.interval_95 == pytest.approx((2.5 - half, 2.5 + half), abs=1e-6)
    assert over_seeds([0.7]) == (1, 0.7, None, None)
    assert over_seeds([0.1 + 0.2, 0.3]).sd == 0.0
    assert over_seeds([0.5] * 6) == (6, 0.5, 0.0, (0.5, 0.5))
    for wrong in ([], [1.0, math.inf]):
        with refused(wrong, error=ValueError):
            over_seeds(wrong)


def test_hedges_correction_by_the_gamma_function():
    # Γ(1/2) = √π, Γ(3/2) = √π/2, Γ(5/2) = 3√π/4.
    root = math.sqrt(math.pi)
    assert hedges_correction(1) == 0.0
    assert hedges_correction(2) == pytest.approx(1 / root)
    assert hedges_correction(4) == pytest.approx(1 / (math.sqrt(2) * root / 2))
    assert hedges_correction(5) == pytest.approx(0.75 * root / math.sqrt(2.5))
    assert hedges_correction(100) == pytest.approx(1 - 3 / (4 * 100 - 1), abs=1e-5)


def test_a_method_against_a_baseline():
    baseline = [50.0, 40, 45, 42, 48, 41]
    method = [score + gain for score, gain in zip(baseline, [1, 2, 3, 4, 5, 6], strict=True)]
    found = seed_difference(baseline, method)
    assert found.difference == 3.5
    assert found.sd == pytest.approx(math.sqrt(3.5))  # 17.5 over 5
    expected = stats.ttest_rel(method, baseline)
    assert found.t_p_value == pytest.approx(expected.pvalue)
    assert found.interval_95 == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert found.g_z == pytest.approx(math.sqrt(3.5) * 0.840749, abs=1e-5)  # d_z = 3.5 / √3.5
    assert found.sign_flip_p_value == found.smallest_p_value == 2 / 64
    assert found.note is None
    opposite = seed_difference(method, baseline)
    assert opposite.g_z == -found.g_z
    assert opposite.t_p_value == pytest.approx(found.t_p_value)


def test_identical_runs_differ_by_nothing():
    found = seed_difference([0.5, 0.6, 0.7, 0.1, 0.2, 0.3], [0.5, 0.6, 0.7, 0.1, 0.1 + 0.1, 0.3])
    assert found == (6, 0.0, 0.0, (0.0, 0.0), 0.0, 1.0, 1.0, 2 / 64, None)
    rounded = seed_difference([0.1 + 0.2, 0.7], [0.3, 0.7])
    assert (rounded.difference, rounded.g_z, rounded.t_p_value) == (0.0, 0.0, 1.0)


def test_the_same_shift_in_every_seed_is_no_certainty():
    found = seed_difference([0.6, 0.7, 0.8, 0.4, 0.5, 0.9], [0.7, 0.8, 0.9, 0.5, 0.6, 1.0])
    assert found.difference == pytest.approx(0.1)
    assert (found.sd, found.g_z, found.t_p_value) == (0.0, None, None)
    assert found.sign_flip_p_value == 2 / 64
    assert "d_z is infinite" in found.note
    json.dumps(found, allow_nan=False)


def test_too_few_seeds_are_said_to_be():
    alone = seed_difference([0.5], [0.9])
    assert alone[1:] == (0.4, None, None, None, None, 1.0, 1.0, too_few_seeds(1))
    says(alone.note, 1)
    pair = seed_difference([0.5, 0.6], [0.6, 0.8])
    assert pair.g_z is None
    assert pair.t_p_value is not None
    assert smallest_p_value(5) == 0.0625
    says(too_few_seeds(5), 5, 0.0625, 6)
    assert too_few_seeds(6) is None
    # 7 · 2/2^6 = 0.21875; 7 · 2/2^8 = 0.0547 is still too much, 7 · 2/2^9 = 0.0273 is not.
    says(too_few_seeds(6, tests=7), 6, 0.2188, 7, 9)
    assert too_few_seeds(8, tests=7) is not None
    assert too_few_seeds(9, tests=7) is None


def test_seeds_that_are_no_pairs():
    with refused(2, 3, error=ValueError):
        seed_difference([1, 2], [1, 2, 3])
