"""Distinct sequences, their order and the store, against dictionaries."""

from __future__ import annotations

import numpy as np
import pytest
from oracles import ragged

from tpaw.data.columns import key_array, key_list
from tpaw.data.token_ids import TokenSequence, token_ids, write_table
from tpaw.logprobs.packing import group_by_prompt
from tpaw.scoring.sequences import DistinctSequences
from tpaw.scoring.store import LogprobStore, sequence_key
from tpaw.storage.artifacts import deliver


def repetitive(count, seed):
    """Random sequences of few prompts, some of them there twice."""
    rng = np.random.default_rng(seed)
    prompts = [token_ids(rng.integers(0, 9, n)) for n in (1, 3, 3, 7)]
    return [
        TokenSequence(
            prompts[rng.integers(0, 4)], token_ids(rng.integers(0, 2, rng.integers(0, 5)))
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_each_sequence_once_in_the_order_of_first_occurrence(seed):
    sequences = repetitive(80, seed)
    expected = {sequence_key(s): s for s in reversed(sequences)}
    expected = {key: expected[key] for key in map(sequence_key, sequences)}
    found = DistinctSequences.of(sequences)
    assert len(found) == len(expected) < 80
    assert key_list(found.keys) == list(expected)
    for i, (prompt, response) in enumerate(expected.values()):
        assert found[i].prompt_ids.tolist() == prompt.tolist()
        assert found[i].response_ids.tolist() == response.tolist()
        assert found.lengths[i] == len(response)


@pytest.mark.parametrize("seed", range(5))
def test_the_scoring_order_is_that_of_groups_sorted_by_their_longest_response(seed):
    found = DistinctSequences.of([*repetitive(60, seed), *ragged(20, seed)])
    rng = np.random.default_rng(seed)
    among = np.flatnonzero(rng.random(len(found)) < 0.7)
    sequences = [found[i] for i in among]
    groups = group_by_prompt(sequences)
    groups.sort(key=lambda group: -max(len(sequences[i][1]) for i in group))
    expected = [among[i] for group in groups for i in group]
    assert found.scoring_order(among).tolist() == expected


def test_nothing_has_an_empty_order():
    found = DistinctSequences.of([])
    assert len(found) == 0
    assert found.scoring_order(np.arange(0)).tolist() == []


@pytest.mark.parametrize("seed", range(3))
def test_a_store_is_a_dictionary(tmp_path, seed):
    rng = np.random.default_rng(seed)
    # Few bytes with many zeros: keys that end in zeros, and keys that are stored twice.
    keys = [bytes(rng.integers(0, 2, 3).tolist()) + bytes(13) for _ in range(30)]
    keys += [bytes(13) + bytes(rng.integers(0, 2, 3).tolist()) for _ in range(30)]
    logps, stages, store = {}, {}, LogprobStore(tmp_path)
    for number in range(6):
        stage = f"stage-{number // 2}"
        part = [keys[i] for i in rng.integers(0, 60, 10)]
        part = list(dict.fromkeys(part))
        values = -rng.random(len(part))
        columns = {"sequence": part, "logp": values.tolist()}
        store.begin()
        record = deliver(
            tmp_path,
            f"{number}.parquet",
            lambda path, columns=columns: write_table(path, columns),
            stage=stage,
        )
        store.receive(record, stage, key_array(b"".join(part)), values)
        logps |= dict(zip(part, values.tolist(), strict=True))
        stages |= dict.fromkeys(part, stage)
    distinct = list(dict.fromkeys([*keys, b"\xff" * 16]))
    array = key_array(b"".join(distinct))
    for found in (store, LogprobStore(tmp_path)):
        assert len(found) == len(logps)
        assert found.contains(array).tolist() == [key in logps for key in distinct]
        assert [key in found for key in distinct] == [key in logps for key in distinct]
        known = list(logps)
        assert found.logps(known).tolist() == list(logps.values())
        for stage in ("stage-0", "stage-1", "other"):
            expected = [i for i, k in enumerate(distinct) if stages.get(k, stage) == stage]
            assert found.missing_before(stage, array).tolist() == expected
        absent = bytes(15) + b"\xff"
        assert absent not in found
        with pytest.raises(KeyError):
            found.logps([known[0], absent])
