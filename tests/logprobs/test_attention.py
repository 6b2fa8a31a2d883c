"""Attention of packed rows: by itself against dense float64, and inside the models that need it."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import transformers
from messages import refused
from oracles import expected_logps

import tpaw.logprobs.attention
from tpaw.data.token_ids import token_ids
from tpaw.logprobs.attention import packed_attention
from tpaw.logprobs.packing import PACKED_LAYOUT, packed_batch
from tpaw.logprobs.prepare import prepare_for_logprobs
from tpaw.logprobs.response import LogprobHead, response_logps

VOCABULARY = 544
ATTENTION = {
    "none": {},
    "window": {"sliding_window": 5},
    "window of one token": {"sliding_window": 1},
    "wide window": {"sliding_window": 500},
    "sinks": {"s_aux": True},
    "sinks and window": {"s_aux": True, "sliding_window": 5},
    "cap": {"softcap": 2.0},
    "cap and window": {"softcap": 2.0, "sliding_window": 5},
}


def sequences_of(prompts, seed=0, longest=60):
    """Three responses to each prompt; with it, the first is short and one is as long as allowed."""
    rng = np.random.default_rng(seed)

    def ids(length):
        return token_ids(rng.integers(0, VOCABULARY, length))

    found = []
    for length in prompts:
        prompt = ids(length)
        for response in (3, longest - length, int(rng.integers(4, longest - length))):
            found.append((prompt, ids(response)))
    return found


def dense_attention(
    query, key, value, rows, scaling, sliding_window=None, s_aux=None, softcap=None
):
    """Every score of the row, token by token in plain words; (1, L, heads, head size)."""
    positions = rows["position_ids_BL"][0].tolist()
    spans = rows["spans"].spans
    L, heads, group = query.shape[2], query.shape[1], query.shape[1] // key.shape[1]
    outputs = []
    for h, at in itertools.product(range(heads), range(L)):
        [span] = [span for span in spans if span.begin <= at < span.end]
        seen = [*range(span.prefix_begin, span.prefix_end), *range(span.begin, at + 1)]
        if sliding_window is not None:
            seen = [i for i in seen if positions[at] - positions[i] < sliding_window]
        scores = key[0, h // group, seen] @ query[0, h, at] * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        exponentials = scores.exp()
        total = exponentials.sum() + (0 if s_aux is None else s_aux[h].exp())
        outputs.append(exponentials / total @ value[0, h // group, seen])
    return torch.stack(outputs).view(heads, L, -1).transpose(0, 1)[None]


def test_a_mask_is_kept_for_its_shape_and_window_alone():
    spans = packed_batch(sequences_of((1,), longest=13))["spans"]
    assert spans.mask(2, 3).tolist() == [[True, True, False], [True, True, True]]
    assert spans.mask(2, 3, window=1).tolist() == [[False, True, False], [False, False, True]]
    assert spans.mask(2, 3, sinks=1).tolist() == [[True, *row] for row in spans.mask(2, 3).tolist()]


def test_under_autocast_the_kernel_gets_one_dtype(monkeypatch):
    """RoPE returns queries and keys in fp32 there, and the values are bf16."""
    seen = []
    monkeypatch.setattr(
        tpaw.logprobs.attention, "_has_kernel", lambda *states: seen.extend(states) or False
    )
    rows = packed_batch(sequences_of((1,), longest=13))
    states = torch.zeros(1, 2, rows["input_ids_BL"].numel(), 8)
    with torch.autocast("cpu", torch.bfloat16):
        packed_attention(None, states, states, states.bfloat16(), None, tpaw_spans=rows["spans"])
    assert [found.dtype for found in seen] == [torch.bfloat16, torch.bfloat16]


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("name", ATTENTION)
def test_packed_attention_and_its_gradients_equal_dense_float64(name, key_heads, monkeypatch):
    monkeypatch.setattr(tpaw.logprobs.attention, "QUERIES_IN_A_PART", 4)
    rows = packed_batch(sequences_of((1, 6), longest=13))
    L = rows["input_ids_BL"].numel()
    torch.manual_seed(0)
    shapes = [(1, heads, L, 8) for heads in (4, key_heads, key_heads)]
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    options = dict(ATTENTION[name])
    if "s_aux" in options:
        options["s_aux"] = torch.randn(4, dtype=torch.float64, requires_grad=True)
        leaves.append(options["s_aux"])
    weights = torch.randn(1, L, 4, 8, dtype=torch.float64)
    expected = dense_attention(*leaves[:3], rows, 0.7, **options)
    found, _ = packed_attention(
        None, *leaves[:3], None, scaling=0.7, tpaw_spans=rows["spans"], **options
    )
    assert found.is_contiguous()  # as transformers' own; JetMoE takes a view of it
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-13)
    for wanted, gradient in zip(
        torch.autograd.grad((weights * expected).sum(), leaves),
        torch.autograd.grad((weights * found).sum(), leaves),
        strict=True,
    ):
        assert torch.allclose(gradient, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["sinks and window", "cap and window"])
def test_scaling_is_by_the_head_size_if_none_is_given(name):
    rows = packed_batch(sequences_of((6,), longest=13))
    states = torch.randn(1, 4, rows["input_ids_BL"].numel(), 16, dtype=torch.float64)
    options = dict(ATTENTION[name])
    if "s_aux" in options:
        options["s_aux"] = torch.randn(4, dtype=torch.float64)
    found, _ = packed_attention(
        None, states, states, states, None, tpaw_spans=rows["spans"], **options
    )
    expected = dense_attention(states, states, states, rows, 1 / 4, **options)
    assert torch.allclose(found, expected)


@pytest.mark.parametrize("window", [None, 1, 5, 500])
def test_the_kernel_for_unequal_lengths_is_asked_for_the_same(window, monkeypatch):
    """By what its documentation says of the lengths, the window and the heads."""

    def varlen_attn(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
        left, right = (math.inf if side == -1 else side for side in window_size)
        outputs = []
        for n in range(len(cu_q) - 1):
            q, k, v = (
                query[cu_q[n] : cu_q[n + 1]],
                *(x[cu_k[n] : cu_k[n + 1]] for x in (key, value)),
            )
            assert len(q) <= max_q
            assert len(k) <= max_k
            # The last query stands at the last key.
            distance = torch.arange(len(k)) - torch.arange(len(k) - len(q), len(k))[:, None]
            hidden = (distance > right) | (distance < -left)
            k, v = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q, k) * scale
            weights = scores.masked_fill(hidden, -math.inf).softmax(dim=2)
            outputs.append(torch.einsum("hqk,khd->qhd", weights, v))
        assert enable_gqa
        return torch.cat(outputs)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    monkeypatch.setattr(tpaw.logprobs.attention, "_has_kernel", lambda query, value: True)
    rows = packed_batch(sequences_of((1, 6), longest=13))
    shapes = [(1, heads, rows["input_ids_BL"].numel(), 8) for heads in (4, 2, 2)]
    states = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    options = {"scaling": 0.7, "sliding_window": window}
    found, _ = packed_attention(None, *states, None, tpaw_spans=rows["spans"], **options)
    assert torch.allclose(found, dense_attention(*states, rows, **options))


@pytest.mark.parametrize(
    "asked",
    [
        {"position_bias": 1.0},
        {"sinks": 1.0},
        {"softcap": 30.0, "s_aux": torch.zeros(2)},
        {"attention_mask": torch.zeros(1, 1, 8, 8)},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_attention_that_packed_rows_do_not_have_is_refused_and_never_left_out(asked):
    rows = packed_batch([(token_ids(range(4)), token_ids(range(5)))])  # 8 tokens
    states = torch.randn(1, 2, 8, 4)
    options = {"attention_mask": torch.ones(1, 1, 1, 1), "tpaw_spans": rows["spans"]}
    packed_attention(None, states, states, states, **options)
    with refused(*asked, error=ValueError):
        packed_attention(None, states, states, states, **options | asked)


TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
LAYERS = {
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
CAPS = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}
# Those whose window or cap or scale kept them from packed rows or from the fused head.
ARCHITECTURES = {
    "mistral": {"sliding_window": 16},
    "mixtral": {"sliding_window": 16, **EXPERTS},
    "qwen2": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    "gemma2": {**LAYERS, **CAPS, "query_pre_attn_scalar": 8},
    "gemma3_text": {**LAYERS, "query_pre_attn_scalar": 8},
    "vaultgemma": {**LAYERS, **CAPS, "query_pre_attn_scalar": 8},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {**LAYERS, "logit_scale": 0.25},
    "gpt_oss": {**LAYERS, **EXPERTS},
    "olmo3": LAYERS,
    "exaone4": LAYERS,
    "ministral": LAYERS,
    "modernbert-decoder": {"local_attention": 32, "layer_types": LAYERS["layer_types"]},
    "granite": {"logits_scaling": 4.0, "attention_multiplier": 0.35},
    "granite_swa": {**LAYERS, "logits_scaling": 3.0, "attention_multiplier": 0.35},
    "jetmoe": {**EXPERTS, "kv_channels": 8},
    "nanochat": {"final_logit_softcapping": 5.0},
}


def architecture(name, **changes):
    """A random model in which windows, sinks and caps matter."""
    config = transformers.AutoConfig.for_model(name, **TINY | ARCHITECTURES[name] | changes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.25)
        elif "sinks" in parameter_name:
            parameter.data.normal_()
    return model


def plain(model):
    """The model by transformers' plainest code, in float64: it shares nothing with packed rows."""
    model.set_attn_implementation("eager")
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    return model.double()


@pytest.mark.parametrize("queries_in_a_part", [7, 128])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_is_packed_with_the_fused_head_and_equals_one_sequence_alone(
    name, queries_in_a_part, monkeypatch
):
    monkeypatch.setattr(tpaw.logprobs.attention, "QUERIES_IN_A_PART", queries_in_a_part)
    sequences = sequences_of((1, 9, 33))
    weights_S = torch.linspace(-1, 1, len(sequences), dtype=torch.float64)
    reference = plain(architecture(name))
    expected_S = expected_logps(reference, sequences)
    wanted = torch.autograd.grad((weights_S * expected_S).sum(), list(reference.parameters()))

    model = architecture(name)
    assert prepare_for_logprobs(model, 60) == (PACKED_LAYOUT, ())
    head = LogprobHead.attached_to(model)
    assert head.module is model.get_output_embeddings()
    logps_S = response_logps(model, packed_batch(sequences))
    head.raise_if_changed()
    tokens_S = torch.tensor([len(response) for _, response in sequences])
    assert ((logps_S - expected_S).abs() / tokens_S).max() <= 1e-5
    found = torch.autograd.grad((weights_S * logps_S).sum(), list(model.parameters()))
    for gradient, expected in zip(found, wanted, strict=True):
        assert (gradient - expected).norm() <= 1.2e-5 * expected.norm() + 1e-8
