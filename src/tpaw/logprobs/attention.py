"""Attention for packed rows, in which responses share their prompt.

It is registered as an attention function of transformers.

Shape suffixes: L tokens of the row, N spans, K keys of all spans, concatenated.

A packed row consists of spans. The queries of a span are consecutive tokens of the row. Its keys
are a prefix from an earlier part of the row (the prompt), followed by the tokens of the span
itself. Attention inside a span is causal. So the row [prompt | y | g] has two spans: [prompt | y]
without a prefix, and [g] with the prompt as prefix. No L × L mask is needed.
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


class PackingError(ValueError):
    """The model's attention needs something that packed rows do not support."""


class Span(NamedTuple):
    """Part of a packed row. All fields are positions in the row.

    Attributes:
        begin, end: the queries are the tokens [begin, end).
        prefix_begin, prefix_end: the prefix is the tokens [prefix_begin, prefix_end). It is empty
            if both are equal.
    """

    begin: int
    end: int
    prefix_begin: int
    prefix_end: int


class Spans:
    """The spans of a packed row, with the index tensors that variable-length kernels need.

    Args:
        spans: in the order of the row. Together they cover each token once, and each has at least
            one query.

    Attributes:
        spans: as given.
        key_index_K: int64, positions in the row of the keys of all spans.
        query_ends_N, key_ends_N: int32, (N + 1,), cumulative counts that start at 0.
        most_queries, most_keys: the largest counts of one span.
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
        """Move the tensors to a device, in place. accelerate's `send_to_device` calls this."""
        self.key_index_K = self.key_index_K.to(device, **kwargs)
        self.query_ends_N = self.query_ends_N.to(device, **kwargs)
        self.key_ends_N = self.key_ends_N.to(device, **kwargs)
        return self

    def mask(self, queries: int, prefix: int) -> Tensor:
        """Return the causal mask of a span with a prefix. The mask is cached for all layers.

        Args:
            queries: number of queries.
            prefix: number of keys of the prefix.

        Returns:
            bool, (queries, prefix + queries); true where a query attends to a key.
        """
        key = (queries, prefix)
        if key not in self._masks:
            shape = (queries, prefix + queries)
            mask = torch.ones(shape, dtype=torch.bool, device=self.key_index_K.device)
            self._masks[key] = mask.tril(prefix)
        return self._masks[key]


# Each row has other spans, so torch.compile would compile this function for each row.
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
    """Compute attention for a packed row. Without `tpaw_spans` it calls transformers' SDPA.

    Args:
        module: the attention module; transformers passes it.
        query: (1, query heads, L, head size).
        key, value: (1, key heads, L, head size).
        attention_mask: ignored if `tpaw_spans` is given.
        scaling: factor of the attention scores; None means 1 / √(head size).
        tpaw_spans: the spans of the row.

    Returns:
        The output, (1, L, query heads, head size), and None in place of attention weights.

    Raises:
        PackingError: the model uses soft-capping, attention sinks, a position bias or a sliding
            window. Packed rows do not support these.
    """
    if tpaw_spans is None:
        sdpa = AttentionInterface()["sdpa"]
        return sdpa(module, query, key, value, attention_mask, scaling=scaling, **kwargs)  # type: ignore[no-any-return]
    unknown = [n for n in ("softcap", "s_aux", "position_bias") if kwargs.get(n) is not None]
    window = kwargs.get("sliding_window")
    if unknown or (window is not None and window < tpaw_spans.most_keys):
        raise PackingError(
            f"packed attention has no {', '.join(unknown) or 'sliding window'}; "
            "use padded rows for this model"
        )
    # Under autocast, RoPE returns queries and keys in fp32. The kernel needs one dtype for all.
    dtype = query.dtype
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
    query, key, value = (states.to(dtype) for states in (query, key, value))
    if _has_kernel(query, value):
        return _by_one_kernel(query, key, value, scaling, tpaw_spans)[None], None
    outputs = _one_by_one(query, key, value, scaling, tpaw_spans)
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _has_kernel(query: Tensor, value: Tensor) -> bool:
    """Whether FlashAttention supports this device, dtype and head size."""
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
    """Compute all spans in one kernel call.

    FlashAttention aligns the last query of a span with its last key. So its causal mask lets every
    query attend to the whole prefix.
    """
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
    """Call SDPA for each span. On a CPU this is faster than one call with an L × L mask."""
    # Use split instead of slices: the gradient of each slice would be as large as the row.
    lengths = [span.end - span.begin for span in spans.spans]
    first_of = {span.begin: i for i, span in enumerate(spans.spans)}
    queries, keys, values = (torch.split(x, lengths, dim=2) for x in (query, key, value))
    outputs = []
    for i, span in enumerate(spans.spans):
        k, v, prefix = keys[i], values[i], span.prefix_end - span.prefix_begin
        if prefix:
            # The prefix is always the beginning of an earlier span.
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
