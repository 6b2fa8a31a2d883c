"""Sequences to rows of tokens: packed with shared prompts, or one sequence a row.

Shape suffixes: B rows, L tokens in a row, R tokens that are read (one for each response token),
U distinct sequences, S sequences as given.

Packed, everything is one row, and equal prompts and equal sequences stand in it once:
[prompt | y | g1 | g2 | prompt' | y' | …]. Positions go on after the prompt for each response, and a
response sees its prompt and itself (`packed_attention`). The last token of a response predicts
nothing that is asked for, and is left out.

One sequence a row serves models whose attention cannot do that. PackedBatch are padded on the right and go
to the model without an attention mask: in a causal model no real token ever sees what stands to its
right, so the padding cannot change a log-prob, whatever the attention (sliding window, ALiBi,
state-space). RoPE that looks at the longest row of a batch is refused by `model.check_model`.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, NotRequired, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tpaw.data.token_ids import TokenIds
from tpaw.logprobs.attention import Span, Spans

TokenSequence = tuple[TokenIds, TokenIds]


class PackedBatch(TypedDict):
    """PackedBatch for one forward pass, and where in them the log-probs of the sequences are.

    Attributes:
        input_ids_BL: int64 token ids.
        read_R: int64 places, in the flattened rows, of the tokens that predict a response token.
        labels_R: int64, the response tokens that they predict.
        sequence_R: int64, the distinct sequence that each belongs to.
        distinct: how many sequences differ from each other.
        distinct_S: int64, for each sequence as given, its place among the distinct ones.
        position_ids_BL: int64, of packed rows.
        spans: who sees whom, in packed rows.
    """

    input_ids_BL: Tensor
    read_R: Tensor
    labels_R: Tensor
    sequence_R: Tensor
    distinct: int
    distinct_S: Tensor
    position_ids_BL: NotRequired[Tensor]
    spans: NotRequired[Spans]


def packed_batch(sequences: Sequence[TokenSequence]) -> PackedBatch:
    """All sequences in one row without padding.

    Raises:
        ValueError: a prompt without tokens.
    """
    groups, distinct_S = _share(sequences)
    ids: list[NDArray[np.int64]] = []
    positions: list[NDArray[np.int64]] = []
    spans: list[Span] = []
    read: list[NDArray[np.int64]] = []
    labels: list[TokenIds] = []
    begin = 0
    for prompt, responses in groups:
        P = len(prompt)
        prompt_begin = begin
        for i, response in enumerate(responses):
            inputs = response[:-1]
            if i == 0:
                ids.append(prompt.astype(np.int64))
                positions.append(np.arange(P))
                end = begin + P + len(inputs)
                spans.append(Span(begin, end, begin, begin))
                begin += P
            elif len(inputs):
                end = begin + len(inputs)
                spans.append(Span(begin, end, prompt_begin, prompt_begin + P))
            ids.append(inputs.astype(np.int64))
            positions.append(P + np.arange(len(inputs)))
            if len(response):
                last_of_prompt = np.array([prompt_begin + P - 1])
                read.append(np.concatenate([last_of_prompt, begin + np.arange(len(inputs))]))
                labels.append(response)
            begin += len(inputs)
    counts = [len(response) for _, responses in groups for response in responses]
    return {
        "input_ids_BL": _tensor(ids)[None],
        "position_ids_BL": _tensor(positions)[None],
        "spans": Spans(spans),
        "read_R": _tensor(read),
        "labels_R": _tensor(labels),
        "sequence_R": torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)),
        "distinct": len(counts),
        "distinct_S": torch.tensor(distinct_S),
    }


def padded_batch(sequences: Sequence[TokenSequence]) -> PackedBatch:
    """One row a distinct sequence, padded to the longest with an id that every vocabulary has."""
    groups, distinct_S = _share(sequences)
    sequences = [(prompt, response) for prompt, responses in groups for response in responses]
    L = max(len(prompt) + len(response) for prompt, response in sequences)
    input_ids_BL = np.zeros((len(sequences), L), dtype=np.int64)
    read: list[NDArray[np.int64]] = []
    for row, (prompt, response) in enumerate(sequences):
        begin, end = len(prompt), len(prompt) + len(response)
        input_ids_BL[row, :begin] = prompt
        input_ids_BL[row, begin:end] = response
        read.append(row * L + np.arange(begin - 1, end - 1))
    counts = torch.tensor([len(response) for _, response in sequences])
    return {
        "input_ids_BL": torch.from_numpy(input_ids_BL),
        "read_R": _tensor(read),
        "labels_R": _tensor([response for _, response in sequences]),
        "sequence_R": torch.arange(len(sequences)).repeat_interleave(counts),
        "distinct": len(sequences),
        "distinct_S": torch.tensor(distinct_S),
    }


class PromptGroup(NamedTuple):
    """What stays together in a row, because it shares a prompt.

    Attributes:
        tokens: in a packed row, the prompt once.
        sequences: how many rows it is without packing.
        longest: tokens of the longest of these.
    """

    tokens: int
    sequences: int
    longest: int

    @classmethod
    def single(cls, length: int) -> PromptGroup:
        """The unit of one sequence."""
        return cls(length, 1, length)

    @classmethod
    def of(cls, prompt_length: int, response_lengths: Sequence[int]) -> PromptGroup:
        """The unit of one prompt and its responses, by their numbers of tokens."""
        return cls(
            prompt_length + sum(max(0, length - 1) for length in response_lengths),
            len(response_lengths),
            prompt_length + max(response_lengths),
        )


def pack(
    units: Sequence[PromptGroup], tokens_per_row: int, multiple_of: int = 1
) -> list[list[int]]:
    """Share units out to as few packed rows as the budget allows, and these about equally full.

    Longest first, each to the emptiest row. A unit that is longer than the budget gets a row of its
    own. Where there are fewer units than rows, rows are empty.

    Args:
        multiple_of: the number of rows is a multiple of it, so that every process has as many.

    Returns:
        The indices of each row's units.
    """
    order = sorted(range(len(units)), key=lambda i: -units[i].tokens)
    needed = math.ceil(sum(unit.tokens for unit in units) / tokens_per_row)
    low = math.ceil(min(len(units), needed) / multiple_of)
    high = math.ceil(len(units) / multiple_of)
    found = None
    while low < high:
        middle = (low + high) // 2
        rows = _share_out(units, order, middle * multiple_of, tokens_per_row)
        low, high = (middle + 1, high) if rows is None else (low, middle)
        found = rows or found
    if found is None or len(found) != high * multiple_of:
        found = _share_out(units, order, high * multiple_of, tokens_per_row)
    return found or []


def _share_out(
    units: Sequence[PromptGroup], order: Sequence[int], count: int, tokens_per_row: int
) -> list[list[int]] | None:
    """Each unit, in order, to the emptiest of so many rows; None where one would be too full."""
    rows: list[list[int]] = [[] for _ in range(count)]
    emptiest = [(0, row) for row in range(count)]
    for i in order:
        tokens, row = heapq.heappop(emptiest)
        if rows[row] and tokens + units[i].tokens > tokens_per_row:
            return None
        rows[row].append(i)
        heapq.heappush(emptiest, (tokens + units[i].tokens, row))
    return rows


def batch(
    units: Sequence[PromptGroup], tokens_per_batch: int, multiple_of: int = 1
) -> list[list[int]]:
    """Cut units, longest first, into batches of padded rows whose size fits the budget.

    Arguments and result are those of `pack`.
    """
    batches: list[list[int]] = []
    rows = longest = 0
    for i in sorted(range(len(units)), key=lambda i: -units[i].longest):
        if not batches or (rows + units[i].sequences) * longest > tokens_per_batch:
            batches.append([])
            rows, longest = 0, units[i].longest
        batches[-1].append(i)
        rows += units[i].sequences
    while len(batches) % multiple_of:
        fullest = max(batches, key=len)
        half = len(fullest) // 2
        batches.append(fullest[half:])
        del fullest[half:]
    return batches


class Layout(NamedTuple):
    """How sequences lie in rows: `PACKED_LAYOUT` or `PADDED_LAYOUT`.

    Attributes:
        size: tokens of a unit that lies alone in a forward pass.
        cut: shares units out to forward passes, within a budget of tokens.
        rows: makes the input of one forward pass.
    """

    size: Callable[[PromptGroup], int]
    cut: Callable[[Sequence[PromptGroup], int, int], list[list[int]]]
    rows: Callable[[Sequence[TokenSequence]], PackedBatch]


PACKED_LAYOUT = Layout(lambda unit: unit.tokens, pack, packed_batch)
PADDED_LAYOUT = Layout(lambda unit: unit.sequences * unit.longest, batch, padded_batch)


def _share(
    sequences: Sequence[TokenSequence],
) -> tuple[list[tuple[TokenIds, list[TokenIds]]], list[int]]:
    """Distinct prompts with their distinct responses, and the place of each sequence there."""
    groups: dict[bytes, dict[bytes, list[int]]] = {}
    for i, (prompt, response) in enumerate(sequences):
        if len(prompt) == 0:
            raise ValueError("a prompt has no tokens: nothing predicts its response's first one")
        by_response = groups.setdefault(prompt.tobytes(), {})
        by_response.setdefault(response.tobytes(), []).append(i)
    shared: list[tuple[TokenIds, list[TokenIds]]] = []
    places = [0] * len(sequences)
    count = 0
    for by_response in groups.values():
        members = list(by_response.values())
        shared.append((sequences[members[0][0]][0], [sequences[m[0]][1] for m in members]))
        for same in members:
            for i in same:
                places[i] = count
            count += 1
    return shared, places


def _tensor(parts: Sequence[NDArray[np.integer]]) -> Tensor:
    joined = np.concatenate(parts) if parts else np.empty(0)
    return torch.from_numpy(joined.astype(np.int64))
