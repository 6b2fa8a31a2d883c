"""Sequences to rows of a batch.

Shape suffixes: B rows, L tokens in the longest row.

Rows are padded on the right and go to the model without an attention mask: in a causal model no
real token ever sees what stands to its right, so the padding cannot change a log-prob, whatever
the attention (full, sliding window, ALiBi, state-space). RoPE that looks at the longest row of a
batch is refused by `model.check_model`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypedDict

import torch
from torch import Tensor

from tpaw.token_table import TokenIds

PromptAndResponse = tuple[TokenIds, TokenIds]


class PaddedRows(TypedDict):
    """Rows of [prompt | response | padding].

    Attributes:
        input_ids_BL: int64 token ids.
        response_mask_BL: bool, true on response tokens.
    """

    input_ids_BL: Tensor
    response_mask_BL: Tensor


def pad_rows(sequences: Sequence[PromptAndResponse], pad_id: int = 0) -> PaddedRows:
    """One row a sequence, padded to the longest; any id of the vocabulary will do to pad with."""
    B = len(sequences)
    L = max(len(prompt) + len(response) for prompt, response in sequences)
    input_ids_BL = torch.full((B, L), pad_id, dtype=torch.int64)
    response_mask_BL = torch.zeros((B, L), dtype=torch.bool)
    for row, (prompt, response) in enumerate(sequences):
        begin, end = len(prompt), len(prompt) + len(response)
        input_ids_BL[row, :begin] = torch.tensor(prompt)
        input_ids_BL[row, begin:end] = torch.tensor(response)
        response_mask_BL[row, begin:end] = True
    return {"input_ids_BL": input_ids_BL, "response_mask_BL": response_mask_BL}


def batches_by_tokens(lengths: Sequence[int], tokens_per_batch: int) -> Iterator[range]:
    """Cut lengths, sorted longest first, into runs whose padded size fits the budget.

    A single row longer than the budget gets a batch of its own.
    """
    begin = 0
    while begin < len(lengths):
        rows = max(1, tokens_per_batch // max(1, lengths[begin]))
        end = min(begin + rows, len(lengths))
        yield range(begin, end)
        begin = end
