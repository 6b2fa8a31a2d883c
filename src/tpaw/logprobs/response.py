"""The one place that computes log π(y|x). Scoring and training both call it.

Shape suffixes: R tokens that are read, U distinct sequences, S sequences, V vocabulary.

The model is entered by its own forward, so that DDP, FSDP and DeepSpeed see the call. What its
output head is asked for travels beside that call: once `answer_with_logps` has changed the head, it
gives log-probs of the labels in place of logits while a question is open.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tpaw.logprobs.fused_head import token_logps
from tpaw.logprobs.packing import PackedBatch

# Of a head that is no plain matrix.
TOKENS_IN_A_CHUNK = 1024


class HeadChangedError(RuntimeError):
    """A model does something to what its output head gives, which log-probs would not survive."""


class LabelRequest:
    """Which tokens are read, what they should predict, and the head's answer."""

    def __init__(self, rows: PackedBatch) -> None:
        self.shape = rows["input_ids_BL"].shape
        self.read_R = rows["read_R"]
        self.labels_R = rows["labels_R"]
        self.logps_R: Tensor | None = None

    def read(self, states_BLX: Tensor) -> Tensor:
        """The hidden states, or logits, of the tokens that are read; (R, X)."""
        if states_BLX.shape[:2] != self.shape:
            raise ValueError(
                f"the model has positions {tuple(states_BLX.shape[:2])} for tokens "
                f"{tuple(self.shape)}; virtual tokens (prompt tuning) cannot be played with"
            )
        return states_BLX.flatten(0, 1)[self.read_R]


_QUESTION: ContextVar[LabelRequest | None] = ContextVar("question", default=None)


def response_logps(model: Callable[..., Any], rows: PackedBatch) -> Tensor:
    """log π(y|x): the sum over response tokens, end-of-sequence included where there is one.

    Args:
        model: a causal language model of transformers, wrapped or not. Packed rows need one that
            `logprob_model.prepare` gave that layout.
        rows: as `layout` makes them.

    Returns:
        float64 of shape (S,), natural logs in the order in which the sequences were given;
        differentiable. A sequence without response tokens is 0.

    Raises:
        HeadChangedError: the model gives other numbers than its output head answered.
        ValueError: the model has other positions than tokens.
    """
    inputs: dict[str, Any] = {"input_ids": rows["input_ids_BL"]}
    if "spans" in rows:
        inputs["position_ids"] = rows["position_ids_BL"]
        inputs["tpaw_spans"] = rows["spans"]
        # Nobody looks at it; a mask of four dimensions keeps transformers from making one.
        inputs["attention_mask"] = rows["input_ids_BL"].new_ones(1, 1, 1, 1, dtype=torch.bool)
    question = LabelRequest(rows)
    token = _QUESTION.set(question)
    try:
        output = model(**inputs, use_cache=False).logits
    finally:
        _QUESTION.reset(token)
    if question.logps_R is None:
        logps_R = _label_logps(question.read(output), rows["labels_R"])
    elif not _same(output, question.logps_R):
        raise HeadChangedError(
            "the model changes what its output head gives (a soft cap or scale, say)"
        )
    elif output.dtype == question.logps_R.dtype:
        logps_R = output
    else:
        # FSDP2 rounds what a wrapped model returns; its hooks need that output in the graph.
        logps_R = question.logps_R + 0 * output
    # Summed in float64: rewards are small differences of these sums.
    logps_U = torch.zeros(rows["distinct"], dtype=torch.float64, device=logps_R.device)
    logps_U = logps_U.index_add(0, rows["sequence_R"], logps_R.double())
    return logps_U[rows["distinct_S"]]


def answer_with_logps(head: nn.Module) -> None:
    """Make an output head answer `response_logps` with log-probs; nothing else notices."""
    if not hasattr(head, "logits_of"):
        head.logits_of = head.forward  # type: ignore[assignment]
        # Decided now: a wrapper may change the class of a module.
        head.is_plain_matrix = type(head) is nn.Linear  # type: ignore[assignment]
        # A method, so that a copy of the model is bound to its own head.
        head.forward = MethodType(_answer, head)


def answer_with_logits(head: nn.Module) -> None:
    """Undo `answer_with_logps`."""
    head.forward = head.logits_of  # type: ignore[assignment]
    del head.logits_of


def _answer(head: Any, hidden: Tensor) -> Any:
    question = _QUESTION.get()
    if question is None:
        return head.logits_of(hidden)
    hidden_RH = question.read(hidden)
    if head.is_plain_matrix:
        # Looked up in the call: FSDP and DeepSpeed put whole weights in their place for it.
        logps_R = token_logps(hidden_RH, head.weight, head.bias, question.labels_R)
    else:
        logps_R = _logps_by_logits(head.logits_of, hidden_RH, question.labels_R)
    question.logps_R = logps_R
    return logps_R


def _logps_by_logits(
    logits_of: Callable[[Tensor], Tensor], hidden_RH: Tensor, labels_R: Tensor
) -> Tensor:
    """For heads that are no plain matrix (LoRA, quantised): in chunks, again in backward."""

    def logps(hidden_CH: Tensor, labels_C: Tensor) -> Tensor:
        return _label_logps(logits_of(hidden_CH), labels_C)

    chunks = (torch.split(x, TOKENS_IN_A_CHUNK) for x in (hidden_RH, labels_R))
    pieces = zip(*chunks, strict=True)
    return torch.cat([checkpoint(logps, *piece, use_reentrant=False) for piece in pieces])


def _same(output: Tensor, logps_R: Tensor) -> bool:
    """Whether a model gave what its head answered, but for the type."""
    if output.shape != logps_R.shape:
        return False
    found, answered = output.detach(), logps_R.detach().to(output.dtype)
    return bool(((found == answered) | answered.isnan()).all())


def _label_logps(logits_RV: Tensor, labels_R: Tensor) -> Tensor:
    logits_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
    return -F.cross_entropy(logits_RV, labels_R, reduction="none")
