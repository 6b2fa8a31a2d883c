"""Attention for packed rows, in which responses share their prompt.

It is registered as an attention function of transformers.

Shape suffixes: L tokens of the row, N spans, K keys of all spans, concatenated. Lower case in a
shape: q queries and k keys of a part of a span.

A packed row consists of spans. The queries of a span are consecutive tokens of the row. Its keys
are a prefix from an earlier part of the row (the prompt), followed by the tokens of the span
itself. Attention inside a span is causal. So the row [prompt | y | g] has two spans: [prompt | y]
without a prefix, and [g] with the prompt as prefix. No L × L mask is needed.

The keys of a span are the tokens of its sequence, in order. So a sliding window counts keys of the
span, not columns of the row.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask, sdpa_mask

# For each attention implementation of transformers, the name of packed attention that is the same
# as it in every call without spans.
PACKED = {"sdpa": "tpaw_packed", "eager": "tpaw_packed_eager"}
# Queries of a span that are computed together where a window or a soft cap applies. Fewer waste
# time on calls, more compute scores that the window then hides.
QUERIES_IN_A_PART = 128


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
        self._masks: dict[tuple[int, ...], Tensor] = {}

    def to(self, device: torch.device, **kwargs: Any) -> Spans:
        """Move the tensors to a device, in place. accelerate's `send_to_device` calls this."""
        self.key_index_K = self.key_index_K.to(device, **kwargs)
        self.query_ends_N = self.query_ends_N.to(device, **kwargs)
        self.key_ends_N = self.key_ends_N.to(device, **kwargs)
        return self

    def mask(self, queries: int, keys: int, window: int | None = None, sinks: int = 0) -> Tensor:
        """Return the mask of queries that are the last tokens of their keys; cached for all layers.

        Args:
            queries: number of queries.
            keys: number of keys, those of the queries included.
            window: number of tokens that a query attends to, itself included; None for all.
            sinks: number of further keys in front, which every query attends to.

        Returns:
            bool, (queries, sinks + keys); true where a query attends to a key.
        """
        window = min(window or keys, keys)
        cache_key = (queries, keys, window, sinks)
        if cache_key not in self._masks:
            mask = torch.ones((queries, keys), dtype=torch.bool, device=self.key_index_K.device)
            mask = mask.tril(keys - queries).triu(keys - queries - window + 1)
            self._masks[cache_key] = F.pad(mask, (sinks, 0), value=True)
        return self._masks[cache_key]


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
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    tpaw_spans: Spans,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention for a packed row.

    Args:
        module: the attention module; transformers passes it.
        query: (1, query heads, L, head size).
        key, value: (1, key heads, L, head size).
        attention_mask: the placeholder that `response_logps` passes, with one element.
        scaling: factor of the attention scores; None means 1 / √(head size).
        sliding_window: number of tokens that a token attends to, itself included; None for all.
        softcap: c of the soft cap c · tanh(score / c) of the scores; None for no cap.
        s_aux: (query heads,), the attention sinks: the score of one more key, whose value is 0.
        tpaw_spans: the spans of the row.

    Returns:
        The output, (1, L, query heads, head size), contiguous, and None in place of attention
        weights.

    Raises:
        PackingError: the model uses a position bias, a mask of its own, sinks that depend on the
            query, or a soft cap together with sinks. Packed rows do not support these.
    """
    unknown = [name for name in ("position_bias", "sinks") if kwargs.get(name) is not None]
    if softcap is not None and s_aux is not None:
        unknown.append("softcap together with s_aux")
    if attention_mask is not None and attention_mask.numel() != 1:
        unknown.append("attention_mask that the model makes")
    if unknown:
        raise PackingError(f"packed attention does not support {', '.join(unknown)}")
    # Under autocast, RoPE returns queries and keys in fp32. The kernel needs one dtype for all.
    dtype = query.dtype
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
    query, key, value = (states.to(dtype) for states in (query, key, value))
    if sliding_window is not None and sliding_window >= tpaw_spans.most_keys:
        sliding_window = None
    if softcap is None and s_aux is None and _has_kernel(query, value):
        return _by_one_kernel(query, key, value, scaling, sliding_window, tpaw_spans)[None], None
    if softcap is not None:
        attend: Attend = partial(_attend_with_cap, scaling=scaling, softcap=softcap)
    elif s_aux is not None:
        attend = partial(_attend_with_sinks, scaling=scaling, sinks_H=s_aux)
    else:
        attend = partial(_attend, scaling=scaling)
    parts = _parts(query, key, value, sliding_window, softcap is not None, tpaw_spans)
    outputs = [attend(q, k, v, tpaw_spans, sliding_window).transpose(1, 2) for q, k, v in parts]
    return torch.cat(outputs, dim=1), None


def _sdpa_unless_packed(module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
    """Compute packed attention if there are spans, and transformers' SDPA if there are none."""
    if kwargs.get("tpaw_spans") is not None:
        return packed_attention(module, *args, **kwargs)  # type: ignore[no-any-return]
    return AttentionInterface()["sdpa"](module, *args, **kwargs)  # type: ignore[no-any-return]


def _eager_unless_packed(module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
    """Compute packed attention if there are spans, and the model's own eager one if not."""
    if kwargs.get("tpaw_spans") is not None:
        return packed_attention(module, *args, **kwargs)  # type: ignore[no-any-return]
    return eager_attention_of(type(module))(module, *args, **kwargs)  # type: ignore[no-any-return]


def eager_attention_of(kind: type[torch.nn.Module]) -> Callable[..., Any]:
    """Return the eager attention function of a class of attention modules.

    transformers has no register of them. Each model's source file defines its own.

    Raises:
        ValueError: the file has none.
    """
    # A wrapper such as FSDP2 derives a class of its own.
    for ancestor in kind.__mro__:
        found = getattr(sys.modules.get(ancestor.__module__), "eager_attention_forward", None)
        if found is not None:
            return found  # type: ignore[no-any-return]
    raise ValueError(f"the source file of {kind.__name__} has no eager_attention_forward")


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
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    window: int | None,
    spans: Spans,
) -> Tensor:
    """Compute all spans in one kernel call.

    FlashAttention aligns the last query of a span with its last key. So its causal mask lets every
    query attend to the whole prefix. Its window counts the keys on the left of a query.
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
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output


Attend = Callable[[Tensor, Tensor, Tensor, Spans, int | None], Tensor]


def _parts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int | None,
    always_cut: bool,
    spans: Spans,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Divide a row into parts: queries that are the last tokens of their keys.

    A part is a span. If a window hides some of the span's keys, or if `always_cut`, it is a few
    queries of the span and the keys that they attend to.

    Yields:
        Queries, keys and values, (1, heads, tokens, head size), in the order of the row.
    """
    # Use split instead of slices: the gradient of each slice would be as large as the row.
    lengths = [span.end - span.begin for span in spans.spans]
    first_of = {span.begin: i for i, span in enumerate(spans.spans)}
    queries, keys, values = (torch.split(x, lengths, dim=2) for x in (query, key, value))
    for i, span in enumerate(spans.spans):
        q, k, v, prefix = queries[i], keys[i], values[i], span.prefix_end - span.prefix_begin
        if prefix:
            # The prefix is always the beginning of an earlier span.
            source = first_of[span.prefix_begin]
            k = torch.cat([keys[source][:, :, :prefix], k], dim=2)
            v = torch.cat([values[source][:, :, :prefix], v], dim=2)
        if not always_cut and (window is None or window >= k.shape[2]):
            yield q, k, v
            continue
        end = prefix
        for part in torch.split(q, QUERIES_IN_A_PART, dim=2):
            begin = 0 if window is None else max(0, end + 1 - window)
            end += part.shape[2]
            yield part, k[:, :, begin:end], v[:, :, begin:end]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, spans: Spans, window: int | None, *, scaling: float | None
) -> Tensor:
    """Call SDPA for one part. On a CPU this is faster than one call with an L × L mask."""
    k, v = _for_sdpa(q, k, v)
    is_causal = q.shape[2] == k.shape[2] and (window is None or window >= k.shape[2])
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=None if is_causal else spans.mask(q.shape[2], k.shape[2], window),
        is_causal=is_causal,
        scale=scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def _for_sdpa(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Repeat the keys and values that query heads share, on a GPU.

    There only FlashAttention and cuDNN share them, and neither takes fp32. SDPA would otherwise
    compute by plain matrix products and keep every score for the backward pass.
    """
    group = q.shape[1] // k.shape[1]
    if q.device.type != "cuda" or group == 1:
        return k, v
    return k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)


def _attend_with_sinks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Spans,
    window: int | None,
    *,
    scaling: float | None,
    sinks_H: Tensor,
) -> Tensor:
    """Call SDPA with the sink as the first key of the part.

    SDPA has no sinks, and a mask that needs a gradient rules out its fast kernels. So the sink is
    the product of one more column: the sink divided by the scaling in each query, 1 in the sink's
    key, and 0 in the other keys. Kernels want a multiple of 8 columns.
    """
    k, v = _for_sdpa(q, k, v)
    scaling = scaling or q.shape[-1] ** -0.5
    sinks = (sinks_H / scaling).to(q.dtype)[None, :, None, None].expand(-1, -1, q.shape[2], -1)
    q = torch.cat([q, F.pad(sinks, (0, 7))], dim=3)
    sink_key = F.pad(k.new_ones(1, 1, 1, 1), (k.shape[3], 7)).expand(-1, k.shape[1], -1, -1)
    output = F.scaled_dot_product_attention(
        q,
        torch.cat([sink_key, F.pad(k, (0, 8))], dim=2),
        F.pad(v, (0, 8, 1, 0)),
        attn_mask=spans.mask(q.shape[2], k.shape[2], window, sinks=1),
        scale=scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return output[..., : v.shape[3]]


def _attend_with_cap(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Spans,
    window: int | None,
    *,
    scaling: float | None,
    softcap: float,
) -> Tensor:
    """Compute one part with the scores held, for SDPA has no soft cap; again in backward."""
    mask = spans.mask(q.shape[2], k.shape[2], window)
    scaling = scaling or q.shape[-1] ** -0.5
    return checkpoint(  # type: ignore[no-any-return]
        _capped, q, k, v, mask, scaling, softcap, use_reentrant=False, preserve_rng_state=False
    )


def _capped(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float, softcap: float
) -> Tensor:
    """Compute softmax(softcap · tanh(q · k · scaling / softcap)) · v, the softmax in fp32."""
    # The queries that share a key head are multiplied by it together.
    q_by_key_head = q.reshape(1, k.shape[1], -1, q.shape[3])
    scores = q_by_key_head @ k.transpose(2, 3)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores = softcap * torch.tanh(scores * (scaling / softcap))
    scores = scores.view(1, q.shape[1], *mask.shape).masked_fill(~mask, -torch.inf)
    weights = scores.softmax(dim=3).to(v.dtype).view(1, k.shape[1], -1, k.shape[2])
    return (weights @ v).view(1, q.shape[1], q.shape[2], v.shape[3])


AttentionInterface.register(PACKED["sdpa"], _sdpa_unless_packed)
AttentionMaskInterface.register(PACKED["sdpa"], sdpa_mask)
AttentionInterface.register(PACKED["eager"], _eager_unless_packed)
AttentionMaskInterface.register(PACKED["eager"], eager_mask)
