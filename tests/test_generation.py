from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import make_model, make_tokenizer

from tpaw.artifacts import is_published, read_manifest
from tpaw.data import Example
from tpaw.generation.base import FakeGenerator, Sampling, finish
from tpaw.generation.hf import HFGenerator
from tpaw.generation.responses import generate_responses, read_responses, response_facts
from tpaw.team import Player
from tpaw.token_table import token_ids

SAMPLING = Sampling(
    temperature=1.0,
    top_p=1.0,
    top_k=0,
    max_new_tokens=12,
    max_length=64,
    stop_token_ids=(4,),
    tokens_per_batch=200,
)
GREEDY = SAMPLING._replace(temperature=0.0)


def prompts(count, seed=0, longest=30):
    rng = np.random.default_rng(seed)
    return [token_ids(rng.integers(5, 320, rng.integers(1, longest))) for _ in range(count)]


def ignore(count):
    pass


def oracle_greedy(model, prompt, stop_ids, limit):
    """One row, no batch, no cache: the likeliest token again and again."""
    ids = prompt.tolist()
    for _ in range(limit):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        ids.append(int(logits.argmax()))
        if ids[-1] in stop_ids:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_greedy_equals_one_row_at_a_time_and_stops_where_the_model_does(kind):
    model = make_model(kind, seed=1)
    rows = prompts(13)
    with torch.no_grad():
        free = [oracle_greedy(model, prompt, (), 12) for prompt in rows]
        # Tokens that greedy decoding does emit early, so that stopping is really tried.
        stops = (free[0][2], free[1][0])
        expected = [oracle_greedy(model, prompt, stops, 12) for prompt in rows]
    sampling = GREEDY._replace(stop_token_ids=stops)
    found = HFGenerator(model).generate(rows, sampling, 0, ignore)
    assert [c.token_ids.tolist() for c in found] == expected
    assert any(len(tokens) < 12 for tokens in expected)
    for completion in found:
        ended = completion.token_ids[-1] in stops
        assert completion.finish_reason == ("stop" if ended else "length")


def test_nothing_comes_from_the_models_own_generation_config():
    rows = prompts(20)
    plain = HFGenerator(make_model(seed=1)).generate(rows, SAMPLING, 3, ignore)
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
    found = HFGenerator(model).generate(rows, SAMPLING, 3, ignore)
    assert [c.token_ids.tolist() for c in plain] == [c.token_ids.tolist() for c in found]


def test_sampling_is_the_models_distribution_at_temperature_one():
    model = make_model(seed=1)
    with torch.no_grad():  # few likely tokens, so that frequencies can be told apart
        model.lm_head.weight[:300] *= 0
        model.lm_head.weight *= 30
    prompt = prompts(1)[0]
    with torch.no_grad():
        expected = torch.softmax(
            model(input_ids=torch.tensor(prompt)[None].long()).logits[0, -1], 0
        )
    count = 4000
    sampling = SAMPLING._replace(max_new_tokens=1, tokens_per_batch=30000)
    drawn = HFGenerator(model).generate([prompt] * count, sampling, 0, ignore)
    frequency = torch.bincount(torch.tensor([c.token_ids[0] for c in drawn]), minlength=320) / count
    assert expected.max() < 0.9
    # Five standard errors of a binomial proportion.
    assert torch.all(
        (frequency - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt() + 1e-3
    )


@pytest.mark.parametrize(
    "change", [{"temperature": 3.0}, {"temperature": 0.3}, {"top_p": 0.46}, {"top_k": 3}]
)
def test_temperature_top_p_and_top_k_shape_the_distribution(change):
    model = make_model(seed=1)
    with torch.no_grad():
        model.lm_head.weight[:300] *= 0
        model.lm_head.weight *= 30
        prompt = prompts(1)[0]
        logits = model(input_ids=torch.tensor(prompt)[None].long()).logits[0, -1].double()
    likeliest = torch.softmax(logits, 0).sort(descending=True)
    kept = likeliest.indices[: change.get("top_k", 320)].tolist()
    if "top_p" in change:  # as many of the likeliest as it takes to reach top_p
        before = likeliest.values.cumsum(0) - likeliest.values
        kept = likeliest.indices[before < change["top_p"]].tolist()
    expected = torch.zeros(320, dtype=torch.float64)
    expected[kept] = torch.softmax(logits[kept] / change.get("temperature", 1.0), 0)
    count = 4000
    sampling = SAMPLING._replace(max_new_tokens=1, tokens_per_batch=30000, **change)
    drawn = HFGenerator(model).generate([prompt] * count, sampling, 0, ignore)
    frequency = torch.bincount(torch.tensor([c.token_ids[0] for c in drawn]), minlength=320) / count
    plain = torch.softmax(logits, 0)
    assert (expected - plain).abs().max() > 0.05  # the setting matters here
    assert torch.all(
        (frequency - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt() + 1e-3
    )


def test_top_k_0_leaves_every_token_possible():
    # A random model's tokens are nearly equally likely; by itself `generate` would keep 50.
    sampling = SAMPLING._replace(max_new_tokens=1, tokens_per_batch=30000)
    drawn = HFGenerator(make_model(seed=1)).generate([prompts(1)[0]] * 3000, sampling, 0, ignore)
    assert len({int(c.token_ids[0]) for c in drawn}) > 250


def test_the_same_seed_gives_the_same_and_the_global_state_is_left_alone():
    generator = HFGenerator(make_model(seed=1))
    rows = prompts(7)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, again, other = (generator.generate(rows, SAMPLING, seed, ignore) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    tokens = [[c.token_ids.tolist() for c in found] for found in (first, again, other)]
    assert tokens[0] == tokens[1] != tokens[2]


def test_a_long_prompt_leaves_less_room():
    rows = [token_ids(range(5, 65)), token_ids(range(5, 15))]
    sampling = GREEDY._replace(stop_token_ids=(319,))
    found = HFGenerator(make_model()).generate(rows, sampling, 0, ignore)
    assert [len(c.token_ids) for c in found] == [4, 12]
    assert [c.finish_reason for c in found] == ["length", "length"]


def test_no_model_is_asked_for_a_token_beyond_max_length():
    # This GPT-2 has 256 positions; a token more is an index error.
    rows = [token_ids([5] * 250), token_ids([6] * 250)]
    sampling = GREEDY._replace(stop_token_ids=(319,), max_length=256)
    found = HFGenerator(make_model("gpt2")).generate(rows, sampling, 0, ignore)
    assert [len(c.token_ids) for c in found] == [6, 6]


def test_finish_cuts_at_the_first_stop_token_and_adds_none():
    cut = finish([7, 4, 4, 9], SAMPLING, 12)
    assert (cut.token_ids.tolist(), cut.finish_reason) == ([7, 4], "stop")
    cut = finish([7, 8, 9, 4], SAMPLING, 3)
    assert (cut.token_ids.tolist(), cut.finish_reason) == ([7, 8, 9], "length")
    cut = finish([4], SAMPLING, 12)
    assert (cut.token_ids.tolist(), cut.finish_reason) == ([4], "stop")


class Counting(FakeGenerator):
    def __init__(self):
        super().__init__(lambda prompt, seed: [int(prompt[0]), seed % 97 + 5, 4])
        self.answered = 0

    def generate(self, prompts, sampling, seed, on_done):
        self.answered += len(prompts)
        return super().generate(prompts, sampling, seed, on_done)


def answer(folder, examples, generator, on_done=ignore, seed=0):
    tokenizer = make_tokenizer()
    generate_responses(
        folder,
        Player(2, "", "f"),
        examples,
        lambda: generator,
        tokenizer.decode,
        SAMPLING,
        shard_size=4,
        seed=seed,
        on_done=on_done,
    )


def make_examples(count):
    return [
        Example(f"{i}-x", token_ids([i + 5, 6]), token_ids([i + 5, 7, 4]), "p", "t")
        for i in range(count)
    ]


def test_responses_are_one_per_example_in_order_with_what_was_counted(tmp_path):
    examples = make_examples(10)
    answer(
        tmp_path / "r",
        examples,
        FakeGenerator(lambda prompt, seed: [int(prompt[0]), 7, *([4] * int(prompt[0] % 3 == 2))]),
    )
    responses = read_responses(tmp_path / "r")
    assert [r.example_id for r in responses] == [e.id for e in examples]
    assert [r.finish_reason for r in responses] == [
        "stop" if i % 3 == 0 else "length" for i in range(10)
    ]
    assert responses[0].token_ids.tolist() == [5, 7, 4]
    assert responses[1].token_ids.tolist() == [
        6,
        7,
    ]
    facts = response_facts(tmp_path / "r")
    # Every third example is answered with its target's very ids; the others without the last.
    assert (facts["rows"], facts["identical"], facts["truncated"], facts["tokens"]) == (
        10,
        4,
        6,
        24,
    )
    assert read_manifest(tmp_path / "r")["player"] == 2


def test_a_kill_costs_one_shard_and_nothing_is_answered_twice(tmp_path):
    examples = make_examples(10)
    answer(tmp_path / "whole", examples, Counting())
    generator, calls = Counting(), 0

    def kill_at_sixth(count):
        nonlocal calls
        calls += count
        if calls == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer(tmp_path / "r", examples, generator, kill_at_sixth)
    assert not is_published(tmp_path / "r")
    assert generator.answered == 8
    rest = Counting()
    answer(tmp_path / "r", examples, rest)
    assert rest.answered == 6  # the second shard again, and the third
    for shard in (tmp_path / "whole").glob("*.parquet"):
        assert shard.read_bytes() == (tmp_path / "r" / shard.name).read_bytes()


def test_the_model_is_loaded_once_and_only_if_a_shard_is_missing(tmp_path):
    loads, done = [], []

    def load():
        loads.append(1)
        return Counting()

    for _ in range(2):
        generate_responses(
            tmp_path / "r",
            Player(0, "", "f"),
            make_examples(10),
            load,
            make_tokenizer().decode,
            SAMPLING,
            shard_size=4,
            seed=0,
            on_done=done.append,
        )
    assert len(loads) == 1
    assert sum(done) == 20  # shards that are there count as done


def test_shards_and_players_have_their_own_seeds(tmp_path):
    examples = make_examples(8)
    answer(tmp_path / "a", examples, Counting(), seed=0)
    answer(tmp_path / "b", examples, Counting(), seed=1)
    a, b = ([int(r.token_ids[1]) for r in read_responses(tmp_path / x)] for x in "ab")
    assert len({a[0], a[4], b[0], b[4]}) == 4
    assert a[0] == a[3]
