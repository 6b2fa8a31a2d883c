"""Log-probs and how they are read, against one float64 sequence at a time."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
import transformers
from conftest import make_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tpaw.logprobs
import tpaw.token_logps
from tpaw.layout import PACKED_ROWS, PADDED_ROWS, packed_row, padded_rows
from tpaw.logprob_model import prepare
from tpaw.logprobs import HeadChangedError, answer_with_logits, response_logps
from tpaw.packed_attention import packed_attention
from tpaw.token_logps import token_logps
from tpaw.token_table import token_ids

LAYOUTS = pytest.mark.parametrize("layout", [PACKED_ROWS, PADDED_ROWS], ids=["packed", "padded"])


def oracle(model, prompt, response):
    """log π(y|x), one unpadded float64 sequence, token by token; differentiable."""
    ids = torch.tensor([*prompt, *response])[None].long()
    logps = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0], dim=-1)
    total = torch.zeros((), dtype=torch.float64)
    for position, token in enumerate(response, start=len(prompt)):
        total = total + logps[position - 1, int(token)]
    return total


def ragged(count, seed, vocab_size=320, longest=40):
    """Random sequences; among them a prompt of one token and an empty response."""
    rng = np.random.default_rng(seed)
    sizes = [(int(rng.integers(1, longest)), int(rng.integers(0, longest))) for _ in range(count)]
    sizes[:3] = [(1, 5), (4, 0), (1, 1)]
    return [
        (token_ids(rng.integers(0, vocab_size, p)), token_ids(rng.integers(0, vocab_size, r)))
        for p, r in sizes
    ]


def ragged_team(players, seed, vocab_size=320):
    """Prompts, each with a target and a response of every player; the first are hostile."""
    rng = np.random.default_rng(seed)

    def ids(length):
        return token_ids(rng.integers(0, vocab_size, length))

    sequences = []
    for prompt_length, target_length in [(1, 6), (3, 1), (2, 5), (int(rng.integers(1, 30)), 9)]:
        prompt, target = ids(prompt_length), ids(target_length)
        generated = [ids(rng.integers(0, 25)) for _ in range(players)]
        if prompt_length == 2:
            generated[0] = target  # the opponent has learned it by heart
        if prompt_length == 3:
            generated[0] = ids(0)
        sequences += [(prompt, target), *((prompt, g) for g in generated)]
    return sequences


def expected_logps(model, sequences):
    return torch.stack([oracle(model, *sequence) for sequence in sequences])


@LAYOUTS
@pytest.mark.parametrize("players", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["qwen2", "llama", "gpt2"])
def test_values_and_gradients_equal_the_oracle_on_ragged_rows(kind, players, layout):
    sequences = ragged_team(players, seed=players)
    reference = make_model(kind, seed=players).double()
    expected_S = expected_logps(reference, sequences)
    weights_S = torch.linspace(-1, 1, len(sequences), dtype=torch.float64)
    expected = torch.autograd.grad((weights_S * expected_S).sum(), list(reference.parameters()))

    model = make_model(kind, seed=players)
    assert prepare(model, 99) == (PACKED_ROWS, ())
    logps_S = response_logps(model, layout.rows(sequences))
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
    prepare(model, 99)
    expected_S = expected_logps(make_model("llama").double(), sequences)
    assert torch.allclose(
        response_logps(model, layout.rows(sequences)), expected_S, rtol=1e-12, atol=0
    )


def test_what_lies_beside_a_sequence_changes_nothing():
    model = make_model("llama").double()
    prepare(model, 99)
    sequences = ragged_team(3, seed=2)
    together = response_logps(model, packed_row(sequences))
    for rows_of in (packed_row, padded_rows):
        alone = torch.cat([response_logps(model, rows_of([s])) for s in sequences])
        assert torch.allclose(alone, together, rtol=1e-12, atol=0)


def test_a_sum_and_no_mean_and_no_prompt_tokens():
    model = make_model()
    (prompt, response) = token_ids([1, 2, 3]), token_ids([4, 5, 6, 7])
    one, two = token_ids([4, 5]), token_ids([6, 7])

    def logp(p, r):
        return response_logps(model, padded_rows([(p, r)])).item()

    # The chain rule: log π(ab|x) = log π(a|x) + log π(b|xa).
    chained = logp(prompt, one) + logp(np.concatenate([prompt, one]), two)
    assert logp(prompt, response) == pytest.approx(chained, abs=1e-4)


def test_terms_are_float32_and_their_sum_float64_whatever_the_logits_are():
    class Coin(torch.nn.Module):
        """Two tokens, equally likely, in the type that autocast leaves logits in."""

        def forward(self, input_ids, use_cache):
            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 2, dtype=torch.bfloat16))

    rows = padded_rows([(token_ids([0]), token_ids([1] * 1000))])
    # ln 2 is 0.691 in bf16, and float32 has steps of 6e-5 at 693.
    logp = response_logps(Coin(), rows).item()
    assert logp == pytest.approx(-1000 * math.log(2), abs=4e-6)


def reference_token_logps(hidden, weight, bias, labels):
    logits = hidden @ weight.T + (0 if bias is None else bias)
    return torch.log_softmax(logits, dim=1)[torch.arange(len(labels)), labels]


@pytest.mark.parametrize("tokens_in_a_chunk", [1, 3, 10, 11, 100])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_chunked_log_probs_and_their_gradients(tokens_in_a_chunk, has_bias, dtype, monkeypatch):
    monkeypatch.setattr(tpaw.token_logps, "LOGITS_IN_A_CHUNK", tokens_in_a_chunk * 23 + 22)
    torch.manual_seed(tokens_in_a_chunk)
    leaves = [torch.randn(10, 7) * 3, torch.randn(23, 7), *([torch.randn(23)] if has_bias else [])]
    labels = torch.randint(0, 23, (10,))
    labels[3] = labels[4]
    upstream = torch.randn(10)

    def run(function, of):
        hidden, weight, bias = [x.detach().to(of).requires_grad_() for x in leaves] + [None] * (
            not has_bias
        )
        logps = function(hidden, weight, bias, labels)
        inputs = [x for x in (hidden, weight, bias) if x is not None]
        return [logps, *torch.autograd.grad((logps * upstream.to(of)).sum(), inputs)]

    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for found, wanted in zip(
        run(token_logps, dtype), run(reference_token_logps, torch.float64), strict=True
    ):
        assert found.dtype == dtype
        assert torch.allclose(found.double(), wanted, rtol=tolerance, atol=tolerance)


def test_a_second_backward_gives_the_same_gradient_again():
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4)
    logps = token_logps(hidden, weight, None, torch.arange(6))
    [first] = torch.autograd.grad(logps.sum(), hidden, retain_graph=True)
    [second] = torch.autograd.grad(logps.sum(), hidden)
    assert torch.allclose(first, second, atol=1e-6)


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_large_logits_do_not_overflow(scale):
    hidden, weight = torch.tensor([[scale, 0.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    logps = token_logps(hidden, weight, None, torch.tensor([0]))
    assert logps.item() == (0 if scale > 0 else -2e4)


@pytest.mark.parametrize("by", ["weights", "autocast"])
def test_bf16_loses_what_its_operands_round_and_no_more(by):
    """Logits from rounded operands, in fp32; a bf16 logit would be off by up to 0.06 at 16."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(200, 64), torch.randn(500, 64)
    labels = torch.randint(0, 500, (200,))
    rounded = (x.bfloat16() for x in (hidden, weight)) if by == "weights" else (hidden, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=by == "autocast"):
        found = token_logps(*rounded, None, labels)
    assert found.dtype == torch.float32
    operands = [x.bfloat16() if by == "weights" else x for x in (hidden, weight)]
    expected = reference_token_logps(*(x.double() for x in operands), None, labels)
    # A CPU multiplies in fp32, so only the rounding of the operands, if any, is lost.
    assert (found - expected).abs().max() < 1e-4
    # Gradients are sums of products that were rounded to bf16 once.
    leaves = [x.detach().requires_grad_() for x in operands]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=by == "autocast"):
        gradients = torch.autograd.grad(token_logps(*leaves, None, labels).sum(), leaves)
    exact = [x.double().detach().requires_grad_() for x in operands]
    wanted = torch.autograd.grad(reference_token_logps(*exact, None, labels).sum(), exact)
    for gradient, expected_gradient, leaf in zip(gradients, wanted, leaves, strict=True):
        assert gradient.dtype == leaf.dtype
        error = (gradient - expected_gradient).norm() / expected_gradient.norm()
        assert error < 2**-8
    in_bf16 = torch.log_softmax(hidden.bfloat16() @ weight.bfloat16().T, dim=1).double()
    assert (in_bf16[torch.arange(200), labels] - expected).abs().max() > 1e-2


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
    monkeypatch.setattr(tpaw.token_logps, "LOGITS_IN_A_CHUNK", C * V)
    model = make_model(kind, vocab_size=V)
    prepare(model, 99)
    sequences = [(token_ids(range(9)), token_ids(range(i, i + 30))) for i in range(8)]
    with Largest() as largest:
        response_logps(model, layout.rows(sequences)).sum().backward()
    assert V * H <= largest.elements <= max(V * H, C * V)  # the head's gradient, or a chunk
    assert largest.elements < 8 * 30 * V / 4


@LAYOUTS
@pytest.mark.parametrize("target", ["all-linear", ["lm_head", "q_proj"]])
def test_lora_on_the_body_and_on_the_head(target, layout, monkeypatch):
    monkeypatch.setattr(tpaw.logprobs, "TOKENS_IN_A_CHUNK", 7)
    sequences = ragged_team(2, seed=5)
    results = []
    for is_oracle in (True, False):
        torch.manual_seed(1)
        model = peft.get_peft_model(
            make_model("llama", seed=5),
            peft.LoraConfig(r=4, target_modules=target, init_lora_weights=False),
        ).double()
        if is_oracle:
            logps_S = expected_logps(model, sequences)
        else:
            assert prepare(model, 99) == (PACKED_ROWS, ())
            logps_S = response_logps(model, layout.rows(sequences))
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert any("lora" in name for name in trained)
        results.append([logps_S, *torch.autograd.grad(logps_S.sum(), list(trained.values()))])
    for wanted, found in zip(*results, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-6 * wanted.abs().max().item())


TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
ONE_A_ROW = "one sequence a row, prompts not shared: "
ALL_LOGITS = "all logits are held: the model changes what its output head gives"
ARCHITECTURES = {
    "mistral": ({"sliding_window": 8}, [ONE_A_ROW + "its window of 8 tokens is shorter than 40"]),
    "mistral-wide": ({"sliding_window": 40}, []),
    "phi3": ({"sliding_window": None}, []),
    "qwen3": ({}, []),
    "olmo2": ({}, []),
    "gemma3_text": (
        {"sliding_window": 8, "query_pre_attn_scalar": 8},
        [ONE_A_ROW + "its window of 8 tokens is shorter than 40"],
    ),
    "gemma2": (
        {"sliding_window": 64, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0},
        [ALL_LOGITS, ONE_A_ROW + "its attention is 'eager', not sdpa"],
    ),
    "granite": ({"logits_scaling": 4.0}, [ALL_LOGITS]),
    "cohere": ({"logit_scale": 0.5}, [ALL_LOGITS]),
    "bloom": (
        {"n_layer": 2, "n_head": 4},
        [ONE_A_ROW + "its attention is 'eager', not sdpa"],
    ),
    "falcon": (
        {"alibi": True, "head_dim": None, "new_decoder_architecture": False, "multi_query": True},
        [ONE_A_ROW + "its attention does not follow transformers' interface"],
    ),
    "mamba": (
        {"state_size": 4},
        [ONE_A_ROW + "its attention is 'eager', not sdpa"],
    ),
    "opt": ({"ffn_dim": 48, "word_embed_proj_dim": 32}, []),
    "gpt_neox": ({"rotary_pct": 0.5}, []),
    "qwen3_moe": ({"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}, []),
    "llama4_text": (
        {"attention_chunk_size": 8, "num_local_experts": 2, "intermediate_size_mlp": 48},
        [ONE_A_ROW + "it has layers of chunked_attention"],
    ),
    "gpt_oss": (
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 64},
        [ONE_A_ROW + "its attention is 'eager', not sdpa"],
    ),
}


def architecture(name, seed=0):
    kind = name.partition("-")[0]
    settings = TINY | ARCHITECTURES[name][0]
    if settings["head_dim"] is None:
        del settings["head_dim"]
    config = transformers.AutoConfig.for_model(kind, **settings)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # small weights would hide what a layer does
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.3)
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_is_packed_if_it_can_be_and_right_in_any_case(name):
    model, reference = architecture(name), architecture(name)
    layout, notes = prepare(model, 40)
    expected_notes = ARCHITECTURES[name][1]
    assert len(notes) == len(expected_notes), notes
    for note, expected in zip(notes, expected_notes, strict=True):
        assert note.startswith(expected)
    assert (layout is PACKED_ROWS) == (not any(ONE_A_ROW in note for note in notes))
    sequences = [s for s in ragged_team(3, seed=1, vocab_size=64) if sum(map(len, s)) <= 40]
    with torch.no_grad():
        expected_S = expected_logps(reference, sequences)
        logps_S = response_logps(model, layout.rows(sequences))
    assert torch.allclose(logps_S, expected_S, rtol=1e-5, atol=1e-4)


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
    prepare(model, 99)
    rows = packed_row(ragged_team(2, seed=0))
    results = []
    for entered in (model, Rounding(model)):
        logps_S = response_logps(entered, rows)
        results.append([logps_S, *torch.autograd.grad(logps_S.sum(), list(model.parameters()))])
    for plain, rounded in zip(*results, strict=True):
        assert torch.equal(plain, rounded)
    assert len(heard) == 1


def test_a_prepared_model_generates_and_gives_logits_as_before():
    model, reference = make_model("llama"), make_model("llama")
    prepare(model, 99)
    ids = torch.randint(5, 320, (3, 12))
    mask = torch.ones_like(ids)
    ids[0, :5] = mask[0, :5] = 0
    for call in (
        lambda m: m.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False),
        lambda m: m(input_ids=ids, attention_mask=mask).logits,
        lambda m: m(input_ids=ids).logits,
    ):
        assert torch.equal(call(model), call(reference))


def test_preparing_twice_is_as_once_and_can_be_undone():
    model = make_model("llama")
    forward = model.lm_head.forward
    first, second = prepare(model, 99), prepare(model, 99)
    assert first == second
    answer_with_logits(model.lm_head)
    assert model.lm_head.forward == forward


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_a_copy_of_a_prepared_model_has_a_head_of_its_own(kind):
    model = make_model(kind)
    prepare(model, 99)
    other = copy.deepcopy(model)
    rows = packed_row(ragged_team(2, seed=0))
    before = response_logps(other, rows)
    torch.nn.init.zeros_(model.lm_head.weight)
    after = response_logps(other, rows)
    assert torch.equal(before, after)
    after.sum().backward()
    assert other.lm_head.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in model.parameters())


def test_a_choice_of_attention_is_respected():
    model = make_model("llama")
    model.set_attn_implementation("eager")
    layout, notes = prepare(model, 99)
    assert layout is PADDED_ROWS
    assert notes == (ONE_A_ROW + "its attention is 'eager', not sdpa",)
    assert model.config._attn_implementation == "eager"


def test_a_model_that_lies_about_its_attention_is_found_out(monkeypatch):
    """One that ignores positions gives other numbers from packed rows, so it must not get any."""
    model = make_model("gpt2")
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda position_ids=None, **kw: forward(**kw))
    layout, notes = prepare(model, 99)
    assert layout is PADDED_ROWS
    assert notes == (ONE_A_ROW + "its attention gives other results from packed rows",)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("asked", [{"sliding_window": 7}, {"softcap": 30.0}, {"s_aux": 1.0}])
def test_attention_that_spans_do_not_have_is_refused_and_never_left_out(asked):
    rows = packed_row([(token_ids(range(4)), token_ids(range(5)))])  # 8 tokens
    states = torch.randn(1, 2, 8, 4)
    options = {"tpaw_spans": rows["spans"]}
    packed_attention(None, states, states, states, None, sliding_window=8, **options)
    with pytest.raises(ValueError, match="packed attention has no (softcap|s_aux|sliding window)"):
        packed_attention(None, states, states, states, None, **asked, **options)


@pytest.mark.parametrize("name", ["granite", "gemma2"])
def test_weights_in_bf16_do_not_hide_what_a_model_does_to_its_logits(name):
    """Their own rounding is larger than what a soft cap or a scale changes on a few tokens."""
    model = architecture(name).bfloat16()
    assert prepare(model, 40).notes[0] == ALL_LOGITS


def test_weights_in_bf16_do_not_hide_wrong_attention(monkeypatch):
    model = make_model("gpt2").bfloat16()
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda position_ids=None, **kw: forward(**kw))
    assert prepare(model, 99).layout is PADDED_ROWS


@LAYOUTS
def test_a_head_that_is_changed_without_a_trial_is_noticed_in_the_call(layout):
    model = architecture("granite")
    next(model.parameters()).ds_id = 0  # as DeepSpeed marks what it has taken apart
    assert prepare(model, 40) == (PACKED_ROWS, ())
    with pytest.raises(HeadChangedError):
        response_logps(model, layout.rows(ragged_team(1, seed=1, vocab_size=64)))


def test_a_log_prob_that_is_no_number_is_not_taken_for_a_changed_head():
    model = make_model("llama")
    prepare(model, 99)
    model.lm_head.weight.data[7] = math.nan
    assert response_logps(model, packed_row(ragged_team(1, seed=0))).isnan().any()


def test_virtual_tokens_are_refused():
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(make_model("llama"), config)
    with pytest.raises(ValueError, match="virtual tokens"):
        prepare(model, 99)


def test_lora_may_come_around_a_head_that_has_answered():
    model = make_model("llama", seed=5)
    prepare(model, 99)
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    expected_S = expected_logps(model, ragged_team(2, seed=0))
    assert prepare(model, 99) == (PACKED_ROWS, ())
    logps_S = response_logps(model, packed_row(ragged_team(2, seed=0)))
    assert torch.allclose(logps_S, expected_S, rtol=1e-5)


@LAYOUTS
def test_a_prompt_without_tokens_is_refused(layout):
    with pytest.raises(ValueError, match="a prompt has no tokens"):
        layout.rows([(token_ids([]), token_ids([1, 2]))])
