"""The gradients of the first step, against autograd over plain logits."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from builders import make_model, scorer

from tpaw.data.token_ids import TokenSequence, token_ids
from tpaw.probe import gradients
from tpaw.probe.gradients import batch_gradients, first_step


def ragged(count, seed):
    rng = random.Random(seed)

    def ids(low, high):
        return token_ids([rng.randrange(5, 300) for _ in range(rng.randrange(low, high))])

    return [TokenSequence(ids(1, 12), ids(1, 9)) for _ in range(count)]


def plain_gradient(model, batch):
    """∇ of the mean over the batch of the sum of the log-probs of the response."""
    total = 0.0
    for prompt, response in batch:
        ids = torch.tensor([[*prompt.tolist(), *response.tolist()]])
        logps = torch.log_softmax(model(ids).logits[0], -1)
        for place in range(len(prompt), ids.shape[1]):
            total = total + logps[place - 1, ids[0, place]]
    found = torch.autograd.grad(total / len(batch), list(model.parameters()))
    return torch.cat([part.flatten() for part in found]).double().numpy()


def test_gradients_of_ragged_batches_are_those_of_plain_logits():
    batches = [ragged(5, 0), ragged(5, 1), ragged(5, 2)]
    expected = np.stack([plain_gradient(make_model(), batch) for batch in batches])
    done = []
    found = batch_gradients(scorer(make_model()), batches, tokens_per_row=40, on_done=done.append)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    assert sum(done) == 15


def test_a_large_model_shows_a_share_of_each_weight(monkeypatch):
    batches = [ragged(4, 0), ragged(4, 1)]
    whole = batch_gradients(scorer(make_model()), batches, tokens_per_row=100)
    monkeypatch.setattr(gradients, "COORDINATES", whole.shape[1] // 4)
    part = batch_gradients(scorer(make_model()), batches, tokens_per_row=100)
    assert part.shape[1] == pytest.approx(whole.shape[1] / 4, rel=0.02)
    one, other = (
        x[0] @ x[1] / (np.linalg.norm(x[0]) * np.linalg.norm(x[1])) for x in (whole, part)
    )
    assert one == pytest.approx(other, abs=0.1)


def test_the_first_step_is_eta_times_the_targets_less_the_responses():
    rng = np.random.default_rng(0)
    mean = rng.normal(size=30)
    targets = mean + rng.normal(size=(50, 30))
    responses = rng.normal(size=(50, 30))  # the mean of samples' gradients is 0
    found = first_step(targets, responses, eta=6.0)
    step = 6 * targets - responses
    cosines = [
        s @ t / np.linalg.norm(s) / np.linalg.norm(t) for s, t in zip(step, targets, strict=True)
    ]
    assert found.cosine_of_batches == pytest.approx(np.mean(cosines))
    assert found.cosine == pytest.approx(1, abs=0.01)
    assert found.sft.p_value < 0.01 < found.responses.p_value
    ratio = np.sqrt((responses**2).sum() / (36 * (targets**2).sum()))
    assert found.norm_ratio_of_batches == pytest.approx(ratio)
    # Of the expectations 6·mean and mean: the responses have none, so nothing but 6 remains.
    assert found.norm_ratio == pytest.approx(1, abs=0.01)


def test_the_norm_of_the_expected_step_where_responses_have_a_signal():
    rng = np.random.default_rng(1)
    mean = rng.normal(size=30)
    targets = mean + rng.normal(size=(200, 30))
    responses = 3 * mean + rng.normal(size=(200, 30))
    found = first_step(targets, responses, eta=6.0)
    assert found.norm_ratio == pytest.approx(3 / 6, abs=0.01)  # ‖6·mean − 3·mean‖ / ‖6·mean‖
    nothing = first_step(rng.normal(size=(200, 30)) * 0, responses, eta=6.0)
    assert np.isnan(nothing.norm_ratio)
