"""Signal and noise of gradients, on gradients whose expectation is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tpaw.statistics.gradients import expected_cosine, inner_product, signal_in

P = 50


def noisy(mean, batches, scale, seed):
    rng = np.random.default_rng(seed)
    return mean + scale * rng.normal(size=(batches, P))


def test_products_of_different_batches_by_hand():
    one = np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])
    other = np.array([[1.0, 1.0], [2.0, 0.0], [0.0, 1.0]])
    pairs = [one[i] @ other[j] for i in range(3) for j in range(3) if i != j]
    assert inner_product(one, other) == pytest.approx(sum(pairs) / 6)


def test_the_estimate_is_unbiased():
    mean = np.full(P, 0.1)  # ‖mean‖² is 0.5; the norm of the mean gradient would be 0.5 + 50/8
    found = [inner_product(g, g) for s in range(400) for g in [noisy(mean, 8, 1.0, s)]]
    assert np.mean(found) == pytest.approx(0.5, abs=3 * np.std(found) / 20)


def test_the_cosine_is_that_of_the_expectations():
    rng = np.random.default_rng(0)
    a = rng.normal(size=P)
    b = a + rng.normal(size=P)
    truth = a @ b / math.sqrt((a @ a) * (b @ b))
    one, other = noisy(a, 400, 2.0, 1), noisy(b, 400, 2.0, 2)
    assert expected_cosine(one, other) == pytest.approx(truth, abs=0.03)
    with_noise = [x @ y / math.sqrt((x @ x) * (y @ y)) for x, y in zip(one, other, strict=True)]
    assert np.mean(with_noise) < truth / 2  # a batch's own cosine is much lower


def test_noise_alone_is_not_called_signal():
    p_values = [signal_in(noisy(0.0, 8, 1.0, s)).p_value for s in range(200)]
    # Uniform under the null: a twentieth is below 0.05.
    assert 1 / 200 < np.mean([p < 0.05 for p in p_values]) < 0.11
    assert abs(np.mean([signal_in(noisy(0.0, 8, 1.0, s)).share for s in range(200)])) < 0.02


def test_signal_is_found_and_measured():
    found = signal_in(noisy(np.full(P, 1.0), 12, 1.0, 0))
    assert found.p_value == pytest.approx(1 / 2001, abs=2 / 2001)
    assert found.share == pytest.approx(0.5, abs=0.1)  # ‖mean‖² is P, and so is the noise's
    assert found.batches == 12
    assert math.isnan(expected_cosine(np.zeros((3, P)), np.ones((3, P))))


def test_a_few_large_coordinates_do_not_hide_the_signal_of_the_others():
    scale = np.ones(P)
    scale[:2] = 300.0  # noise alone
    mean = np.full(P, 0.5)
    mean[:2] = 0.0
    p_values = [signal_in(noisy(mean, 12, scale, s)).p_value for s in range(20)]
    assert np.mean([p < 0.01 for p in p_values]) > 0.8
    nothing = [signal_in(noisy(0.0, 12, scale, s)).p_value for s in range(200)]
    assert np.mean([p < 0.05 for p in nothing]) < 0.11
