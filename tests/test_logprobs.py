"""Layout, log-probs, scoring and the store against one float64 sequence at a time."""

from __future__ import annotations

import contextlib
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_model

import tpaw.scoring
from tpaw.artifacts import read_manifest
from tpaw.config import ScoreConfig
from tpaw.layout import batches_by_tokens, pad_rows
from tpaw.logprob_store import LogprobStore, sequence_key
from tpaw.logprobs import response_logps
from tpaw.scoring import Precision, fill_store, score_sequences
from tpaw.token_table import read_table, token_ids

FP32 = Precision("cpu", use_bf16=False)


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


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gpt2"])
@pytest.mark.parametrize("seed", [0, 1])
def test_values_and_gradients_equal_the_oracle_on_ragged_rows(kind, seed):
    model = make_model(kind, seed).double()
    sequences = ragged(9, seed)
    rows = pad_rows(sequences)
    logps_B = response_logps(model, **rows)
    expected_B = torch.stack([oracle(model, *sequence) for sequence in sequences])
    # Logits are taken to float32 before the softmax, so float32 is the precision to expect.
    assert torch.allclose(logps_B, expected_B, rtol=1e-5, atol=1e-5)
    assert logps_B[1] == 0  # the empty response

    weights = torch.linspace(-1, 1, 9, dtype=torch.float64)
    gradients = torch.autograd.grad((weights * logps_B).sum(), list(model.parameters()))
    expected = torch.autograd.grad((weights * expected_B).sum(), list(model.parameters()))
    for found, wanted in zip(gradients, expected, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())


def test_neither_padding_nor_the_pad_id_changes_anything():
    model = make_model("llama").eval()
    sequences = ragged(6, seed=2)
    alone = torch.cat([response_logps(model, **pad_rows([s], 0)) for s in sequences])
    for pad_id in (0, 7):
        together = response_logps(model, **pad_rows(sequences, pad_id))
        assert torch.allclose(alone, together, rtol=1e-5, atol=1e-5)


def test_a_sum_and_no_mean_and_no_prompt_tokens():
    model = make_model()
    (prompt, response) = token_ids([1, 2, 3]), token_ids([4, 5, 6, 7])
    one, two = token_ids([4, 5]), token_ids([6, 7])

    def logp(p, r):
        return response_logps(model, **pad_rows([(p, r)], 0)).item()

    # The chain rule: log π(ab|x) = log π(a|x) + log π(b|xa).
    chained = logp(prompt, one) + logp(np.concatenate([prompt, one]), two)
    assert logp(prompt, response) == pytest.approx(chained, abs=1e-4)


def test_terms_are_float32_and_their_sum_float64_whatever_the_logits_are():
    class Coin(torch.nn.Module):
        """Two tokens, equally likely, in the type that autocast leaves logits in."""

        def forward(self, input_ids, use_cache):
            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 2, dtype=torch.bfloat16))

    rows = pad_rows([(token_ids([0]), token_ids([1] * 1000))])
    # ln 2 is 0.691 in bf16, and float32 has steps of 6e-5 at 693.
    logp = response_logps(Coin(), **rows).item()
    assert logp == pytest.approx(-1000 * math.log(2), abs=4e-6)


def test_batches_hold_every_row_once_within_the_budget():
    lengths = sorted(np.random.default_rng(0).integers(1, 50, 200).tolist(), reverse=True)
    batches = list(batches_by_tokens(lengths, 100))
    assert [i for batch in batches for i in batch] == list(range(200))
    assert all(len(batch) * lengths[batch[0]] <= 100 for batch in batches)
    assert [list(b) for b in batches_by_tokens([500, 3, 2], 100)] == [[0], [1, 2]]
    assert list(batches_by_tokens([], 100)) == []


@pytest.mark.parametrize("tokens_per_batch", [1, 64, 10_000])
def test_scoring_equals_the_oracle_in_the_order_given(tokens_per_batch):
    model = make_model(seed=3)
    sequences = ragged(17, seed=4)
    done = []
    logps = score_sequences(
        model, sequences, tokens_per_batch=tokens_per_batch, precision=FP32, on_done=done.append
    )
    reference = make_model(seed=3).double()
    with torch.no_grad():
        expected = [oracle(reference, *sequence).item() for sequence in sequences]
    assert logps.dtype == np.float64
    assert np.allclose(logps, expected, rtol=1e-5, atol=1e-5)
    assert sum(done) == 17


def test_scoring_keeps_every_padded_batch_within_the_budget(monkeypatch):
    sizes = []

    def response_logps_of(model, input_ids_BL, response_mask_BL):
        sizes.append(input_ids_BL.numel())
        return response_logps(model, input_ids_BL, response_mask_BL)

    monkeypatch.setattr(tpaw.scoring, "response_logps", response_logps_of)
    sequences = ragged(30, seed=4)
    score_sequences(make_model(), sequences, tokens_per_batch=80, precision=FP32)
    assert 1 < len(sizes) < 30
    assert max(sizes) <= 80  # the longest row has 79 tokens at most


def test_bf16_scoring_is_close_to_fp32():
    model = make_model(seed=3)
    sequences = ragged(17, seed=4)
    fp32, bf16 = (
        score_sequences(model, sequences, tokens_per_batch=999, precision=Precision("cpu", use))
        for use in (False, True)
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

    def load():
        if loads is not None:
            loads.append(stage)
        return model or make_model(seed=5)

    config = ScoreConfig(shard_size=shard_size, tokens_per_batch=100)
    fill_store(store, stage, wanted, load, config=config, precision=FP32, on_done=on_done)
    return store


def test_each_sequence_is_forwarded_once_in_the_life_of_the_store(tmp_path):
    first = {sequence_key(s): s for s in ragged(10, seed=0)}
    both = first | {sequence_key(s): s for s in ragged(8, seed=1)}
    forwarded, loads = [], []
    fill(tmp_path, first, "one", on_done=forwarded.append, loads=loads)
    assert sum(forwarded) == len(first)
    fill(tmp_path, both, "two", on_done=forwarded.append, loads=loads)
    assert sum(forwarded) == len(both)
    store = fill(tmp_path, both, "three", on_done=forwarded.append, loads=loads)
    assert sum(forwarded) == len(both) == len(store)
    assert loads == ["one", "two"]  # nothing missing: the model is not even loaded
    model = make_model(seed=5)
    expected = score_sequences(model, list(both.values()), tokens_per_batch=1, precision=FP32)
    assert np.allclose(store.logps(both), expected, atol=1e-5)
    with pytest.raises(KeyError):
        store.logps([b"unknown"])


def test_shards_hold_rows_of_similar_length_longest_first(tmp_path):
    wanted = {sequence_key(s): s for s in ragged(10, seed=0)}
    fill(tmp_path, wanted, "s")
    tables = [read_table(path) for path in sorted(tmp_path.glob("s-*.parquet"))]
    assert [len(table["sequence"]) for table in tables] == [4, 4, 2]
    stored = [wanted[key] for table in tables for key in table["sequence"]]
    lengths = [len(prompt) + len(response) for prompt, response in stored]
    assert lengths == sorted(lengths, reverse=True)
    tokens = [count for table in tables for count in table["tokens"]]
    assert tokens == [len(response) for _, response in stored]


def test_a_stage_that_goes_on_after_a_crash_writes_the_same_bytes(tmp_path):
    wanted = {sequence_key(s): s for s in ragged(30, seed=0)}
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
