"""Answers against one row at a time without a cache."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import transformers
from builders import SAMPLING, ignore, make_model
from messages import refused, says

import tpaw.generation.batching
import tpaw.generation.continuous_batching
import tpaw.generation.hf
import tpaw.runtime.memory
from tpaw.data.token_ids import token_ids
from tpaw.errors import NonFiniteError
from tpaw.generation.batching import Batching, choose_batching
from tpaw.generation.continuous_batching import SPARE_COLUMNS, TopP, draw
from tpaw.generation.generator import finish
from tpaw.generation.hf import HFGenerator
from tpaw.generation.slot_cache import SlotCache
from tpaw.logprobs.prepare import prepare_for_logprobs
from tpaw.runtime.progress import note_once

GREEDY = SAMPLING._replace(temperature=0.0)


SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}


def build(name, **settings):
    """A random model of transformers, by the name of its architecture."""
    torch.manual_seed(1)
    config = getattr(transformers, f"{name}Config")(
        **settings, pad_token_id=0, bos_token_id=1, eos_token_id=4
    )
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


# Models that look at distances or positions in other ways, windows shorter than the rows included.
UNUSUAL = {
    "mistral": lambda: build("Mistral", **SIZES, sliding_window=5),
    "gemma2": lambda: build("Gemma2", **SIZES, sliding_window=5),
    "gpt_neo": lambda: build(
        "GPTNeo",
        vocab_size=320,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=5,
    ),
    "falcon": lambda: build(
        "Falcon",
        vocab_size=320,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        alibi=True,
    ),
    "bloom": lambda: build("Bloom", vocab_size=320, hidden_size=32, n_layer=2, n_head=4),
    "mpt": lambda: build("Mpt", vocab_size=320, d_model=32, n_layers=2, n_heads=4),
    "opt": lambda: build(
        "OPT",
        vocab_size=320,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
    ),
    "mixtral": lambda: build("Mixtral", **SIZES, num_local_experts=4),
}


BART = {
    "vocab_size": 320,
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 256,
    "is_decoder": True,
    "is_encoder_decoder": False,
}
WITHOUT_POSITIONS = {k: v for k, v in SIZES.items() if k != "max_position_embeddings"}

# Models that continuous batching cannot answer, and the fastest way that is right for each.
SLOWER = {
    "mamba": (
        lambda: build("Mamba", vocab_size=320, hidden_size=32, num_hidden_layers=2),
        Batching.ANY_LENGTHS,
    ),
    "recurrent_gemma": (
        lambda: build(
            "RecurrentGemma",
            **WITHOUT_POSITIONS | {"num_hidden_layers": 3},
            attention_window_size=16,
        ),
        Batching.EQUAL_LENGTHS,
    ),
    "minimax": (
        lambda: build(
            "MiniMax",
            **SIZES,
            num_local_experts=4,
            block_size=16,
            layer_types=["linear_attention", "full_attention"],
        ),
        Batching.EQUAL_LENGTHS,
    ),
    "deepseek_v4": (
        lambda: build(
            "DeepseekV4",
            vocab_size=320,
            hidden_size=32,
            moe_intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            head_dim=16,
            q_lora_rank=16,
            n_routed_experts=4,
            num_experts_per_tok=2,
            o_groups=2,
            o_lora_rank=8,
            index_n_heads=32,
            index_head_dim=8,
            index_topk=16,
            sliding_window=16,
            max_position_embeddings=256,
            layer_types=["compressed_sparse_attention", "heavily_compressed_attention"],
            mlp_layer_types=["moe", "moe"],
            compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        ),
        Batching.EQUAL_LENGTHS,
    ),
    "bart": (lambda: build("Bart", **BART), Batching.EQUAL_LENGTHS),
    "rwkv": (
        lambda: build(
            "Rwkv",
            vocab_size=320,
            hidden_size=32,
            attention_hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            context_length=128,
        ),
        Batching.ONE_BY_ONE,
    ),
}


def build_slower(kind):
    """One of `SLOWER`, with weights so large that a wrong context changes the answer."""
    model = SLOWER[kind][0]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25)
    return model


def prompts(count, seed=0, longest=30):
    rng = np.random.default_rng(seed)
    return [token_ids(rng.integers(5, 320, rng.integers(1, longest))) for _ in range(count)]


def oracle_greedy(model, prompt, stop_ids, limit):
    """One row, no batch, no cache: the likeliest token again and again."""
    ids = prompt.tolist()
    for _ in range(limit):
        logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[
            0, -1
        ]
        ids.append(int(logits.argmax()))
        if ids[-1] in stop_ids:
            break
    return ids[len(prompt) :]


@pytest.fixture(params=[Batching.CONTINUOUS, Batching.ANY_LENGTHS], ids=["own loop", "generate"])
def make_generator(request):
    """Both ways of answering, over models that either can serve."""

    def make(model, tokens_per_batch=200):
        generator = HFGenerator(model, tokens_per_batch)
        assert generator.batching is Batching.CONTINUOUS
        generator.batching = request.param
        return generator

    return make


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gpt2", *UNUSUAL])
def test_greedy_equals_one_row_at_a_time_and_stops_where_the_model_does(kind, monkeypatch):
    # A small value moves columns often.
    monkeypatch.setattr(tpaw.generation.continuous_batching, "SPARE_COLUMNS", 1)
    model = UNUSUAL[kind]() if kind in UNUSUAL else make_model(kind, seed=1)
    rows = [*prompts(20), token_ids([7]), token_ids([8])]
    sampling = GREEDY._replace(max_length=35)  # long prompts get shorter answers
    limits = [sampling.limit(prompt) for prompt in rows]
    with torch.no_grad():
        free = [oracle_greedy(model, prompt, (), 12) for prompt in rows]
        # Tokens that greedy decoding does emit early, so that stopping is really tried.
        stops = (free[0][2], free[1][0])
        expected = [
            oracle_greedy(model, prompt, stops, n) for prompt, n in zip(rows, limits, strict=True)
        ]
    generator = HFGenerator(model, 200)
    assert generator.batching is Batching.CONTINUOUS
    widths = watch_rows(model)
    joined, add = [], SlotCache.add

    def watch_add(cache, filled, lengths):
        joined.append(len(cache.starts))
        add(cache, filled, lengths)

    monkeypatch.setattr(SlotCache, "add", watch_add)
    found = generator.generate(rows, sampling._replace(stop_token_ids=stops), 0, ignore)
    assert [c.token_ids.tolist() for c in found] == expected
    assert len({len(tokens) for tokens in expected}) > 3
    # Five rows of 35 tokens fit, and shorter ones come in as rows end: no row is carried on.
    assert sum(widths) == sum(map(len, expected))
    assert widths[0] == 5 < max(widths)
    assert sum(others > 0 for others in joined) > 3
    for completion in found:
        ended = completion.token_ids[-1] in stops
        assert completion.finish_reason == ("stop" if ended else "length")


def watch_rows(model):
    """How many rows each step of decoding has, in a list that fills."""
    widths = []

    def watch(module, args, kwargs):
        if kwargs.get("attention_mask") is not None:
            widths.append(len(kwargs["input_ids"]))

    model.register_forward_pre_hook(watch, with_kwargs=True)
    return widths


IN_PERCENT = {"difference": re.compile(r"\d+(?=%)")}


def generated_alone(model, prompt, limit):
    """transformers' own `generate` for one prompt, without padding."""
    config = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=limit, eos_token_id=None, pad_token_id=0
    )
    with torch.no_grad():
        ids = torch.tensor(prompt)[None].long()
        mask = torch.ones_like(ids)
        found = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    return found[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", SLOWER)
def test_a_model_that_cannot_share_batches_freely_answers_as_if_alone(kind, monkeypatch, capsys):
    model = build_slower(kind)
    rng = np.random.default_rng(0)
    lengths = [1, 30, 2, 17, 30, 17, 9]
    rows = [token_ids(rng.integers(5, 320, length)) for length in lengths]
    model.generation_config = transformers.GenerationConfig()
    free = [generated_alone(model, prompt, 12) for prompt in rows]
    stops = (free[0][2], free[1][0])
    expected = [finish(tokens, GREEDY._replace(stop_token_ids=stops), 12) for tokens in free]
    note_once.cache_clear()
    generator = HFGenerator(model, 200)
    assert generator.batching is SLOWER[kind][1]
    says(capsys.readouterr().err.strip(), generator.batching.value, hide=IN_PERCENT)
    monkeypatch.setattr(tpaw.generation.hf, "generate_continuously", None)
    done = []
    found = generator.generate(rows, GREEDY._replace(stop_token_ids=stops), 0, done.append)
    assert [c.token_ids.tolist() for c in found] == [c.token_ids.tolist() for c in expected]
    assert [c.finish_reason for c in found] == [c.finish_reason for c in expected]
    assert sum(done) == 7
    # Seven one by one, five lengths, or batches of at most 200 tokens.
    assert len(done) == {"mamba": 2, "rwkv": 7}.get(kind, 5)


@pytest.mark.parametrize("free", [0, 10**9], ids=["too large for fp32", "in fp32"])
@pytest.mark.parametrize("kind", SLOWER)
def test_the_way_is_the_same_in_bf16(kind, free, monkeypatch):
    monkeypatch.setattr(tpaw.runtime.memory, "free_memory", lambda device: free)
    model = build_slower(kind).to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert HFGenerator(model, 200).batching is SLOWER[kind][1]
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["qwen2", "llama", "gpt2", *UNUSUAL])
def test_other_models_take_the_fast_way_without_a_word(kind, dtype, capsys):
    model = UNUSUAL[kind]() if kind in UNUSUAL else make_model(kind, seed=1)
    model.to(dtype)
    HFGenerator(model, 200)
    assert choose_batching(model) == (Batching.CONTINUOUS, ())
    assert not capsys.readouterr().err


def test_a_model_is_tried_within_its_positions():
    sizes = {"vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    model.generation_config = transformers.GenerationConfig()
    assert choose_batching(model) == (Batching.CONTINUOUS, ())


def test_a_model_is_tried_once(monkeypatch):
    model, calls = make_model(), []
    model.register_forward_pre_hook(lambda *args: calls.append(1))
    HFGenerator(model, 200)
    assert calls
    calls.clear()
    HFGenerator(model, 200)
    assert not calls


def test_a_model_whose_cache_gives_other_logits_is_asked_without_it(monkeypatch):
    """Positions from the length of the input alone, as if there were no cache."""
    model = make_model("gpt2", seed=1)
    forward = model.transformer.forward

    def misplaced(input_ids, **kwargs):
        kwargs["position_ids"] = torch.arange(input_ids.shape[1], device=input_ids.device).expand(
            input_ids.shape
        )
        return forward(input_ids, **kwargs)

    monkeypatch.setattr(model.transformer, "forward", misplaced)
    generator = HFGenerator(model, 200)
    assert generator.batching is Batching.WITHOUT_CACHE
    rows = prompts(5)
    with torch.no_grad():
        expected = [oracle_greedy(model, prompt, (), 12) for prompt in rows]
    found = generator.generate(rows, GREEDY._replace(stop_token_ids=()), 0, ignore)
    assert [c.token_ids.tolist() for c in found] == expected


@pytest.mark.parametrize("sampling", [SAMPLING, GREEDY])
def test_an_answer_does_not_depend_on_the_other_rows(sampling):
    model = make_model(seed=1)
    generator = HFGenerator(model, 200)
    rows = prompts(12)
    found = [
        HFGenerator(model, tokens).generate(rows, sampling, 3, ignore)
        for tokens in (1, 200, 10_000)
    ]
    tokens = [[c.token_ids.tolist() for c in completions] for completions in found]
    assert tokens[0] == tokens[1] == tokens[2]
    other = [rows[0], *prompts(11, seed=5)]
    assert generator.generate(other, sampling, 3, ignore)[0].token_ids.tolist() == tokens[0][0]
    # The same prompt twice is answered twice.
    twice = generator.generate([rows[0]] * 2, SAMPLING, 3, ignore)
    assert twice[0].token_ids.tolist() != twice[1].token_ids.tolist()


def test_the_cache_stays_within_the_budget_and_grows_as_prompts_get_shorter(monkeypatch):
    sizes, reshape = [], SlotCache.reshape

    def watch(cache, slots, columns):
        sizes.append((slots, columns))
        reshape(cache, slots, columns)

    rows, model = prompts(60), make_model()
    choose_batching(model)  # its trial has a cache too
    monkeypatch.setattr(SlotCache, "reshape", watch)
    HFGenerator(model, 200).generate(rows, GREEDY, 0, ignore)
    assert all(slots * (columns - SPARE_COLUMNS) <= 200 for slots, columns in sizes)
    assert len({slots for slots, _ in sizes}) > 2
    sizes.clear()
    HFGenerator(model, 1).generate(rows[:9], GREEDY, 0, ignore)
    assert {slots for slots, _ in sizes} == {1}


def test_whoever_watches_hears_of_every_prompt_and_may_stop_the_work(make_generator):
    rows, heard = prompts(20), []
    generator = make_generator(make_model(seed=1))
    generator.generate(rows, SAMPLING, 3, heard.append)
    assert sum(heard) == 20
    assert len(heard) > 3

    def stop(count):
        raise KeyboardInterrupt

    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        generator.generate(rows, SAMPLING, 3, stop)
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_draw_falls_where_the_cumulative_probability_passes_it():
    rng = np.random.default_rng(0)
    weights = rng.random((200, 700)) * (rng.random((200, 700)) < 0.1)
    probabilities = torch.tensor(weights / weights.sum(1, keepdims=True), dtype=torch.float32)
    draws = torch.tensor(rng.random((200, 1)))
    draws[0], draws[1] = 0.0, 1 - 2.0**-53
    found = draw(probabilities, draws)
    exact = probabilities.double().cumsum(1)
    expected = (exact <= draws * exact[:, -1:]).sum(1)
    assert found[2:] == expected[2:].tolist()
    positive = probabilities.nonzero()
    assert found[0] == positive[positive[:, 0] == 0][0, 1]
    assert found[1] == positive[positive[:, 0] == 1][-1, 1]


def test_nothing_comes_from_the_models_own_generation_config(make_generator):
    rows = prompts(20)
    plain = make_generator(make_model(seed=1)).generate(rows, SAMPLING, 3, ignore)
    model = make_model(seed=1)
    hostile = {
        "top_k": 1,
        "top_p": 0.01,
        "temperature": 0.01,
        "repetition_penalty": 5.0,
        "do_sample": False,
    }
    hostile |= {
        "min_new_tokens": 12,
        "max_length": 5,
        "eos_token_id": list(range(5, 200)),
        "num_beams": 3,
        "no_repeat_ngram_size": 1,
    }
    model.generation_config.update(**hostile)
    found = make_generator(model).generate(rows, SAMPLING, 3, ignore)
    assert [c.token_ids.tolist() for c in plain] == [c.token_ids.tolist() for c in found]


def test_sampling_is_the_models_distribution_at_temperature_one(make_generator):
    model = make_model(seed=1)
    with torch.no_grad():  # few likely tokens, so that frequencies can be told apart
        model.lm_head.weight[:300] *= 0
        model.lm_head.weight *= 30
    prompt = prompts(1)[0]
    with torch.no_grad():
        expected = torch.softmax(
            model(input_ids=torch.tensor([prompt.tolist()], device=model.device)).logits[0, -1], 0
        ).cpu()
    count = 4000
    sampling = SAMPLING._replace(max_new_tokens=1)
    drawn = make_generator(model, 30_000).generate([prompt] * count, sampling, 0, ignore)
    frequency = torch.bincount(torch.tensor([c.token_ids[0] for c in drawn]), minlength=320) / count
    assert expected.max() < 0.9
    # Five standard errors of a binomial proportion.
    assert torch.all(
        (frequency - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt() + 1e-3
    )


@pytest.mark.parametrize(
    "change", [{"temperature": 3.0}, {"temperature": 0.3}, {"top_p": 0.46}, {"top_k": 3}]
)
def test_temperature_top_p_and_top_k_shape_the_distribution(change, make_generator):
    model = make_model(seed=1)
    with torch.no_grad():
        model.lm_head.weight[:300] *= 0
        model.lm_head.weight *= 30
        prompt = prompts(1)[0]
        ids = torch.tensor([prompt.tolist()], device=model.device)
        logits = model(input_ids=ids).logits[0, -1].double().cpu()
    likeliest = torch.softmax(logits, 0).sort(descending=True)
    kept = likeliest.indices[: change.get("top_k", 320)].tolist()
    if "top_p" in change:  # as many of the likeliest as it takes to reach top_p
        before = likeliest.values.cumsum(0) - likeliest.values
        kept = likeliest.indices[before < change["top_p"]].tolist()
    expected = torch.zeros(320, dtype=torch.float64)
    expected[kept] = torch.softmax(logits[kept] / change.get("temperature", 1.0), 0)
    count = 4000
    sampling = SAMPLING._replace(max_new_tokens=1, **change)
    drawn = make_generator(model, 30_000).generate([prompt] * count, sampling, 0, ignore)
    frequency = torch.bincount(torch.tensor([c.token_ids[0] for c in drawn]), minlength=320) / count
    plain = torch.softmax(logits, 0)
    assert (expected - plain).abs().max() > 0.05  # the setting matters here
    assert torch.all(
        (frequency - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt() + 1e-3
    )


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 0.999])
def test_the_deterministic_top_p_keeps_what_transformers_keeps(top_p):
    torch.manual_seed(0)
    logits = 4 * torch.randn(40, 700, dtype=torch.float64)
    logits[0, 3:] = -torch.inf  # as top_k leaves them
    expected = transformers.TopPLogitsWarper(top_p)(None, logits)
    found = TopP(top_p)(None, logits)
    assert torch.equal(found, expected)
    kept = found.isfinite().sum(1)
    assert kept.min() >= 1
    assert (top_p == 0.01) == (kept.max() == 1)


def test_top_k_0_leaves_every_token_possible(make_generator):
    # A random model's tokens are nearly equally likely; by itself `generate` would keep 50.
    sampling = SAMPLING._replace(max_new_tokens=1)
    drawn = make_generator(make_model(seed=1), 30_000).generate(
        [prompts(1)[0]] * 3000, sampling, 0, ignore
    )
    assert len({int(c.token_ids[0]) for c in drawn}) > 250


def test_the_same_seed_gives_the_same_and_the_global_state_is_left_alone(make_generator):
    generator = make_generator(make_model(seed=1))
    rows = prompts(7)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, again, other = (generator.generate(rows, SAMPLING, seed, ignore) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    tokens = [[c.token_ids.tolist() for c in found] for found in (first, again, other)]
    assert tokens[0] == tokens[1] != tokens[2]


def test_a_long_prompt_leaves_less_room(make_generator):
    rows = [token_ids(range(5, 65)), token_ids(range(5, 15))]
    sampling = GREEDY._replace(stop_token_ids=(319,))
    found = make_generator(make_model()).generate(rows, sampling, 0, ignore)
    assert [len(c.token_ids) for c in found] == [4, 12]
    assert [c.finish_reason for c in found] == ["length", "length"]


def test_no_model_is_asked_for_a_token_beyond_max_length(make_generator):
    # This GPT-2 has 256 positions; a token more is an index error.
    rows = [token_ids([5] * 250), token_ids([6] * 250)]
    sampling = GREEDY._replace(stop_token_ids=(319,), max_length=256)
    found = make_generator(make_model("gpt2")).generate(rows, sampling, 0, ignore)
    assert [len(c.token_ids) for c in found] == [6, 6]


def test_finish_cuts_at_the_first_stop_token_and_adds_none():
    cut = finish([7, 4, 4, 9], SAMPLING, 12)
    assert (cut.token_ids.tolist(), cut.finish_reason) == ([7, 4], "stop")
    cut = finish([7, 8, 9, 4], SAMPLING, 3)
    assert (cut.token_ids.tolist(), cut.finish_reason) == ([7, 8, 9], "length")
    cut = finish([4], SAMPLING, 12)
    assert (cut.token_ids.tolist(), cut.finish_reason) == ([4], "stop")


def test_a_model_that_has_scored_answers_as_before():
    """Scoring leaves an attention implementation of its own behind."""
    model = make_model("llama")
    asked = prompts(9)
    sampling = SAMPLING._replace(temperature=0.0)
    answers = []
    for _ in range(2):
        generator = HFGenerator(model, 200)
        assert generator.batching is Batching.CONTINUOUS
        answers.append(
            [c.token_ids.tolist() for c in generator.generate(asked, sampling, 0, ignore)]
        )
        prepare_for_logprobs(model, 99)
    assert answers[0] == answers[1]


BROKEN = pytest.mark.parametrize("value", [float("nan"), float("inf")])


@BROKEN
@pytest.mark.parametrize("sampling", [SAMPLING, GREEDY], ids=["sampled", "greedy"])
def test_a_model_that_is_broken_in_the_middle_of_its_answers_is_an_error(
    sampling, value, make_generator
):
    """The trial has passed; a long prompt then makes an activation overflow, for example."""
    model = make_model("gpt2", seed=1)
    generator = make_generator(model)
    with torch.no_grad():
        model.transformer.wpe.weight[30] = value
    model.name_or_path = "runs/x/iterations/1/checkpoint"
    rows = [*prompts(5, longest=10), token_ids(range(5, 25))]
    short = sampling._replace(max_new_tokens=5)
    assert len(generator.generate(rows, short, 0, ignore)) == 6  # position 30 is not reached
    with refused("runs/x/iterations/1/checkpoint", "transformer.wpe.weight", error=NonFiniteError):
        generator.generate(rows, sampling, 0, ignore)


@BROKEN
def test_a_broken_model_is_an_error_before_its_first_answer(value):
    model = make_model(seed=1)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = value
    with refused("layers.1.mlp.up_proj.weight", error=NonFiniteError):
        HFGenerator(model, 200)


def test_finite_weights_whose_activations_overflow_are_an_error():
    model = make_model(seed=1)
    with torch.no_grad():
        model.model.norm.weight *= 3e38
    with refused("precision", error=NonFiniteError):
        HFGenerator(model, 200)


def test_a_token_that_the_model_never_emits_is_allowed(make_generator):
    """Some models set the logits of unused tokens to -inf."""
    model = make_model(seed=1)
    head = model.lm_head.forward

    def masked(hidden):
        logits = head(hidden).clone()
        logits[..., 300:] = -torch.inf
        return logits

    model.lm_head.forward = masked
    for sampling in (SAMPLING, GREEDY):
        found = make_generator(model).generate(prompts(5), sampling, 0, ignore)
        assert all((c.token_ids < 300).all() for c in found)
