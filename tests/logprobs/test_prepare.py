"""Which models are packed, whose head answers, and that both are right."""

from __future__ import annotations

import copy
import math

import peft
import pytest
import torch
import transformers
from builders import LAYOUTS, logps_of, make_model
from messages import DIFFERENCE, refused, says
from oracles import expected_logps, ragged_team

import tpaw.logprobs.attention
import tpaw.runtime.memory
from tpaw.logprobs.packing import PACKED_LAYOUT, PADDED_LAYOUT, packed_batch
from tpaw.logprobs.prepare import prepare_for_logprobs
from tpaw.logprobs.response import HeadChangedError, LogprobHead

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


ONE_A_ROW = "Sequence packing is disabled for this model: "


ALL_LOGITS = "All logits are held in memory: the model changes the output of its head"


NO_INTERFACE = ONE_A_ROW + "its attention does not follow transformers' interface"


ARCHITECTURES = {
    "mistral": ({"sliding_window": 8}, []),
    "mistral-wide": ({"sliding_window": 40}, []),
    "phi3": ({"sliding_window": None}, []),
    "qwen3": ({}, []),
    "olmo2": ({}, []),
    "gemma3_text": ({"sliding_window": 8, "query_pre_attn_scalar": 8}, []),
    "gemma2": (
        {"sliding_window": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0},
        [],
    ),
    "granite": ({"logits_scaling": 4.0}, []),
    "cohere": ({"logit_scale": 0.5}, []),
    "bloom": ({"n_layer": 2, "n_head": 4}, [NO_INTERFACE]),
    "falcon": (
        {"alibi": True, "head_dim": None, "new_decoder_architecture": False, "multi_query": True},
        [NO_INTERFACE],
    ),
    "mamba": ({"state_size": 4}, [NO_INTERFACE]),
    "opt": ({"ffn_dim": 48, "word_embed_proj_dim": 32}, []),
    "gpt_neox": ({"rotary_pct": 0.5}, []),
    "qwen3_moe": ({"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}, []),
    "llama4_text": (
        {"attention_chunk_size": 8, "num_local_experts": 2, "intermediate_size_mlp": 48},
        [ONE_A_ROW + "it has layers of chunked_attention"],
    ),
    "gpt_oss": ({"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}, []),
    "doge": (
        {},
        [ONE_A_ROW + "packed attention does not support attention_mask that the model makes"],
    ),
    "nemotron": ({}, [ONE_A_ROW + "its attention gives other results from packed sequences"]),
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
    layout, notes = prepare_for_logprobs(model, 40)
    expected_notes = ARCHITECTURES[name][1]
    assert len(notes) == len(expected_notes), notes
    for note, expected in zip(notes, expected_notes, strict=True):
        assert note.startswith(expected)
    assert (layout is PACKED_LAYOUT) == (not any(ONE_A_ROW in note for note in notes))
    sequences = [s for s in ragged_team(3, seed=1, vocab_size=64) if sum(map(len, s)) <= 40]
    with torch.no_grad():
        expected_S = expected_logps(reference, sequences)
        logps_S = logps_of(model, layout.collate(sequences))
    assert torch.allclose(logps_S, expected_S, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["mistral-wide", "mistral", "gemma2", "gpt_oss"])
def test_a_prepared_model_generates_and_gives_logits_as_before(name):
    model, reference = architecture(name), architecture(name)
    assert prepare_for_logprobs(model, 99).layout is PACKED_LAYOUT
    ids = torch.randint(5, 64, (3, 12))
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
    first, second = prepare_for_logprobs(model, 99), prepare_for_logprobs(model, 99)
    assert first == second
    LogprobHead.attached_to(model).detach()
    assert LogprobHead.attached_to(model) is None
    assert model.lm_head.forward == forward


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_a_copy_of_a_prepared_model_has_a_head_of_its_own(kind):
    model = make_model(kind)
    prepare_for_logprobs(model, 99)
    other = copy.deepcopy(model)
    rows = packed_batch(ragged_team(2, seed=0))
    before = logps_of(other, rows)
    torch.nn.init.zeros_(model.lm_head.weight)
    after = logps_of(other, rows)
    assert torch.equal(before, after)
    after.sum().backward()
    assert other.lm_head.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in model.parameters())


def test_a_choice_of_attention_is_respected():
    model = make_model("llama")
    model.set_attn_implementation("eager")
    layout, notes = prepare_for_logprobs(model, 99)
    assert layout is PADDED_LAYOUT
    assert len(notes) == 1
    assert notes[0].startswith(ONE_A_ROW + "its attention is 'eager', not sdpa")
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_model_that_lies_about_its_attention_is_found_out(kind, monkeypatch):
    """One that ignores positions gives other numbers from packed rows, so it must not get any."""
    model = make_model(kind)
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda position_ids=None, **kw: forward(**kw))
    layout, notes = prepare_for_logprobs(model, 99)
    assert layout is PADDED_LAYOUT
    assert len(notes) == 1
    assert notes[0].startswith(ONE_A_ROW + "its attention gives other results")
    assert "nats" in notes[0]
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("name", "logit_map"),
    [
        ("granite", (1 / 4, None)),
        ("cohere", (1 / 2, None)),
        ("gemma2", (1, 3)),
        ("qwen3", (1, None)),
    ],
)
def test_a_head_learns_the_scale_and_the_cap_of_its_model(name, logit_map, dtype):
    model = architecture(name).to(dtype)
    assert prepare_for_logprobs(model, 40).notes == ()
    assert LogprobHead.attached_to(model).logit_map == logit_map


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits + 1,
        lambda logits: logits.abs(),
        lambda logits: logits.clamp(max=4),
        lambda logits: logits * torch.nn.Parameter(torch.tensor(2.0)),  # training changes it
        lambda logits: logits[..., :-1],
        lambda logits: logits + torch.linspace(0, 1, 320, device=logits.device),
        lambda logits: logits.index_fill(2, torch.tensor([7], device=logits.device), -100),
    ],
    ids=["shift", "absolute value", "clamp", "trained scale", "fewer logits", "bias", "no image"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_all_logits_are_held_if_a_model_changes_them_in_another_way(change, dtype, monkeypatch):
    model = make_model("llama").to(dtype)
    forward = model.forward

    def changed(**inputs):
        output = forward(**inputs)
        return transformers.modeling_outputs.CausalLMOutput(logits=change(output.logits))

    monkeypatch.setattr(model, "forward", changed)
    layout, notes = prepare_for_logprobs(model, 99)
    assert layout is PACKED_LAYOUT
    [note] = notes
    assert note.startswith(ALL_LOGITS)
    assert LogprobHead.attached_to(model) is None


@pytest.mark.parametrize("window", [3, 4])
def test_a_window_is_tried_although_the_trial_is_shorter_than_it(window, monkeypatch):
    """A model that passes another window to its attention than to its masks is not packed."""
    model = architecture("mistral-wide")
    packed = tpaw.logprobs.attention.packed_attention

    def other_window(*args, sliding_window, **kwargs):
        return packed(*args, sliding_window=sliding_window - 3 + window, **kwargs)

    monkeypatch.setattr(tpaw.logprobs.attention, "packed_attention", other_window)
    layout, notes = prepare_for_logprobs(model, 60)
    assert (layout is PACKED_LAYOUT) == (notes == ()) == (window == 3)
    assert model.config.sliding_window == 40  # as before the trial


def test_weights_in_bf16_do_not_hide_wrong_attention(monkeypatch):
    model = make_model("gpt2").bfloat16()
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda position_ids=None, **kw: forward(**kw))
    assert prepare_for_logprobs(model, 99).layout is PADDED_LAYOUT


@pytest.mark.parametrize("free", [0, 2**40])
@pytest.mark.parametrize("is_wrong", [False, True])
def test_weights_are_widened_for_the_trial_only_where_memory_is_free(free, is_wrong, monkeypatch):
    """8B parameters in bf16 take 16 GB, and 32 GB more in fp32."""
    model = make_model("llama").bfloat16()
    model.lm_head.weight.data *= 30  # so that the random model's log-probs differ by more than 1
    monkeypatch.setattr(tpaw.runtime.memory, "free_memory", lambda device: free)
    packed, dtypes = tpaw.logprobs.attention.packed_attention, set()

    def noting(module, query, *args, **kwargs):
        dtypes.add(query.dtype)
        output, weights = packed(module, query, *args, **kwargs)
        return (output.roll(1, dims=1) if is_wrong else output), weights

    monkeypatch.setattr(tpaw.logprobs.attention, "packed_attention", noting)
    layout, _ = prepare_for_logprobs(model, 99)
    assert dtypes == {torch.float32 if free else torch.bfloat16}
    assert (layout is PADDED_LAYOUT) == is_wrong


@LAYOUTS
def test_a_head_that_is_changed_without_a_trial_is_noticed_in_the_call(layout):
    model = architecture("granite")
    next(model.parameters()).ds_id = 0  # as DeepSpeed marks what it has taken apart
    assert prepare_for_logprobs(model, 40) == (PACKED_LAYOUT, ())
    logps_S = logps_of(model, layout.collate(ragged_team(1, seed=1, vocab_size=64)))
    assert logps_S.isnan().any()  # so that nobody can use them
    with pytest.raises(HeadChangedError):
        LogprobHead.attached_to(model).raise_if_changed()


def test_a_log_prob_that_is_no_number_is_not_taken_for_a_changed_head():
    model = make_model("llama")
    prepare_for_logprobs(model, 99)
    model.lm_head.weight.data[7] = math.nan
    assert logps_of(model, packed_batch(ragged_team(1, seed=0))).isnan().any()
    LogprobHead.attached_to(model).raise_if_changed()


def test_virtual_tokens_are_refused():
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(make_model("llama"), config)
    with refused("virtual tokens"):
        prepare_for_logprobs(model, 99)


def test_lora_may_come_around_a_head_that_has_answered():
    model = make_model("llama", seed=5)
    prepare_for_logprobs(model, 99)
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    expected_S = expected_logps(model, ragged_team(2, seed=0))
    assert prepare_for_logprobs(model, 99) == (PACKED_LAYOUT, ())
    logps_S = logps_of(model, packed_batch(ragged_team(2, seed=0)))
    assert torch.allclose(logps_S, expected_S, rtol=1e-5)


ENCODERS = {
    "bert": {},
    "roberta": {"max_position_embeddings": 64},
    "electra": {"embedding_size": 32},
    "xlnet": {"d_inner": 48, "num_hidden_layers": None, "n_layer": 2, "d_head": 8},
}


def small(kind, **changes):
    settings = {k: v for k, v in (TINY | changes).items() if v is not None}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(kind, **settings)
    ).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.3)
    return model


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_model_that_sees_what_it_must_predict_is_refused(kind):
    with refused(kind, "not causal", "nats", hide=DIFFERENCE):
        prepare_for_logprobs(small(kind, **ENCODERS[kind]), 40)


def test_the_same_model_as_a_decoder_passes():
    model = small("bert", is_decoder=True)
    layout, _ = prepare_for_logprobs(model, 40)
    sequences = ragged_team(1, seed=1, vocab_size=64)
    sequences = [s for s in sequences if sum(map(len, s)) <= 40]
    with torch.no_grad():
        found_S = logps_of(model, layout.collate(sequences))
        assert torch.allclose(found_S, expected_logps(model, sequences), rtol=1e-5, atol=1e-4)


def test_a_model_whose_log_probs_depend_on_the_rows_beside_it_is_refused(monkeypatch):
    """Causal, but the temperature depends on the number of tokens in a row."""
    model = small("llama")
    forward = model.forward

    def tempered(input_ids, **kw):
        output = forward(input_ids=input_ids, **kw)
        output.logits = output.logits * (1 + input_ids.shape[1] / 100)
        return output

    monkeypatch.setattr(model, "forward", tempered)
    with refused("llama", "padded", "nats", hide=DIFFERENCE):
        prepare_for_logprobs(model, 99)


def test_a_model_that_fails_is_refused_by_what_it_says(monkeypatch):
    model = make_model("llama")

    def failing(**kw):
        raise ValueError("sequence length 9 has to be a multiple of 64")

    monkeypatch.setattr(model, "forward", failing)
    with refused("llama", "ValueError", "a multiple of 64"):
        prepare_for_logprobs(model, 99)


FAILURES = {
    "reason": (RuntimeError("view size is not compatible"), True),
    "memory": (torch.OutOfMemoryError("CUDA out of memory"), False),
    "call": (TypeError("unexpected keyword argument 'window_size'"), False),
    "missing": (ImportError("no module named 'torch.nn.attention.varlen'"), False),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_of_packed_rows_is_a_reason_only_if_the_model_causes_it(case, monkeypatch):
    error, is_reason = FAILURES[case]
    model = make_model("llama")
    forward = model.forward

    def failing(**inputs):
        if "tpaw_spans" in inputs:
            raise error
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", failing)
    if not is_reason:
        with pytest.raises(type(error)):
            prepare_for_logprobs(model, 99)
        return
    layout, notes = prepare_for_logprobs(model, 99)
    assert layout is PADDED_LAYOUT
    assert len(notes) == 1
    says(notes[0], "RuntimeError", "view size is not compatible")


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rope_that_depends_on_the_longest_sequence_is_refused(kind):
    rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 1e4}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4} if kind == "longrope" else {}
    rope |= {"original_max_position_embeddings": 40}
    model = small("llama", rope_parameters=rope, max_position_embeddings=80)
    assert prepare_for_logprobs(model, 40) == (PACKED_LAYOUT, ())
    with refused(41, 40, kind):
        prepare_for_logprobs(model, 41)
