"""The one place that computes log π(y|x). Scoring and training both call `response_logps`.

Shape suffixes: R tokens whose next token is a label, U distinct sequences, S sequences,
V vocabulary, H hidden size, X either V or H.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tpaw.logprobs.fused_head import UNCHANGED, LogitMap, token_logps
from tpaw.logprobs.packing import PackedBatch

# Tokens in a chunk, for a head that is not a plain matrix.
TOKENS_IN_A_CHUNK = 1024
# Outputs of a head that show what a model does to them: the first gives the scale, the second the
# cap, and the others show whether it is something else.
_PROBE = torch.tensor([2.0**-40, 2.0**40, -1.0, 3.0, -30.0, 200.0], dtype=torch.float64)


class HeadChangedError(RuntimeError):
    """The model changes the output of its head in a way that `LogprobHead.logit_map` does not."""


class LabelRequest:
    """Which tokens the head must evaluate, their labels, and the log-probs once it has.

    Attributes:
        labels_R: int64, the token that each selected position must predict.
        logps_R: log-prob of each label; None until the head has run.
    """

    def __init__(self, batch: PackedBatch) -> None:
        self.labels_R = batch["labels_R"]
        self.logps_R: Tensor | None = None
        self._shape = batch["input_ids_BL"].shape
        self._read_R = batch["read_R"]

    def select(self, states_BLX: Tensor) -> Tensor:
        """Hidden states, or logits, of the tokens that predict a label; (R, X).

        Raises:
            ValueError: the model has other positions than tokens.
        """
        if states_BLX.shape[:2] != self._shape:
            raise ValueError(
                f"the model returned positions {tuple(states_BLX.shape[:2])} for tokens "
                f"{tuple(self._shape)}; prompt tuning and other virtual tokens are not supported"
            )
        return states_BLX.flatten(0, 1)[self._read_R]


class LogprobHead:
    """Makes an output head return log-probs of labels in place of logits, on request.

    `attach` replaces the `forward` of this one module; no class and no weight changes, so a
    checkpoint keeps its names. A wrapper module would rename the weights, and calling the head
    apart from the model would bypass the hooks of DDP, FSDP and DeepSpeed.

    Attributes:
        logit_map: what the model does to the output of the head; see `learn_logit_map`.
        has_changed: bool tensor on the device, true once the model did something else to a log-prob
            that the head had returned; None if no output ever had to be compared.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.logit_map: LogitMap = UNCHANGED
        self.has_changed: Tensor | None = None
        self._logits_of = module.forward
        # Decided now: a wrapper may change the class of the module later.
        self._is_plain_matrix = type(module) is nn.Linear
        self._request: LabelRequest | None = None
        self._is_probed = False

    @classmethod
    def attached_to(cls, model: Any) -> LogprobHead | None:
        """The head that is attached anywhere in a model, wrapped or not."""
        for module in model.modules() if isinstance(model, nn.Module) else ():
            owner = getattr(vars(module).get("forward"), "__self__", None)
            if isinstance(owner, cls):
                return owner
        return None

    def attach(self) -> None:
        """Replace the module's forward."""
        # A bound method, so that a deep copy of the model is bound to a copy of this head.
        self.module.forward = self._forward

    def detach(self) -> None:
        """Give the module its own forward back."""
        del self.module.forward
        if self.module.forward != self._logits_of:  # it was an instance attribute before
            self.module.forward = self._logits_of

    def learn_logit_map(self, model: Callable[..., Any]) -> None:
        """Find out what the model does to the output of its head, by known outputs.

        transformers has no name for it: Gemma 2 caps, Granite divides, Cohere multiplies.

        Raises:
            HeadChangedError: the model does something else than to scale and to cap, or does it by
                weights that are trained.
        """
        device = next(self.module.parameters()).device
        ids = torch.zeros((1, 2), dtype=torch.int64, device=device)
        self._is_probed = True
        try:
            found = model(input_ids=ids, use_cache=False).logits
        except (RuntimeError, IndexError) as error:
            # The model expects logits of another shape. Memory that runs out is another matter.
            if type(error) not in (RuntimeError, IndexError):
                raise
            raise HeadChangedError(_CHANGED) from error
        finally:
            self._is_probed = False
        if found.shape != _PROBE.shape or found.requires_grad:
            raise HeadChangedError(_CHANGED)
        found = found.double()
        slope = (found / _PROBE).tolist()
        self.logit_map = LogitMap(slope[0], None if slope[1] > slope[0] / 2 else float(found[1]))
        if not torch.allclose(self.logit_map.of(_PROBE), found, rtol=1e-5):
            self.logit_map = UNCHANGED
            raise HeadChangedError(_CHANGED)

    @contextlib.contextmanager
    def answering(self, request: LabelRequest) -> Iterator[None]:
        """Return the request's log-probs instead of logits while in this context."""
        self._request = request
        try:
            yield
        finally:
            self._request = None

    def keep_if_unchanged(self, output: Tensor, logps_R: Tensor) -> Tensor:
        """The log-probs; NaN if the model did something else to them than the logit map.

        Nothing is read back from the device. `raise_if_changed` does that.
        """
        if output is logps_R:
            return logps_R
        if output.shape != logps_R.shape:
            raise HeadChangedError(_CHANGED)
        found = output.detach()
        expected = self.logit_map.of(logps_R.detach()).to(output.dtype)
        # A map is computed in another order here than in the model.
        tolerance = 0 if self.logit_map == UNCHANGED else 8 * torch.finfo(output.dtype).eps
        is_equal = torch.isclose(found, expected, rtol=tolerance, atol=0, equal_nan=True)
        changed = ~(is_equal | expected.isnan()).all()
        self.has_changed = changed if self.has_changed is None else self.has_changed | changed
        # FSDP2 rounds what a wrapped model returns; its hooks need that output in the graph.
        is_kept = output.dtype == logps_R.dtype and self.logit_map == UNCHANGED
        kept_R = output if is_kept else logps_R + 0 * output
        return torch.where(changed, torch.nan, kept_R)

    def raise_if_changed(self) -> None:
        """Raise HeadChangedError if the model ever changed the output. Waits for the device."""
        if self.has_changed is not None and bool(self.has_changed):
            raise HeadChangedError(_CHANGED)

    def _forward(self, hidden: Tensor) -> Tensor:
        if self._is_probed:
            return _PROBE
        request = self._request
        if request is None:
            return self._logits_of(hidden)  # type: ignore[no-any-return]
        hidden_RH = request.select(hidden)
        if self._is_plain_matrix:
            # Read in the call: FSDP and DeepSpeed gather the whole weights for it.
            weight, bias = self.module.weight, self.module.bias
            request.logps_R = token_logps(
                hidden_RH,
                weight,  # type: ignore[arg-type]
                bias,  # type: ignore[arg-type]
                request.labels_R,
                self.logit_map,
            )
        else:
            request.logps_R = _logps_by_logits(
                lambda hidden_CH: self.logit_map.of(self._logits_of(hidden_CH)),
                hidden_RH,
                request.labels_R,
            )
        return request.logps_R


_CHANGED = "the model changes the output of its head, and not by a factor and a soft cap alone"


def response_logps(
    model: Callable[..., Any], batch: PackedBatch, head: LogprobHead | None = None
) -> Tensor:
    """log π(y|x): the sum over response tokens, end-of-sequence included where there is one.

    Args:
        model: a causal language model of transformers, wrapped or not. A packed batch needs a model
            for which `prepare_for_logprobs` chose that layout.
        batch: made by one of the layouts of `packing`.
        head: default: the head that is attached to `model`. Without any, all logits are held.

    Returns:
        float64 of shape (S,), in nats, in the order in which the sequences were given;
        differentiable. A sequence without response tokens is 0. NaN where the model changed the
        output of its head; see `LogprobHead.raise_if_changed`.

    Raises:
        HeadChangedError: the model changed the shape of its head's output.
        ValueError: the model has other positions than tokens.
    """
    inputs: dict[str, Any] = {"input_ids": batch["input_ids_BL"]}
    if "spans" in batch:
        inputs["position_ids"] = batch["position_ids_BL"]
        inputs["tpaw_spans"] = batch["spans"]
        # transformers builds no mask when it gets one of four dimensions. Packed attention
        # ignores it.
        inputs["attention_mask"] = batch["input_ids_BL"].new_ones(1, 1, 1, 1, dtype=torch.bool)
    head = head or LogprobHead.attached_to(model)
    request = LabelRequest(batch)
    with head.answering(request) if head else contextlib.nullcontext():
        output = model(**inputs, use_cache=False).logits
    if head is None or request.logps_R is None:
        logps_R = _label_logps(request.select(output), batch["labels_R"])
    else:
        logps_R = head.keep_if_unchanged(output, request.logps_R)
    # Summed in float64: rewards are small differences of these sums.
    logps_U = torch.zeros(batch["distinct"], dtype=torch.float64, device=logps_R.device)
    logps_U = logps_U.index_add(0, batch["sequence_R"], logps_R.double())
    return logps_U[batch["distinct_S"]]


def _logps_by_logits(
    logits_of: Callable[[Tensor], Tensor], hidden_RH: Tensor, labels_R: Tensor
) -> Tensor:
    """For a head that is not a plain matrix (LoRA, quantised): chunks, recomputed in backward."""

    def logps(hidden_CH: Tensor, labels_C: Tensor) -> Tensor:
        return _label_logps(logits_of(hidden_CH), labels_C)

    chunks = (torch.split(x, TOKENS_IN_A_CHUNK) for x in (hidden_RH, labels_R))
    pieces = zip(*chunks, strict=True)
    return torch.cat([checkpoint(logps, *piece, use_reentrant=False) for piece in pieces])


def _label_logps(logits_RV: Tensor, labels_R: Tensor) -> Tensor:
    logits_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
    return -F.cross_entropy(logits_RV, labels_R, reduction="none")
