"""Makes a model fit for `logprobs`: which layout its attention can take, and a head that answers.

What a model says of itself is also tried on a few tokens, where its weights are all there, so that
one that is different from what it seems falls back to the slower way and not to wrong numbers. A
head whose answer a model changes is noticed in every call.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.func import functional_call

from tpaw.data.token_ids import token_ids
from tpaw.logprobs.attention import PACKED
from tpaw.logprobs.packing import PACKED_LAYOUT, PADDED_LAYOUT, Layout
from tpaw.logprobs.response import answer_with_logits, answer_with_logps, response_logps

# Relative, and nats. Two ways to compute a log-prob in fp32 part by some 1e-6 of it, more in deep
# models with large activations. What is wrong in a trained model is off by 1e-2 and more; wrong
# positions in a random one of two layers by 8e-4.
_TOLERANCE = (2e-5, 1e-4)


class Preparation(NamedTuple):
    """What `prepare` found.

    Attributes:
        layout: the rows to make for the model.
        notes: what has to be done the slow way, and why; empty for most models.
    """

    layout: Layout
    notes: tuple[str, ...]


def prepare_for_logprobs(model: Any, longest: int) -> Preparation:
    """Make a model answer with log-probs, from packed rows if it can.

    To be called before the model is wrapped (DDP, FSDP, DeepSpeed). For everything but
    `response_logps` the model stays what it was.

    Args:
        model: a causal language model of transformers, also one that PEFT has wrapped.
        longest: tokens of the longest prompt and response.
    """
    notes = []
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        return Preparation(PADDED_LAYOUT, ("all logits are held: no output head is to be found",))
    for module in model.modules():  # an earlier head, around which LoRA has been put since
        if module is not head and "logits_of" in vars(module):
            answer_with_logits(module)
    plain = _Trial(model, PADDED_LAYOUT)
    answer_with_logps(head)
    if not plain.agrees_with(PADDED_LAYOUT):
        answer_with_logits(head)
        notes.append("all logits are held: the model changes what its output head gives")
    reason = _why_not_packed(model, longest)
    if reason is None:
        before = model.config._attn_implementation
        model.set_attn_implementation(PACKED)
        if not plain.agrees_with(PACKED_LAYOUT):
            model.set_attn_implementation(before)
            reason = "its attention gives other results from packed rows"
    if reason is not None:
        notes.append(f"one sequence a row, prompts not shared: {reason}")
    return Preparation(PADDED_LAYOUT if reason else PACKED_LAYOUT, tuple(notes))


class _Trial:
    """A few tokens whose log-probs a model gave while it was still untouched."""

    def __init__(self, model: Any, layout: Layout) -> None:
        self.model = model
        vocabulary = model.get_input_embeddings().num_embeddings
        rng = np.random.default_rng(0)
        prompts = [token_ids(rng.integers(0, vocabulary, length)) for length in (1, 5)]
        self.sequences = [
            (prompt, token_ids(rng.integers(0, vocabulary, length)))
            for prompt in prompts
            for length in (4, 1, 3)
        ]
        # A sharded model can be entered only once it is wrapped; there, what it says must do.
        self.is_possible = not any(
            p.is_meta or isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters()
        )
        self.expected = self._logps(layout)

    def agrees_with(self, layout: Layout) -> bool:
        """Whether the model, as it is now, gives the same log-probs from a layout."""
        if not self.is_possible:
            return True
        try:
            found = self._logps(layout)
            if next(self.model.parameters()).device.type == "cuda":
                # A kernel for bf16 alone takes part too; what it rounds is no reason against it.
                rounded = self._logps(layout, in_bf16=True)
                if not torch.allclose(rounded, self.expected, rtol=0.02, atol=0.2):
                    return False
        except (TypeError, ValueError, RuntimeError):
            return False
        relative, absolute = _TOLERANCE
        return torch.allclose(found, self.expected, rtol=relative, atol=absolute)

    def _logps(self, layout: Layout, in_bf16: bool = False) -> Tensor:
        if not self.is_possible:
            return torch.empty(0)
        device = next(self.model.parameters()).device
        # In fp32, whatever the weights are: bf16 would hide a difference in its rounding.
        wide = {
            name: parameter.float()
            for name, parameter in self.model.named_parameters()
            if parameter.dtype in (torch.bfloat16, torch.float16)
        }

        def entered(**inputs: Any) -> Any:
            return functional_call(self.model, wide, (), inputs)

        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=in_bf16):
            return response_logps(entered, send_to_device(layout.rows(self.sequences), device))


def _why_not_packed(model: Any, longest: int) -> str | None:
    config = model.config.get_text_config()
    if config._attn_implementation not in ("sdpa", PACKED):
        return f"its attention is {config._attn_implementation!r}, not sdpa"
    if not model.is_backend_compatible():
        return "its attention does not follow transformers' interface"
    kinds = set(getattr(config, "layer_types", None) or ())
    other = kinds - {"full_attention", "sliding_attention"}
    if other:
        return f"it has layers of {', '.join(sorted(other))}"
    window = getattr(config, "sliding_window", None)
    is_sliding = "sliding_attention" in kinds or not kinds
    if window is not None and is_sliding and window < longest:
        return f"its window of {window} tokens is shorter than {longest}"
    return None
