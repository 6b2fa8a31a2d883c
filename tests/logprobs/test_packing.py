"""Rows: what a token sees, how units are shared out to rows."""

from __future__ import annotations

import time

import numpy as np
import pytest
from oracles import ragged

from tpaw.data.token_ids import token_ids
from tpaw.logprobs.packing import (
    PACKED_LAYOUT,
    PADDED_LAYOUT,
    PromptGroup,
    _share_out,
    assign_packed,
    assign_padded,
    packed_batch,
    padded_batch,
)


def with_shared_prompts(count, seed):
    """Ragged sequences in random order; prompts come up to four times, some sequences twice."""
    rng = np.random.default_rng(seed)
    sequences = ragged(count, seed)
    for prompt, response in list(sequences):
        for _ in range(int(rng.integers(0, 4))):
            sequences.append((prompt, token_ids(rng.integers(0, 320, rng.integers(0, 12)))))
        if rng.random() < 0.3:
            sequences.append((prompt.copy(), response.copy()))
    rng.shuffle(sequences)
    return sequences


def seen_by(rows, place):
    """Ids that the token at a place of a packed row attends to, in the order of their positions."""
    ids = rows["input_ids_BL"].flatten().tolist()
    positions = rows["position_ids_BL"].flatten().tolist()
    [(begin, _, prefix_begin, prefix_end)] = [
        span for span in rows["spans"].spans if span[0] <= place < span[1]
    ]
    places = [*range(prefix_begin, prefix_end), *range(begin, place + 1)]
    assert [positions[i] for i in places] == list(range(len(places)))
    return [ids[i] for i in places]


@pytest.mark.parametrize("seed", range(4))
def test_a_token_of_a_packed_row_sees_its_prompt_and_its_own_response_alone(seed):
    sequences = with_shared_prompts(8, seed)
    rows = packed_batch(sequences)
    read, labels = rows["read_R"].tolist(), rows["labels_R"].tolist()
    for s, (prompt, response) in enumerate(sequences):
        whole = [*prompt.tolist(), *response.tolist()]
        mine = (rows["sequence_R"] == rows["distinct_S"][s]).nonzero().flatten().tolist()
        assert len(mine) == len(response)
        for t, r in enumerate(mine):
            assert seen_by(rows, read[r]) == whole[: len(prompt) + t]
            assert labels[r] == whole[len(prompt) + t]


@pytest.mark.parametrize("seed", range(4))
def test_a_packed_row_holds_each_prompt_and_each_sequence_once_and_no_last_token(seed):
    sequences = with_shared_prompts(8, seed)
    rows = packed_batch(sequences)
    responses = {}
    for prompt, response in sequences:
        responses.setdefault(tuple(prompt), set()).add(tuple(response))
    expected = sum(
        len(prompt) + sum(max(0, len(r) - 1) for r in each) for prompt, each in responses.items()
    )
    assert rows["input_ids_BL"].shape == rows["position_ids_BL"].shape == (1, expected)
    assert rows["distinct"] == sum(map(len, responses.values()))
    spans = rows["spans"].spans
    assert [begin for begin, *_ in spans] == [0, *(end for _, end, *_ in spans)][:-1]
    assert spans[-1][1] == expected


def test_kernels_for_unequal_lengths_are_told_the_same_as_the_spans():
    rows = packed_batch(with_shared_prompts(8, 0))
    spans = rows["spans"]
    index = spans.key_index_K.tolist()
    for n, (begin, end, prefix_begin, prefix_end) in enumerate(spans.spans):
        queries = spans.query_ends_N[n : n + 2].tolist()
        keys = spans.key_ends_N[n : n + 2].tolist()
        assert queries == [begin, end]
        assert index[slice(*keys)] == [*range(prefix_begin, prefix_end), *range(begin, end)]
        assert end - begin <= spans.most_queries
        assert keys[1] - keys[0] <= spans.most_keys


def test_padded_rows_hold_one_sequence_each_and_read_what_predicts_its_response():
    sequences = ragged(9, 1)
    rows = padded_batch([*sequences, sequences[4]])
    assert rows["input_ids_BL"].shape == (9, max(len(p) + len(r) for p, r in sequences))
    assert rows["distinct_S"].tolist() == [*range(9), 4]
    flat, L = rows["input_ids_BL"].flatten().tolist(), rows["input_ids_BL"].shape[1]
    for s, (prompt, response) in enumerate(sequences):
        places = rows["read_R"][rows["sequence_R"] == s].tolist()
        assert [flat[i + 1] for i in places] == response.tolist()
        assert [i - s * L for i in places] == list(
            range(len(prompt) - 1, len(prompt) + len(response) - 1)
        )
    assert rows["labels_R"].tolist() == [int(i) for _, response in sequences for i in response]


def units(count, seed):
    rng = np.random.default_rng(seed)
    return [
        PromptGroup.of(int(rng.integers(1, 30)), rng.integers(0, 30, rng.integers(1, 4)).tolist())
        for _ in range(count)
    ]


def test_the_size_of_a_unit_is_that_of_its_rows():
    rng = np.random.default_rng(0)
    for lengths in ([5], [0, 3], [1, 1, 9], [0]):
        prompt = token_ids(rng.integers(0, 99, 6))
        sequences = [(prompt, token_ids(rng.integers(0, 99, length))) for length in lengths]
        # Two random responses of one token may be equal; then they are one.
        unit = PromptGroup.of(6, lengths)
        assert unit.tokens >= packed_batch(sequences)["input_ids_BL"].numel() > unit.tokens - 2
        assert (unit.sequences, unit.longest) == padded_batch(sequences)["input_ids_BL"].shape


@pytest.mark.parametrize("multiple_of", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("layout", [PACKED_LAYOUT, PADDED_LAYOUT])
def test_every_unit_is_in_one_row_within_the_budget(layout, seed, multiple_of):
    sizes = units(60, seed)
    rows = layout.assign(sizes, 200, multiple_of)
    assert sorted(i for row in rows for i in row) == list(range(60))
    assert len(rows) % multiple_of == 0
    assert rows == layout.assign(sizes, 200, multiple_of)
    for row in rows:
        tokens = sum(sizes[i].tokens for i in row)
        padded = sum(sizes[i].sequences for i in row) * max(sizes[i].longest for i in row)
        assert (tokens if layout is PACKED_LAYOUT else padded) <= 200


def test_packed_rows_are_few_and_about_equally_full():
    sizes = units(200, 0)
    rows = assign_packed(sizes, 500)
    total = sum(unit.tokens for unit in sizes)
    filled = [sum(sizes[i].tokens for i in row) for row in rows]
    assert len(rows) <= -(-total // 500) + 1
    assert max(filled) - min(filled) <= max(unit.tokens for unit in sizes)


def test_a_unit_longer_than_the_budget_gets_a_row_of_its_own():
    sizes = [PromptGroup.of(5, [3]), PromptGroup.of(90, [20, 30]), PromptGroup.of(2, [2])]
    for cut in (assign_packed, assign_padded):
        assert [1] in cut(sizes, 40)
        assert sorted(i for row in cut(sizes, 40) for i in row) == [0, 1, 2]
    assert sorted(len(row) for row in assign_packed(sizes[:1], 40, multiple_of=3)) == [0, 0, 1]
    assert sorted(len(row) for row in assign_padded(sizes[:1], 40, multiple_of=3)) == [0, 0, 1]
    assert assign_packed(sizes, 1) == [[1], [0], [2]]
    assert assign_packed([], 40) == assign_padded([], 40) == []


def test_many_long_units_are_packed_in_no_time_and_into_no_more_rows_than_needed():
    """Longer than half a row, so that no two fit together."""
    sizes = [
        PromptGroup.single(int(n)) for n in np.random.default_rng(0).integers(4100, 8000, 8000)
    ]
    began = time.monotonic()
    assert sorted(map(tuple, assign_packed(sizes, 8192))) == [(i,) for i in range(8000)]
    assert time.monotonic() - began < 5  # one row more at a time took two minutes


@pytest.mark.parametrize("seed", range(5))
def test_one_row_fewer_would_not_do(seed):
    rng = np.random.default_rng(seed)
    sizes = units(int(rng.integers(1, 60)), seed)
    budget = int(rng.integers(20, 300))
    rows = assign_packed(sizes, budget)
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i].tokens)
    fewer = [_share_out(sizes, order, n, budget) for n in range(1, len(rows))]
    needed = -(-sum(unit.tokens for unit in sizes) // budget)
    assert len(rows) == min(needed, len(sizes)) or fewer[-1] is None
