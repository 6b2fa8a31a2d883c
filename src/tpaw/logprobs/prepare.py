"""Prepares a loaded model for `response_logps`: attaches the head and chooses the layout.

The model's own configuration is checked first. Then a few tokens are computed the plain way and the
fast way, if all weights are on this device. A model that fails the trial uses the slower way, and a
note says why; it never gives wrong numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call

from tpaw.data.token_ids import TokenSequence, token_ids
from tpaw.logprobs.attention import PACKED
from tpaw.logprobs.packing import PACKED_LAYOUT, PADDED_LAYOUT, Layout
from tpaw.logprobs.response import HeadChangedError, LogprobHead, response_logps

# Relative, and absolute in nats. Two correct ways to compute a log-prob in fp32 differ by about
# 1e-6 of it, more in deep models with large activations. A wrong one is off by 1e-2 and more in a
# trained model; wrong positions in a random model of two layers by 8e-4.
RELATIVE_TOLERANCE, ABSOLUTE_TOLERANCE = 2e-5, 1e-4
# For the kernel that computes in bf16 alone. It checks for gross errors only.
BF16_RELATIVE_TOLERANCE, BF16_ABSOLUTE_TOLERANCE = 0.02, 0.2

PACKING_DISABLED = "Sequence packing is disabled for this model: {}. Training is about 2x slower."
LOGITS_HELD = "All logits are held in memory: {}. Lower tokens_per_row if memory runs out."


class Preparation(NamedTuple):
    """What `prepare_for_logprobs` decided.

    Attributes:
        layout: the layout to use for this model.
        notes: what must be done the slower way, and why; empty for most models.
    """

    layout: Layout
    notes: tuple[str, ...]


def prepare_for_logprobs(model: Any, longest: int) -> Preparation:
    """Attach a `LogprobHead` to a model and choose the layout of its sequences.

    Call it once after loading and before the model is wrapped (DDP, FSDP, DeepSpeed). For
    everything but `response_logps` the model behaves as before.

    Args:
        model: a causal language model of transformers, or one that PEFT has wrapped.
        longest: tokens of the longest prompt plus response.
    """
    module = getattr(model, "get_output_embeddings", lambda: None)()
    # An earlier preparation, around which LoRA may have been put since.
    if (earlier := LogprobHead.attached_to(model)) is not None:
        earlier.detach()
    if module is None:
        return Preparation(
            PADDED_LAYOUT, (LOGITS_HELD.format("the model has no output head that is known"),)
        )
    notes = []
    trial = _Trial(model)
    head = LogprobHead(module)
    head.attach()
    if (error := trial.error_of(PADDED_LAYOUT, head)) is not None:
        head.detach()
        notes.append(LOGITS_HELD.format(f"the model changes the output of its head ({error})"))
    reason = _why_not_packed(model)
    if reason is None:
        before = model.config._attn_implementation
        model.set_attn_implementation(PACKED.get(before, before))
        if (error := trial.error_of(PACKED_LAYOUT)) is not None:
            model.set_attn_implementation(before)
            reason = f"its attention gives other results from packed sequences ({error})"
    if reason is not None:
        notes.append(PACKING_DISABLED.format(reason))
    return Preparation(PADDED_LAYOUT if reason else PACKED_LAYOUT, tuple(notes))


class _Trial:
    """A few tokens, and their log-probs under the untouched model."""

    def __init__(self, model: Any) -> None:
        self.model = model
        vocabulary = model.get_input_embeddings().num_embeddings
        rng = np.random.default_rng(0)
        prompts = [token_ids(rng.integers(0, vocabulary, length)) for length in (1, 5)]
        self.sequences = [
            TokenSequence(prompt, token_ids(rng.integers(0, vocabulary, length)))
            for prompt in prompts
            for length in (4, 1, 3)
        ]
        # A sharded model runs only once it is wrapped; its configuration alone must do.
        self.is_possible = not any(
            p.is_meta or isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters()
        )
        self.expected_S = self._logps(PADDED_LAYOUT)

    def error_of(self, layout: Layout, new_head: LogprobHead | None = None) -> str | None:
        """How the model, as it is now, fails to give the same log-probs; None if it gives them.

        Args:
            new_head: a head that does not know its logit map yet.
        """
        if not self.is_possible:
            return None
        try:
            if new_head is not None:
                new_head.learn_logit_map(self.model)
            error = _difference(
                self._logps(layout), self.expected_S, RELATIVE_TOLERANCE, ABSOLUTE_TOLERANCE
            )
            if error is None and next(self.model.parameters()).device.type == "cuda":
                # Packed rows use a kernel for bf16 alone there.
                rounded_S = self._logps(layout, in_bf16=True)
                tolerances = BF16_RELATIVE_TOLERANCE, BF16_ABSOLUTE_TOLERANCE
                error = _difference(rounded_S, self.expected_S, *tolerances)
        except (TypeError, ValueError, RuntimeError, HeadChangedError) as problem:
            return f"{type(problem).__name__}: {str(problem).partition(chr(10))[0][:200]}"
        return error

    def _logps(self, layout: Layout, in_bf16: bool = False) -> Tensor:
        if not self.is_possible:
            return torch.empty(0)
        device = next(self.model.parameters()).device
        # In fp32, whatever the weights are: rounding to bf16 would hide a difference.
        wide = {
            name: parameter.float()
            for name, parameter in self.model.named_parameters()
            if parameter.dtype in (torch.bfloat16, torch.float16)
        }

        def entered(**inputs: Any) -> Any:
            return functional_call(self.model, wide, (), inputs)

        head = LogprobHead.attached_to(self.model)
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=in_bf16)
        with torch.no_grad(), autocast, _narrow_windows(self.model):
            batch = send_to_device(layout.collate(self.sequences), device)
            logps_S = response_logps(entered, batch, head)
        if head is not None:
            head.raise_if_changed()
        return logps_S


@contextlib.contextmanager
def _narrow_windows(model: nn.Module) -> Iterator[None]:
    """Narrow each sliding window to 3 tokens, so that windows matter in the trial."""
    found: dict[int, Any] = {}
    for module in model.modules():
        for owner in (module, getattr(module, "config", None)):
            if type(getattr(owner, "__dict__", {}).get("sliding_window")) is int:
                found[id(owner)] = owner
    windows = [owner.sliding_window for owner in found.values()]
    try:
        for owner in found.values():
            owner.sliding_window = min(owner.sliding_window, 3)
        yield
    finally:
        for owner, window in zip(found.values(), windows, strict=True):
            owner.sliding_window = window


def _difference(
    found_S: Tensor, expected_S: Tensor, relative: float, absolute: float
) -> str | None:
    if torch.allclose(found_S, expected_S, rtol=relative, atol=absolute):
        return None
    return f"off by {float((found_S - expected_S).abs().max()):.1g} nats on a few tokens"


def _why_not_packed(model: Any) -> str | None:
    config = model.config.get_text_config()
    attention = config._attn_implementation
    # Eager attention is a choice if the model has SDPA, and all that it has if not.
    if attention not in ("sdpa", *PACKED.values()) and (
        attention != "eager" or model._supports_sdpa
    ):
        return f"its attention is {attention!r}, not sdpa"
    if not model.is_backend_compatible():
        return "its attention does not follow transformers' interface"
    kinds = set(getattr(config, "layer_types", None) or ())
    other = kinds - {"full_attention", "sliding_attention"}
    if other:
        return f"it has layers of {', '.join(sorted(other))}"
    if "sliding_attention" in kinds and getattr(config, "sliding_window", None) is None:
        return "the size of its attention window is unknown"
    return None
