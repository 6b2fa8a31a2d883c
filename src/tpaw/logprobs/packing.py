"""Token sequences become the tensors of one forward pass: packed with shared prompts, or padded.

Shape suffixes: B rows, L tokens in a row, R tokens whose next token is a label (one for each
response token), U distinct sequences, S sequences as given.

Packed: one row holds everything, each distinct prompt and each distinct sequence once:
[prompt | y | g1 | g2 | prompt' | y' | …]. The positions of each response continue after its prompt,
and a response attends to its prompt and to itself (`attention.py`). The last token of a response
is left out, because nothing that it predicts is needed.

Padded: one row for each sequence, for models whose attention cannot do that. Rows are padded on the
right and have no attention mask: in a causal model no real token attends to what stands on its
right, so padding cannot change a log-prob, whatever the attention is (sliding window, ALiBi,
state-space). RoPE that depends on the longest row of a batch is refused (`models/checks.py`).
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

from tpaw.data.token_ids import TokenIds, TokenSequence
from tpaw.logprobs.attention import Span, Spans


class PackedBatch(TypedDict):
    """The tensors of one forward pass, and where in them the log-probs of the sequences are.

    Attributes:
        input_ids_BL: int64 token ids.
        read_R: int64 positions, in the flattened rows, of the tokens that predict a label.
        labels_R: int64, the response token that each of them predicts.
        sequence_R: int64, the distinct sequence that each label belongs to.
        distinct: U.
        distinct_S: int64, for each sequence as given, its place among the distinct ones.
        position_ids_BL: int64; packed rows only.
        spans: which tokens attend to which; packed rows only.
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
    """All sequences in one row, without padding.

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
    """One row for each distinct sequence, padded on the right with token id 0."""
    groups, distinct_S = _share(sequences)
    sequences = [TokenSequence(prompt, y) for prompt, responses in groups for y in responses]
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
    """The size of some sequences that share a prompt, and therefore stay in one row.

    Attributes:
        tokens: in a packed row, the prompt counted once.
        sequences: how many there are; each is a row of its own when padded.
        longest: tokens of the longest prompt plus response.
    """

    tokens: int
    sequences: int
    longest: int

    @classmethod
    def single(cls, length: int) -> PromptGroup:
        """The group of one sequence."""
        return cls(length, 1, length)

    @classmethod
    def of(cls, prompt_length: int, response_lengths: Sequence[int]) -> PromptGroup:
        """The group of one prompt and its responses, by their numbers of tokens."""
        return cls(
            prompt_length + sum(max(0, length - 1) for length in response_lengths),
            len(response_lengths),
            prompt_length + max(response_lengths),
        )


def group_by_prompt(sequences: Sequence[TokenSequence]) -> list[list[int]]:
    """Indices of the sequences of each prompt, prompts in the order of their first sequence."""
    by_prompt: dict[bytes, list[int]] = {}
    for i, (prompt, _) in enumerate(sequences):
        by_prompt.setdefault(prompt.tobytes(), []).append(i)
    return list(by_prompt.values())


def assign_packed(
    groups: Sequence[PromptGroup], tokens_per_row: int, multiple_of: int = 1
) -> list[list[int]]:
    """Assign prompt groups to as few packed rows as the token budget allows, about equally full.

    The longest group comes first, each goes to the emptiest row. A group that is longer than the
    budget gets a row of its own. Where there are fewer groups than rows, some rows are empty.

    Args:
        multiple_of: the number of rows becomes a multiple of it, so that every process has as
            many rows.

    Returns:
        For each row, the indices of its groups.
    """
    order = sorted(range(len(groups)), key=lambda i: -groups[i].tokens)
    needed = math.ceil(sum(group.tokens for group in groups) / tokens_per_row)
    low = math.ceil(min(len(groups), needed) / multiple_of)
    high = math.ceil(len(groups) / multiple_of)
    found = None
    while low < high:
        middle = (low + high) // 2
        rows = _share_out(groups, order, middle * multiple_of, tokens_per_row)
        low, high = (middle + 1, high) if rows is None else (low, middle)
        found = rows or found
    if found is None or len(found) != high * multiple_of:
        found = _share_out(groups, order, high * multiple_of, tokens_per_row)
    return found or []


def _share_out(
    groups: Sequence[PromptGroup], order: Sequence[int], count: int, tokens_per_row: int
) -> list[list[int]] | None:
    """Give each group, in order, to the emptiest of `count` rows; None if a row overflows."""
    rows: list[list[int]] = [[] for _ in range(count)]
    emptiest = [(0, row) for row in range(count)]
    for i in order:
        tokens, row = heapq.heappop(emptiest)
        if rows[row] and tokens + groups[i].tokens > tokens_per_row:
            return None
        rows[row].append(i)
        heapq.heappush(emptiest, (tokens + groups[i].tokens, row))
    return rows


def assign_padded(
    groups: Sequence[PromptGroup], tokens_per_batch: int, multiple_of: int = 1
) -> list[list[int]]:
    """Assign prompt groups, longest first, to batches of padded rows that fit the token budget.

    Arguments and result are those of `assign_packed`.
    """
    batches: list[list[int]] = []
    rows = longest = 0
    for i in sorted(range(len(groups)), key=lambda i: -groups[i].longest):
        if not batches or (rows + groups[i].sequences) * longest > tokens_per_batch:
            batches.append([])
            rows, longest = 0, groups[i].longest
        batches[-1].append(i)
        rows += groups[i].sequences
    while len(batches) % multiple_of:
        fullest = max(batches, key=len)
        half = len(fullest) // 2
        batches.append(fullest[half:])
        del fullest[half:]
    return batches


class Layout(NamedTuple):
    """How sequences lie in the tensors of a forward pass: `PACKED_LAYOUT` or `PADDED_LAYOUT`.

    Attributes:
        size: tokens of a prompt group that is alone in a forward pass.
        assign: `assign_packed` or `assign_padded`: prompt groups to forward passes.
        collate: `packed_batch` or `padded_batch`: sequences to tensors.
    """

    size: Callable[[PromptGroup], int]
    assign: Callable[[Sequence[PromptGroup], int, int], list[list[int]]]
    collate: Callable[[Sequence[TokenSequence]], PackedBatch]


PACKED_LAYOUT = Layout(lambda group: group.tokens, assign_packed, packed_batch)
PADDED_LAYOUT = Layout(lambda group: group.sequences * group.longest, assign_padded, padded_batch)


def _share(
    sequences: Sequence[TokenSequence],
) -> tuple[list[tuple[TokenIds, list[TokenIds]]], list[int]]:
    """Distinct prompts with their distinct responses, and the place of each sequence there."""
    groups: dict[bytes, dict[bytes, list[int]]] = {}
    for i, (prompt, response) in enumerate(sequences):
        if len(prompt) == 0:
            raise ValueError(
                "a prompt has no tokens, so nothing predicts the first token of its response"
            )
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
