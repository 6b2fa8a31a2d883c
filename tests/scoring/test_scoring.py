"""Scoring and its store against one float64 sequence at a time."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from builders import make_model, score, scorer
from messages import refused
from oracles import oracle, ragged, ragged_team

import tpaw.scoring.score
from tpaw.data.token_ids import TokenSequence, read_table, token_ids
from tpaw.errors import NonFiniteError
from tpaw.logprobs.response import response_logps
from tpaw.scoring.score import Precision, deliver_logps, fill_store, score_sequences
from tpaw.scoring.sequences import DistinctSequences
from tpaw.scoring.store import LogprobStore, sequence_key
from tpaw.storage.artifacts import read_manifest

FP32 = Precision("cpu", use_bf16=False)


@pytest.mark.parametrize("tokens_per_row", [1, 64, 10_000])
def test_scoring_equals_the_oracle_in_the_order_given(tokens_per_row):
    model = make_model(seed=3)
    sequences = ragged(17, seed=4)
    done = []
    logps = score(model, sequences, tokens_per_row=tokens_per_row, on_done=done.append)
    reference = make_model(seed=3).double()
    with torch.no_grad():
        expected = [oracle(reference, *sequence).item() for sequence in sequences]
    assert logps.dtype == np.float64
    assert np.allclose(logps, expected, rtol=1e-5, atol=1e-5)
    assert sum(done) == 17


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_no_row_is_longer_than_the_budget_and_prompts_are_shared(attention, monkeypatch):
    sizes = []

    def response_logps_of(model, batch, head):
        sizes.append(batch["input_ids_BL"].numel())
        return response_logps(model, batch, head)

    monkeypatch.setattr(tpaw.scoring.score, "response_logps", response_logps_of)
    sequences = [s for seed in range(4) for s in ragged_team(3, seed)]
    model = make_model()
    model.set_attn_implementation(attention)
    score(model, sequences, tokens_per_row=100)
    assert len(sizes) > 1
    assert max(sizes) <= 100
    prompts = {s[0].tobytes(): len(s[0]) for s in sequences}
    # As many tokens as there are when each prompt is there once and no last token is.
    least = sum(prompts.values()) + sum(max(0, len(r) - 1) for _, r in sequences)
    if attention == "sdpa":
        duplicates = sum(len(sequences[i][1]) - 1 for i in range(8, len(sequences), 16))
        assert least - duplicates <= sum(sizes) <= least
    else:
        assert sum(sizes) >= sum(len(p) + len(r) for p, r in sequences) - 64


def test_a_prompt_whose_responses_do_not_fit_into_one_row_is_scored_in_several():
    model = make_model(seed=3)
    sequences = ragged_team(4, seed=7)
    whole, cut = (score(model, sequences, tokens_per_row=n) for n in (10_000, 12))
    assert np.allclose(whole, cut, rtol=1e-5)


def test_the_row_after_is_made_while_one_is_in_use_and_its_error_is_heard():
    made = []

    def items():
        for i in range(3):
            made.append(i)
            yield i
        raise ValueError("hostile row")

    ahead = tpaw.scoring.score._prepared_ahead(items())
    assert [next(ahead), next(ahead), next(ahead)] == [0, 1, 2]
    with pytest.raises(ValueError, match="hostile row"):
        next(ahead)
    assert made == [0, 1, 2]


def test_bf16_scoring_is_close_to_fp32():
    model = make_model(seed=3)
    sequences = ragged(17, seed=4)
    fp32, bf16 = (
        score(model, sequences, tokens_per_row=999, use_bf16=use) for use in (False, True)
    )
    tokens = np.array([max(1, len(response)) for _, response in sequences])
    assert np.abs(bf16 - fp32).max() > 0
    assert (np.abs(bf16 - fp32) / tokens).max() < 0.02


def test_a_key_is_of_the_ids_and_the_border():
    a = sequence_key((token_ids([1, 2]), token_ids([3])))
    assert a == sequence_key((token_ids([1, 2]), token_ids([3])))
    others = [([1], [2, 3]), ([1, 2], [4]), ([1, 2], []), ([2, 1], [3])]
    keys = {sequence_key((token_ids(p), token_ids(r))) for p, r in others}
    assert a not in keys
    assert len(keys) == 4


def fill(folder, wanted, stage, model=None, shard_size=4, on_done=lambda n: None, loads=None):
    store = LogprobStore(folder)

    def compute(shards):
        loaded = None
        for shard in shards:
            if loaded is None:
                loaded = scorer(model or make_model(seed=5))
                if loads is not None:
                    loads.append(stage)
            yield deliver_logps(folder, shard, loaded, tokens_per_row=100, on_done=on_done)

    fill_store(store, stage, wanted, compute, shard_size=shard_size)
    return store


def test_each_sequence_is_forwarded_once_in_the_life_of_the_store(tmp_path):
    first = DistinctSequences.of(ragged(10, seed=0))
    both = DistinctSequences.of([*ragged(10, seed=0), *ragged(8, seed=1)])
    forwarded, loads = [], []
    fill(tmp_path, first, "one", on_done=forwarded.append, loads=loads)
    assert sum(forwarded) == len(first)
    fill(tmp_path, both, "two", on_done=forwarded.append, loads=loads)
    assert sum(forwarded) == len(both)
    store = fill(tmp_path, both, "three", on_done=forwarded.append, loads=loads)
    assert sum(forwarded) == len(both) == len(store)
    assert loads == ["one", "two"]  # nothing missing: the model is not even loaded
    model = make_model(seed=5)
    expected = score(model, [both[i] for i in range(len(both))], tokens_per_row=1)
    assert np.allclose(store.logps(both.keys), expected, atol=1e-5)
    with pytest.raises(KeyError):
        store.logps([b"unknown"])


def test_shards_hold_whole_prompts_of_similar_length_longest_first(tmp_path):
    rng = np.random.default_rng(0)
    prompts = [token_ids(rng.integers(0, 320, n)) for n in (3, 9, 5)]
    sequences = [
        (prompts[i % 3], token_ids(rng.integers(0, 320, n))) for i, n in enumerate(range(20, 30))
    ]
    wanted = {sequence_key(s): s for s in sequences}
    fill(tmp_path, DistinctSequences.of(sequences), "s")
    tables = [read_table(path) for path in sorted(tmp_path.glob("s-*.parquet"))]
    assert [len(table["sequence"]) for table in tables] == [4, 4, 2]
    stored = [wanted[key] for table in tables for key in table["sequence"]]
    # 29, 26, 23, 20 belong to the first prompt; 27 to the second; 28 to the third.
    assert [len(r) for _, r in stored] == [20, 23, 26, 29, 22, 25, 28, 21, 24, 27]
    tokens = [count for table in tables for count in table["tokens"]]
    assert tokens == [len(response) for _, response in stored]


def test_a_stage_that_goes_on_after_a_crash_writes_the_same_bytes(tmp_path):
    wanted = DistinctSequences.of(ragged(30, seed=0))
    fill(tmp_path / "whole", wanted, "s")

    class Killed(Exception):
        pass

    for limit in (1, 9, 20, 29):
        done = 0

        def count(n, limit=limit):
            nonlocal done
            done += n
            if done >= limit:
                raise Killed

        with contextlib.suppress(Killed):
            fill(tmp_path / "killed", wanted, "s", on_done=count)
    fill(tmp_path / "killed", wanted, "s")
    whole = {p.name: p.read_bytes() for p in (tmp_path / "whole").glob("*.parquet")}
    killed = {p.name: p.read_bytes() for p in (tmp_path / "killed").glob("*.parquet")}
    assert len(whole) == 8
    assert whole == killed
    entries = read_manifest(tmp_path / "killed")["files"]
    assert sum(entry["sequences"] for entry in entries) == len(wanted)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_with_a_broken_weight_does_not_score(value):
    model = make_model(seed=1)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = value
    model.name_or_path = "runs/x/iterations/1/checkpoint"
    with refused("runs/x/iterations/1/checkpoint", "layers.1.mlp.up_proj", error=NonFiniteError):
        score(model, ragged(5, seed=0))


def test_a_model_that_gives_a_token_probability_zero_does_not_score_it():
    model = make_model("llama", seed=1)
    prepared = scorer(model)
    with torch.no_grad():
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(320, device=model.device))
        model.lm_head.bias[7] = -torch.inf
    allowed = TokenSequence(token_ids([5, 7, 9]), token_ids([6, 8]))
    forbidden = TokenSequence(token_ids([5, 9]), token_ids([6, 7]))
    assert np.isfinite(score_sequences(prepared, [allowed], tokens_per_row=99)).all()
    with refused("lm_head.bias", error=NonFiniteError):
        score_sequences(prepared, [allowed, forbidden], tokens_per_row=99)
