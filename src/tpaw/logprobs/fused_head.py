"""log-softmax at the labels, from hidden states, without ever holding the logits of all tokens.

Shape suffixes: T labelled tokens, C tokens of one chunk, H hidden size, V vocabulary.

Forward keeps one number a token, and the last chunk; backward computes the logits of the other
chunks again. The idea is that of Liger-Kernel's fused linear cross-entropy and of Apple's cut
cross-entropy, in plain PyTorch, with a log-prob for each token instead of their mean. Logits, and
the sums that make both gradients, are fp32 whatever the weights are: torch's own
`linear_cross_entropy` rounds to the type of its input, which in bf16 is 0.15 nats over 64 tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# 512 MiB in fp32: 4,096 tokens of a 32k vocabulary, 883 of a 152k one.
LOGITS_IN_A_CHUNK = 2**27


def token_logps(
    hidden_TH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, labels_T: Tensor
) -> Tensor:
    """log softmax(hidden · weightᵀ + bias) at the labels; float32 (T,), float64 for float64 input.

    In bf16 (weights of that type, or autocast to it) a GPU multiplies bf16 and adds in fp32. A CPU
    has no such product: logits come from operands taken to fp32, so that they are no coarser, and
    the products of the backward pass are rounded to bf16 one chunk at a time.

    Args:
        hidden_TH: hidden states of the tokens that predict the labels.
        weight_VH: the output head's weight.
        bias_V: the output head's bias, if it has one.
        labels_T: int64 token ids.
    """
    logps_T: Tensor = _TokenLogps.apply(hidden_TH, weight_VH, bias_V, labels_T)  # type: ignore[no-untyped-call]
    return logps_T


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, labels_T: Tensor
    ) -> Tensor:
        ctx.operand_dtype = operand_dtype = _operand_dtype(hidden_TH, weight_VH)
        dtype = torch.promote_types(operand_dtype, torch.float32)
        ctx.kept = None
        logps_T = hidden_TH.new_empty(len(hidden_TH), dtype=dtype)
        log_totals_T = torch.empty_like(logps_T)
        with torch.autocast(hidden_TH.device.type, enabled=False):
            weight = _for_logits(weight_VH, operand_dtype)
            logits_CV = None
            for chunk in _chunks(len(hidden_TH), len(weight_VH)):
                ctx.kept = None
                logits_CV = logits_CV if weight.dtype == dtype else None  # not two at a time
                logits_CV = _logits(hidden_TH[chunk], weight, bias_V, dtype, logits_CV)
                label_logits_C = logits_CV.gather(1, labels_T[chunk, None])[:, 0]
                largest_C = logits_CV.amax(dim=1)
                totals_C = logits_CV.sub_(largest_C[:, None]).exp_().sum(dim=1)
                log_totals_T[chunk] = totals_C.log().add_(largest_C)
                logps_T[chunk] = label_logits_C - log_totals_T[chunk]
                ctx.kept = (logits_CV, totals_C)
        if not any(ctx.needs_input_grad):
            ctx.kept = None
        ctx.save_for_backward(hidden_TH, weight_VH, bias_V, labels_T, log_totals_T)
        return logps_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TH, weight_VH, bias_V, labels_T, log_totals_T = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias, _ = ctx.needs_input_grad
        dtype = log_totals_T.dtype
        d_hidden_TH = torch.empty_like(hidden_TH) if needs_hidden else None
        d_weight_VH = torch.zeros_like(weight_VH, dtype=dtype) if needs_weight else None
        d_bias_V = torch.zeros_like(weight_VH[:, 0], dtype=dtype) if needs_bias else None
        with torch.autocast(hidden_TH.device.type, enabled=False):
            weight = weight_VH.to(ctx.operand_dtype)
            kept, ctx.kept = ctx.kept, None
            softmax_CV = None
            chunks = list(_chunks(len(hidden_TH), len(weight_VH)))
            weight_for_logits = weight
            if len(chunks) > 1 or not kept:  # else it would be copied for nothing
                weight_for_logits = _for_logits(weight_VH, ctx.operand_dtype)
            for chunk in reversed(chunks):
                if kept:
                    softmax_CV = kept[0].div_(kept[1][:, None])
                    kept = None
                else:
                    logits_CV = _logits(
                        hidden_TH[chunk], weight_for_logits, bias_V, dtype, softmax_CV
                    )
                    softmax_CV = logits_CV.sub_(log_totals_T[chunk, None]).exp_()
                # d log softmax(z)[label] / dz = onehot(label) − softmax(z)
                d_logits_CV = softmax_CV.mul_(-grad_T[chunk, None])
                d_logits_CV.scatter_add_(1, labels_T[chunk, None], grad_T[chunk, None])
                operand_CV = d_logits_CV.to(ctx.operand_dtype)
                if d_hidden_TH is not None:
                    d_hidden_TH[chunk] = _product(operand_CV, weight, dtype)
                if d_weight_VH is not None:
                    hidden = hidden_TH[chunk].to(ctx.operand_dtype)
                    _add_product(d_weight_VH, operand_CV.t(), hidden)
                if d_bias_V is not None:
                    d_bias_V += d_logits_CV.sum(dim=0)
        if d_weight_VH is not None:
            d_weight_VH = d_weight_VH.to(weight_VH.dtype)
        return d_hidden_TH, d_weight_VH, d_bias_V, None


def _operand_dtype(hidden_TH: Tensor, weight_VH: Tensor) -> torch.dtype:
    """The type in which matrices are multiplied."""
    device_type = hidden_TH.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return torch.promote_types(hidden_TH.dtype, weight_VH.dtype)


def _for_logits(weight_VH: Tensor, operand_dtype: torch.dtype) -> Tensor:
    """The weight as `_logits` multiplies it."""
    if weight_VH.device.type == "cuda":
        return weight_VH.to(operand_dtype)
    return weight_VH.to(torch.promote_types(operand_dtype, torch.float32))


def _chunks(T: int, V: int) -> Iterator[slice]:
    """Slices of T tokens. Only the last may be smaller than the others."""
    tokens = max(1, LOGITS_IN_A_CHUNK // V)
    for begin in range(0, T, tokens):
        yield slice(begin, min(begin + tokens, T))


def _logits(
    hidden_CH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    dtype: torch.dtype,
    buffer_CV: Tensor | None,
) -> Tensor:
    """Logits of a chunk, in the memory of an earlier one where that is large enough."""
    hidden_CH = hidden_CH.to(weight_VH.dtype)
    if weight_VH.dtype != dtype:
        logits_CV = _product(hidden_CH, weight_VH.t(), dtype)
    elif buffer_CV is not None and len(buffer_CV) >= len(hidden_CH):
        logits_CV = torch.mm(hidden_CH, weight_VH.t(), out=buffer_CV[: len(hidden_CH)])
    else:
        logits_CV = hidden_CH @ weight_VH.t()
    return logits_CV if bias_V is None else logits_CV.add_(bias_V)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    if a.dtype == dtype:
        return a @ b
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += _product(a, b, total.dtype)
