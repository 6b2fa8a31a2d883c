"""Which triples make a batch, and who computes which row of it."""

from __future__ import annotations

import pytest
from builders import team_rows

from tpaw.data.token_ids import token_ids
from tpaw.logprobs.packing import PACKED_LAYOUT, PADDED_LAYOUT
from tpaw.training.batching import (
    BatchedTriples,
    TripleBatchSampler,
    TripleSizes,
    collate_triples,
)


def sampler(rows, layout=PACKED_LAYOUT, **changes):
    settings = {
        "triples_per_batch": 8,
        "tokens_per_row": 90,
        "group_by_prompt": False,
        "seed": 1,
    }
    return TripleBatchSampler(TripleSizes(rows), layout, **(settings | changes))


def flat(part):
    return [i for row in part.micro_batches for i in row]


@pytest.mark.parametrize("layout", [PACKED_LAYOUT, PADDED_LAYOUT])
@pytest.mark.parametrize("group_by_prompt", [False, True])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_an_epoch_holds_every_triple_once_in_batches_of_the_asked_size(
    processes, group_by_prompt, layout
):
    rows = team_rows(15, 3)
    parts = [
        list(sampler(rows, layout, group_by_prompt=group_by_prompt, process=p, processes=processes))
        for p in range(processes)
    ]
    assert len({len(part) for part in parts}) == 1
    seen = []
    for batch in zip(*parts, strict=True):
        assert (
            len({len(part.micro_batches) for part in batch}) == 1
        )  # or collectives would wait forever
        indices = [i for part in batch for i in flat(part)]
        assert {part.triples for part in batch} == {len(indices)}
        seen.append(indices)
    assert [len(batch) for batch in seen] == [8, 8, 8, 8, 8, 5]
    assert sorted(i for batch in seen for i in batch) == list(range(45))
    assert len(sampler(rows)) == 6


def test_batches_depend_on_seed_and_epoch_and_not_on_packing_or_processes():
    rows = team_rows(15, 3)

    def batches(**changes):
        epoch = changes.pop("epoch", 0)
        one = sampler(rows, **changes)
        one.set_epoch(epoch)
        return [sorted(flat(part)) for part in one]

    assert batches() == batches(tokens_per_row=30) == batches(layout=PADDED_LAYOUT)
    assert batches() != batches(seed=2)
    assert batches() != batches(epoch=1)
    two = [list(sampler(rows, process=p, processes=2)) for p in (0, 1)]
    assert batches() == [sorted(flat(a) + flat(b)) for a, b in zip(*two, strict=True)]


def test_grouped_prompts_come_together_and_in_an_order_of_their_own_each_epoch():
    rows = team_rows(15, 3)
    one = sampler(rows, group_by_prompt=True, triples_per_batch=6)
    orders = []
    for epoch in (0, 1):
        one.set_epoch(epoch)
        orders.append([{i % 15 for i in flat(part)} for part in one])
        assert all(len(prompts) == 2 for prompts in orders[-1][:-1])
    assert orders[0] != orders[1]


def test_triples_of_a_prompt_share_a_row_where_they_meet_and_fit():
    rows = team_rows(4, 3)
    sizes = TripleSizes(rows)
    everything = list(range(12))
    assert sizes.group(everything, PACKED_LAYOUT, 10_000) == [[i, i + 4, i + 8] for i in range(4)]
    assert sizes.group(everything, PACKED_LAYOUT, 1) == [
        [i] for p in range(4) for i in (p, p + 4, p + 8)
    ]
    [part] = sampler(rows, triples_per_batch=12, tokens_per_row=10_000)
    [row] = BatchedTriples(rows, PACKED_LAYOUT).__getitems__(part)["micro_batches"]
    expected = sum(
        sizes.size(unit).tokens for unit in sizes.group(everything, PACKED_LAYOUT, 10_000)
    )
    assert row["packed"]["input_ids_BL"].numel() == expected


def test_prompts_with_other_targets_are_others():
    rows = team_rows(2, 2)
    rows[2]["target_ids"] = token_ids([7, 8, 9])
    assert TripleSizes(rows).group([0, 1, 2, 3], PACKED_LAYOUT, 1000) == [[0], [1, 3], [2]]


def test_a_process_without_a_triple_gets_a_row_that_does_not_count():
    rows = team_rows(1, 1)
    [one], [other] = (list(sampler(rows, process=p, processes=2)) for p in (0, 1))
    parts = sorted([one, other], key=lambda part: -len(flat(part)))
    assert [part.micro_batches for part in parts] == [[[0]], [[]]]
    batches = [BatchedTriples(rows, PACKED_LAYOUT).__getitems__(part) for part in parts]
    assert [[row["is_filler"] for row in batch["micro_batches"]] for batch in batches] == [
        [False],
        [True],
    ]
    assert [batch["triples"] for batch in batches] == [1, 1]
    assert batches[1]["micro_batches"][0]["packed"]["input_ids_BL"].numel() > 0


@pytest.mark.parametrize("layout", [PACKED_LAYOUT, PADDED_LAYOUT])
def test_a_row_keeps_float64_and_tells_identical_answers_by_their_ids(layout):
    row = {"prompt_ids": [1], "target_ids": [2, 3]}
    row |= {"player_target_logps": [-1234.123456789], "player_generated_logps": [-0.1]}
    triples = [row | {"generated_ids": ids} for ids in ([2, 3], [2, 4], [2])]
    batch = collate_triples(triples, layout)
    assert batch["is_identical_B"].tolist() == [True, False, False]
    assert batch["player_target_logps_BK"].tolist() == [[-1234.123456789]] * 3
    assert batch["player_generated_logps_BK"].tolist() == [[-0.1]] * 3
    assert batch["target_tokens_B"].tolist() == [2, 2, 2]
    assert batch["generated_tokens_B"].tolist() == [2, 2, 1]
    # Three targets and three answers, of which four are the same.
    assert batch["packed"]["distinct"] == 3
    assert batch["packed"]["distinct_S"].tolist() == [0, 0, 0, 0, 1, 2]


@pytest.mark.parametrize("layout", [PACKED_LAYOUT, PADDED_LAYOUT])
def test_many_triples_of_one_long_prompt_keep_to_the_budget(layout):
    rows = team_rows(1, 40)
    for row in rows:
        row["prompt_ids"] = token_ids(range(100))
    parts = sampler(rows, layout, triples_per_batch=40, tokens_per_row=500)
    for part in parts:
        for row in BatchedTriples(rows, layout).__getitems__(part)["micro_batches"]:
            assert row["packed"]["input_ids_BL"].numel() <= 500
