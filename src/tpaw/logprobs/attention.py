"""Attention over packed rows whose responses share their prompt, for transformers' interface.

Shape suffixes: L tokens of the row, N spans, K keys of all spans one after the other.

A row is a sequence of spans. A span's queries are a stretch of the row; its keys are a prefix
elsewhere in the row (the prompt), then the stretch itself, causally. So [prompt | y | g] is two
spans: prompt and y without a prefix, then g with the prompt before it. No mask of L × L exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

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


class Spans:
    """Spans that tile a row, and what kernels for sequences of unequal length take.

    Attributes:
        spans: in the order of the row, each with at least one query.
        key_index_K: int64, the keys' places in the row, span by span.
        query_ends_N, key_ends_N: int32, N + 1 cumulative counts from 0.
        most_queries, most_keys: of any span.
    """

    def __init__(self, spans: Sequence[Span]) -> None:
        self.spans = tuple(spans)
        index = [
            torch.arange(begin, end)
            for span in spans
            for begin, end in ((span.prefix_begin, span.prefix_end), (span.begin, span.end))
        ]
        queries = torch.tensor([span.end - span.begin for span in spans])
        keys = queries + torch.tensor([span.prefix_end - span.prefix_begin for span in spans])
        self.key_index_K = torch.cat(index)
        self.query_ends_N = F.pad(queries.cumsum(0), (1, 0)).int()
        self.key_ends_N = F.pad(keys.cumsum(0), (1, 0)).int()
        self.most_queries, self.most_keys = int(queries.max()), int(keys.max())
        self._masks: dict[tuple[int, int], Tensor] = {}

    def to(self, device: torch.device, **kwargs: Any) -> Spans:
        """Move the tensors, in place; accelerate's `send_to_device` calls it."""
        self.key_index_K = self.key_index_K.to(device, **kwargs)
        self.query_ends_N = self.query_ends_N.to(device, **kwargs)
        self.key_ends_N = self.key_ends_N.to(device, **kwargs)
        return self

    def mask(self, queries: int, prefix: int) -> Tensor:
        """Which keys behind a prefix each query sees; made once for all layers."""
        key = (queries, prefix)
        if key not in self._masks:
            shape = (queries, prefix + queries)
            mask = torch.ones(shape, dtype=torch.bool, device=self.key_index_K.device)
            self._masks[key] = mask.tril(prefix)
        return self._masks[key]


# Every row has spans of its own, and would be compiled anew.
@torch.compiler.disable  # type: ignore[untyped-decorator]
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
        tpaw_spans: of the row.

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
    if unknown or (window is not None and window < tpaw_spans.most_keys):
        raise ValueError(f"packed attention has no {', '.join(unknown) or 'sliding window'}")
    # RoPE leaves queries and keys in fp32 under autocast.
    dtype = query.dtype
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
    query, key, value = (states.to(dtype) for states in (query, key, value))
    if _has_kernel(query, value):
        return _by_one_kernel(query, key, value, scaling, tpaw_spans)[None], None
    outputs = _one_by_one(query, key, value, scaling, tpaw_spans)
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _has_kernel(query: Tensor, value: Tensor) -> bool:
    """Whether FlashAttention takes states of this kind."""
    size = query.shape[-1]
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.bfloat16, torch.float16)
        and size == value.shape[-1]
        and size % 8 == 0
        and size <= 256
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _by_one_kernel(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, spans: Spans
) -> Tensor:
    """One kernel for all spans; FlashAttention aligns the ends of queries and keys."""
    from torch.nn.attention.varlen import varlen_attn

    index = spans.key_index_K
    output: Tensor = varlen_attn(  # type: ignore[assignment]
        query[0].transpose(0, 1),
        key[0].transpose(0, 1).index_select(0, index),
        value[0].transpose(0, 1).index_select(0, index),
        spans.query_ends_N,
        spans.key_ends_N,
        spans.most_queries,
        spans.most_keys,
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
    lengths = [span.end - span.begin for span in spans.spans]
    first_of = {span.begin: i for i, span in enumerate(spans.spans)}
    queries, keys, values = (torch.split(x, lengths, dim=2) for x in (query, key, value))
    outputs = []
    for i, span in enumerate(spans.spans):
        k, v, prefix = keys[i], values[i], span.prefix_end - span.prefix_begin
        if prefix:
            # A prefix is the beginning of an earlier span.
            source = first_of[span.prefix_begin]
            k = torch.cat([keys[source][:, :, :prefix], k], dim=2)
            v = torch.cat([values[source][:, :, :prefix], v], dim=2)
        outputs.append(
            F.scaled_dot_product_attention(
                queries[i],
                k,
                v,
                attn_mask=spans.mask(lengths[i], prefix) if prefix else None,
                is_causal=not prefix,
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        )
    return outputs


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
