"""Attention over packed rows whose responses share their prompt, for transformers' interface.

Shape suffixes: L tokens of the row, N spans, K keys of all spans one after the other.

A row is a sequence of spans. A span's queries are a stretch of the row; its keys are a prefix
elsewhere in the row (the prompt), then the stretch itself, causally. So [prompt | y | g] is two
spans: prompt and y without a prefix, then g with the prompt before it. No mask of L × L exists, and
nothing is computed that a mask would throw away.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

PACKED = "tpaw_packed"


class Span(NamedTuple):
    """Queries [begin, end) of the row, behind the prefix [prefix_begin, prefix_end)."""

    begin: int
    end: int
    prefix_begin: int
    prefix_end: int


class Spans(TypedDict):
    """Spans that tile a row in order, and what kernels for sequences of unequal length take.

    Attributes:
        spans: the spans.
        key_index_K: int64, the keys' places in the row, span by span.
        query_ends_N, key_ends_N: int32, N + 1 cumulative counts from 0.
        most_queries, most_keys: of any span.
    """

    spans: tuple[tuple[int, int, int, int], ...]
    key_index_K: Tensor
    query_ends_N: Tensor
    key_ends_N: Tensor
    most_queries: int
    most_keys: int


def make_spans(spans: Sequence[Span]) -> Spans:
    """Describe spans that tile a row, in order, each with at least one query."""
    keys, queries = [], []
    index = []
    for span in spans:
        index += [torch.arange(span.prefix_begin, span.prefix_end)]
        index += [torch.arange(span.begin, span.end)]
        queries.append(span.end - span.begin)
        keys.append(span.prefix_end - span.prefix_begin + queries[-1])
    return {
        "spans": tuple((s.begin, s.end, s.prefix_begin, s.prefix_end) for s in spans),
        "key_index_K": torch.cat(index),
        "query_ends_N": F.pad(torch.tensor(queries).cumsum(0), (1, 0)).int(),
        "key_ends_N": F.pad(torch.tensor(keys).cumsum(0), (1, 0)).int(),
        "most_queries": max(queries),
        "most_keys": max(keys),
    }


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    tpaw_spans: Spans | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers. Without `tpaw_spans` it is SDPA.

    Args:
        query: (1, query heads, L, head size).
        key, value: (1, key heads, L, head size).
        attention_mask: not looked at where there are spans.
        tpaw_spans: as `make_spans` describes them.

    Returns:
        (1, L, query heads, head size), and no attention weights.

    Raises:
        ValueError: the model asks for a kind of attention that spans do not have.
    """
    if tpaw_spans is None:
        sdpa = AttentionInterface()["sdpa"]
        return sdpa(module, query, key, value, attention_mask, scaling=scaling, **kwargs)  # type: ignore[no-any-return]
    unknown = [n for n in ("softcap", "s_aux", "position_bias") if kwargs.get(n) is not None]
    window = kwargs.get("sliding_window")
    if unknown or (window is not None and window < tpaw_spans["most_keys"]):
        raise ValueError(f"packed attention has no {', '.join(unknown) or 'sliding window'}")
    if query.device.type == "cuda" and query.dtype in (torch.bfloat16, torch.float16):
        return _varlen(query, key, value, scaling, tpaw_spans)[None], None
    outputs = _one_by_one(query, key, value, scaling, tpaw_spans)
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, spans: Spans
) -> Tensor:
    """One kernel for all spans; FlashAttention aligns the ends of queries and keys."""
    from torch.nn.attention.varlen import varlen_attn

    index = spans["key_index_K"]
    output: Tensor = varlen_attn(  # type: ignore[assignment]
        query[0].transpose(0, 1),
        key[0].transpose(0, 1).index_select(0, index),
        value[0].transpose(0, 1).index_select(0, index),
        spans["query_ends_N"],
        spans["key_ends_N"],
        spans["most_queries"],
        spans["most_keys"],
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output


def _one_by_one(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, spans: Spans
) -> list[Tensor]:
    """SDPA span by span, which on a CPU beats one call with a mask."""
    # Split and not sliced: the gradient of a slice is as large as the row.
    lengths = [end - begin for begin, end, _, _ in spans["spans"]]
    first_of = {begin: i for i, (begin, _, _, _) in enumerate(spans["spans"])}
    queries, keys, values = (torch.split(x, lengths, dim=2) for x in (query, key, value))
    outputs = []
    for i, (_, _, prefix_begin, prefix_end) in enumerate(spans["spans"]):
        k, v, prefix = keys[i], values[i], prefix_end - prefix_begin
        mask = None
        if prefix:
            # A prefix is the beginning of an earlier span.
            source = first_of[prefix_begin]
            k = torch.cat([keys[source][:, :, :prefix], k], dim=2)
            v = torch.cat([values[source][:, :, :prefix], v], dim=2)
            mask = k.new_ones(lengths[i], k.shape[2], dtype=torch.bool).tril(prefix)
        outputs.append(
            F.scaled_dot_product_attention(
                queries[i],
                k,
                v,
                attn_mask=mask,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        )
    return outputs


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
