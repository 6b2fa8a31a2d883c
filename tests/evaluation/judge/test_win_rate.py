"""The win rate and its interval, against hand-computed cases and scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from tpaw.evaluation.judge.match import Judged, Seen
from tpaw.evaluation.judge.outputs import Pair
from tpaw.evaluation.judge.win_rate import clustered_interval, win_rate


def seen(verdict, invalid=None):
    return Seen("key", verdict, invalid)


WIN = Judged("win", (seen("first"), seen("first")))
LOSS = Judged("loss", (seen("second"), seen("second")))
SAME = Judged("tie", None)
NEITHER = Judged("tie", (seen("neither"), seen("neither")))
FIRST_PLACE = Judged("tie", (seen("first"), seen("second")))
HALF = Judged("tie", (seen("second"), seen("neither")))
INVALID = Judged("invalid", (seen("first"), seen(None, "unparsable")))


def pairs(*instructions):
    return [Pair(text, "a", "b") for text in instructions]


def test_counts_by_hand():
    judged = [WIN, WIN, LOSS, SAME, NEITHER, FIRST_PLACE, HALF, INVALID]
    results = win_rate(pairs(*"ppqrstuv"), judged)
    assert results["pairs"] == 8
    assert results["prompts"] == 7
    assert (results["wins"], results["losses"], results["invalid"]) == (2, 1, 1)
    assert results["ties"] == {"identical": 1, "both_orders": 1, "disagreement": 2}
    assert results["disagreements"] == {"always_first_place": 1, "always_second_place": 0}
    assert results["invalid_replies"] == {"unparsable": 1}
    assert results["win_rate"] == pytest.approx((2 + 4 / 2) / 7)
    assert "note" not in results


def test_nothing_valid_is_null_and_says_so():
    results = win_rate(pairs("p", "q"), [INVALID, INVALID])
    assert results["win_rate"] is None
    assert results["interval_95"] is None
    assert "no win rate" in results["note"]


def test_a_pair_a_prompt_is_a_t_interval():
    scores = [1, 1, 0, 0.5, 1, 0.5, 0, 1, 1]
    expected = ttest_1samp([*scores, 1, 1, 0, 0], 0.5).confidence_interval(0.95)
    found = clustered_interval(scores, [str(i) for i in range(9)])
    np.testing.assert_allclose(found, (expected.low, expected.high))


def test_prompts_of_one_size_are_a_t_interval_of_their_means():
    means = [1, 0.5, 0, 1, 0.25, 0.75, 1, 0.5]
    scores = [s for m in means for s in {1: (1, 1, 1, 1), 0: (0, 0, 0, 0)}.get(m, _four(m))]
    expected = ttest_1samp([*means, 1, 1, 0, 0], 0.5).confidence_interval(0.95)
    found = clustered_interval(scores, [str(i // 4) for i in range(32)])
    np.testing.assert_allclose(found, (expected.low, expected.high))
    order = np.random.default_rng(0).permutation(32)
    shuffled = clustered_interval([scores[i] for i in order], [str(i // 4) for i in order])
    np.testing.assert_allclose(shuffled, found)


def _four(mean):
    ones = int(mean * 4)
    return (1,) * ones + (0,) * (4 - ones)


def test_prompts_of_unequal_size_by_the_sandwich_formula():
    """Regression on a constant with clustered errors: (X'X)^-1 B (X'X)^-1 with matrices."""
    scores, clusters = [1, 1, 0.5, 0, 1, 1, 0, 0.5], list("aaabbcde")
    size = len(scores) / 5
    weight = np.array([1.0] * 8 + [size] * 4)
    y = np.array([*scores, 1, 1, 0, 0])
    groups = np.array([*clusters, "+", "++", "-", "--"])
    bread = 1 / weight.sum()
    mean = bread * (weight * y).sum()
    blocks = [(weight * (y - mean))[groups == g] for g in np.unique(groups)]
    meat = sum(np.ones(len(b)) @ np.outer(b, b) @ np.ones(len(b)) for b in blocks)
    error = np.sqrt(9 / 8 * bread * meat * bread)
    low, high = clustered_interval(scores, clusters)
    assert (low + high) / 2 == pytest.approx(mean)
    assert (high - low) / 2 == pytest.approx(2.306004 * error, rel=1e-6)  # t of 8 df


def test_nothing_is_certain():
    for value in (0.0, 0.5, 1.0):
        low, high = clustered_interval([value] * 20, [str(i) for i in range(20)])
        assert low <= value <= high
        assert 0 <= low < high <= 1
    low, high = clustered_interval([1.0], ["p"])
    assert low == 0
    assert high == 1
    few = clustered_interval([1.0] * 20, ["p"] * 20)  # one prompt tells as little as one pair
    assert few == (0, 1)


def test_coverage_where_answers_share_a_prompt():
    rng = np.random.default_rng(0)
    clusters = [str(i) for i in range(60) for _ in range(5)]
    covered = covered_naively = 0
    for _ in range(400):
        # Answers to one prompt agree: the prompt's own rate is 0.2 or 1, on average 0.6.
        rates = np.repeat(rng.choice([0.2, 1.0], 60), 5)
        scores = (rng.random(300) < rates).astype(float).tolist()
        low, high = clustered_interval(scores, clusters)
        covered += low <= 0.6 <= high
        low, high = clustered_interval(scores, [str(i) for i in range(300)])
        covered_naively += low <= 0.6 <= high
    assert 0.92 <= covered / 400 <= 0.98
    assert covered_naively / 400 < 0.88
