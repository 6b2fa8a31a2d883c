"""Log-probs of responses against one float64 sequence at a time."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
from accelerate.utils import send_to_device
from builders import LAYOUTS, logps_of, make_model
from messages import refused
from oracles import expected_logps, ragged_team
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tpaw.logprobs.fused_head
import tpaw.logprobs.response
from tpaw.data.token_ids import token_ids
from tpaw.logprobs.packing import PACKED_LAYOUT, packed_batch, padded_batch
from tpaw.logprobs.prepare import prepare_for_logprobs
from tpaw.logprobs.response import response_logps


@LAYOUTS
@pytest.mark.parametrize("players", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["qwen2", "llama", "gpt2"])
def test_values_and_gradients_equal_the_oracle_on_ragged_rows(kind, players, layout):
    sequences = ragged_team(players, seed=players)
    reference = make_model(kind, seed=players).double()
    expected_S = expected_logps(reference, sequences)
    weights_S = torch.linspace(-1, 1, len(sequences), dtype=torch.float64).to(expected_S.device)
    expected = torch.autograd.grad((weights_S * expected_S).sum(), list(reference.parameters()))

    model = make_model(kind, seed=players)
    assert prepare_for_logprobs(model, 99) == (PACKED_LAYOUT, ())
    logps_S = logps_of(model, layout.collate(sequences))
    assert logps_S.dtype == torch.float64
    assert torch.allclose(logps_S, expected_S, rtol=1e-5, atol=0)
    assert logps_S[players + 2] == 0  # the empty response
    assert logps_S[2 * players + 2] == logps_S[2 * players + 3]  # the one learned by heart
    gradients = torch.autograd.grad((weights_S * logps_S).sum(), list(model.parameters()))
    for found, wanted in zip(gradients, expected, strict=True):
        assert torch.allclose(
            found.double(), wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item()
        )


@LAYOUTS
def test_values_equal_the_oracle_to_the_last_digits_of_float64(layout):
    sequences = ragged_team(3, seed=0)
    model = make_model("llama").double()
    prepare_for_logprobs(model, 99)
    expected_S = expected_logps(make_model("llama").double(), sequences)
    assert torch.allclose(
        logps_of(model, layout.collate(sequences)), expected_S, rtol=1e-12, atol=0
    )


def test_what_lies_beside_a_sequence_changes_nothing():
    model = make_model("llama").double()
    prepare_for_logprobs(model, 99)
    sequences = ragged_team(3, seed=2)
    together = logps_of(model, packed_batch(sequences))
    for rows_of in (packed_batch, padded_batch):
        alone = torch.cat([logps_of(model, rows_of([s])) for s in sequences])
        assert torch.allclose(alone, together, rtol=1e-12, atol=0)


def test_a_sum_and_no_mean_and_no_prompt_tokens():
    model = make_model()
    (prompt, response) = token_ids([1, 2, 3]), token_ids([4, 5, 6, 7])
    one, two = token_ids([4, 5]), token_ids([6, 7])

    def logp(p, r):
        return logps_of(model, padded_batch([(p, r)])).item()

    # The chain rule: log π(ab|x) = log π(a|x) + log π(b|xa).
    chained = logp(prompt, one) + logp(np.concatenate([prompt, one]), two)
    assert logp(prompt, response) == pytest.approx(chained, abs=1e-4)


def test_terms_are_float32_and_their_sum_float64_whatever_the_logits_are():
    class Coin(torch.nn.Module):
        """Two tokens, equally likely, in the type that autocast leaves logits in."""

        def forward(self, input_ids, use_cache):
            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 2, dtype=torch.bfloat16))

    rows = padded_batch([(token_ids([0]), token_ids([1] * 1000))])
    # ln 2 is 0.691 in bf16, and float32 has steps of 6e-5 at 693.
    logp = response_logps(Coin(), rows).item()
    assert logp == pytest.approx(-1000 * math.log(2), abs=4e-6)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // 4)
        return result


@LAYOUTS
@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_no_tensor_is_as_large_as_the_logits(kind, layout, monkeypatch):
    V, H, C = 5000, 32, 16
    monkeypatch.setattr(tpaw.logprobs.fused_head, "LOGITS_IN_A_CHUNK", C * V)
    model = make_model(kind, vocab_size=V)
    prepare_for_logprobs(model, 99)
    sequences = [(token_ids(range(9)), token_ids(range(i, i + 30))) for i in range(8)]
    with Largest() as largest:
        logps_of(model, layout.collate(sequences)).sum().backward()
    assert V * H <= largest.elements <= max(V * H, C * V)  # the head's gradient, or a chunk
    assert largest.elements < 8 * 30 * V / 4


@LAYOUTS
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {"target_modules": "all-linear"}),
        ("llama", {"target_modules": ["lm_head", "q_proj"]}),
        ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
        ("qwen2", {"target_modules": ["embed_tokens", "q_proj"]}),
        ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7, 250]}),
        ("qwen2", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7, 250]}),
    ],
    ids=["all-linear", "head", "embeddings", "tied-embeddings", "tokens", "tied-tokens"],
)
def test_lora_gives_the_plain_log_probs_and_gradients(kind, settings, layout, monkeypatch):
    monkeypatch.setattr(tpaw.logprobs.response, "TOKENS_IN_A_CHUNK", 7)
    sequences = ragged_team(2, seed=5)
    results = []
    for is_oracle in (True, False):
        torch.manual_seed(1)
        model = peft.get_peft_model(
            make_model(kind, seed=5),
            peft.LoraConfig(r=4, init_lora_weights=False, **settings),
        ).double()
        if is_oracle:
            logps_S = expected_logps(model, sequences)
        else:
            assert prepare_for_logprobs(model, 99) == (PACKED_LAYOUT, ())
            logps_S = logps_of(model, layout.collate(sequences))
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert any("lora" in name for name in trained)
        if "trainable_token_indices" in settings:
            assert any("token_adapter" in name for name in trained)
        results.append([logps_S, *torch.autograd.grad(logps_S.sum(), list(trained.values()))])
    for wanted, found in zip(*results, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-6 * wanted.abs().max().item())


def test_a_wrapper_that_rounds_what_the_model_returns_does_not_round_log_probs():
    """FSDP2 does so in mixed precision."""

    class Rounding(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, **inputs):
            output = self.model(**inputs).logits.bfloat16()
            output.register_hook(heard.append)  # as FSDP2 does, to gather weights for backward
            return SimpleNamespace(logits=output)

    heard = []
    model = make_model("llama")
    prepare_for_logprobs(model, 99)
    rows = send_to_device(packed_batch(ragged_team(2, seed=0)), model.device)
    results = []
    for entered in (model, Rounding(model)):
        logps_S = response_logps(entered, rows)
        results.append([logps_S, *torch.autograd.grad(logps_S.sum(), list(model.parameters()))])
    for plain, rounded in zip(*results, strict=True):
        assert torch.equal(plain, rounded)
    assert len(heard) == 1


@LAYOUTS
def test_a_prompt_without_tokens_is_refused(layout):
    with refused(error=ValueError):
        layout.collate([(token_ids([]), token_ids([1, 2]))])
