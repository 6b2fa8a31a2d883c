"""Prepares a loaded model for `response_logps`: attaches the head and chooses the layout.

Before a model is used, a few tokens are computed. What is expected comes from the model's own
forward, one sequence at a time. A model whose log-probs see later tokens, or whose padded rows
give other log-probs, is refused. Then the fast ways are tried: log-probs without logits, and packed
rows. Where one of them differs, the slower way is used and a note says why. A model never gets a
way that gives wrong numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.func import functional_call

from tpaw.data.token_ids import TokenIds, TokenSequence, token_ids
from tpaw.errors import InputError, first_line, printable
from tpaw.logprobs.attention import PACKED, PackingError
from tpaw.logprobs.packing import (
    PACKED_LAYOUT,
    PADDED_LAYOUT,
    Layout,
    PackedBatch,
    padded_batch,
)
from tpaw.logprobs.response import HeadChangedError, LogprobHead, response_logps
from tpaw.models.checks import why_length_matters
from tpaw.models.loading import is_sharded
from tpaw.models.quantization import computing_in_fp32
from tpaw.runtime.memory import has_room_for

# Relative, and absolute in nats. Two correct ways to compute a log-prob in fp32 differ by about
# 1e-6 of it, more in deep models with large activations. A wrong one is off by 1e-2 and more in a
# trained model; wrong positions in a random model of two layers by 8e-4.
RELATIVE_TOLERANCE, ABSOLUTE_TOLERANCE = 2e-5, 1e-4
# For computation in bf16. It checks for gross errors only.
BF16_RELATIVE_TOLERANCE, BF16_ABSOLUTE_TOLERANCE = 0.02, 0.2

# Most tokens of a sequence of the trial.
LONG_TRIAL = 133

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

    @property
    def holds_logits(self) -> bool:
        """Whether the logits of all tokens of a forward pass are in memory at once."""
        return any(note.startswith(LOGITS_HELD.partition(":")[0]) for note in self.notes)

    def described(self) -> tuple[str, ...]:
        """How the log-probs of this model are computed, as sentences; the notes come last."""
        is_packed = self.layout is PACKED_LAYOUT
        return (
            "Layout: packed rows, in which responses share their prompt."
            if is_packed
            else "Layout: one sequence per row.",
            "Output head: all logits are held."
            if self.holds_logits
            else "Output head: log-probs, without holding the logits.",
            *self.notes,
        )


def prepare_for_logprobs(model: Any, longest: int) -> Preparation:
    """Attach a `LogprobHead` to a model and choose the layout of its sequences.

    Call it once after loading and before the model is wrapped (DDP, FSDP, DeepSpeed). For
    everything but `response_logps` the model behaves as before.

    Args:
        model: a causal language model of transformers, or one that PEFT has wrapped.
        longest: tokens of the longest prompt plus response.

    Raises:
        InputError: the model is not causal, its log-probs depend on the other sequences of a batch,
            or it fails on a few tokens.
    """
    # An earlier preparation, around which LoRA may have been put since.
    if (earlier := LogprobHead.attached_to(model)) is not None:
        earlier.detach()
    if (reason := why_length_matters(model.config, longest)) is not None:
        raise InputError(f"the longest prompt plus response has {longest} tokens: {reason}")
    trial = _Trial(model, longest)
    trial.refuse_a_wrong_model()
    module = getattr(model, "get_output_embeddings", lambda: None)()
    if module is None:
        return Preparation(
            PADDED_LAYOUT, (LOGITS_HELD.format("the model has no output head that is known"),)
        )
    notes = []
    head = LogprobHead(module)
    head.attach()
    if (reason := _why_logits_are_held(trial, head)) is not None:
        head.detach()
        notes.append(LOGITS_HELD.format(reason))
    reason = _why_not_packed(model)
    if reason is None:
        before = model.config._attn_implementation
        model.set_attn_implementation(PACKED.get(before, before))
        if (reason := _why_packing_fails(trial)) is not None:
            model.set_attn_implementation(before)
    if reason is not None:
        notes.append(PACKING_DISABLED.format(reason))
    return Preparation(PADDED_LAYOUT if reason else PACKED_LAYOUT, tuple(notes))


class _Trial:
    """A few tokens, and their log-probs by the model's own forward, one sequence at a time.

    Attributes:
        longest: tokens of the longest sequence that the model will get.
        sequences: of different lengths; some share their prompt.
        is_possible: false for a sharded model, which runs only once it is wrapped.
        expected_S: float64, in nats.
        tolerances: relative and absolute, in nats, for two correct ways to compute a log-prob.
    """

    def __init__(self, model: Any, longest: int) -> None:
        self.model = model
        self.longest = longest
        # From the configuration: LoRA and others put their own modules around the embeddings.
        self.vocabulary = model.config.get_text_config().vocab_size
        self._rng = np.random.default_rng(0)
        prompts = [self._random_ids(length) for length in (1, 5)]
        self.sequences = [
            TokenSequence(prompt, self._random_ids(length))
            for prompt in prompts
            for length in (4, 1, 3)
        ]
        # Some models compute long sequences otherwise, in chunks for example. An odd length is no
        # multiple of a chunk.
        length = (min(longest, LONG_TRIAL) - 1) // 2 * 2 + 1
        if length > max(len(prompt) + len(response) for prompt, response in self.sequences):
            prompt = self._random_ids(length - 3)
            self.sequences.append(TokenSequence(prompt, self._random_ids(3)))
        self.is_possible = not is_sharded(model)
        self.expected_S = torch.empty(0)
        self.tolerances = RELATIVE_TOLERANCE, ABSOLUTE_TOLERANCE
        # In fp32, whatever the weights are: rounding to bf16 would hide a difference.
        rounded = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.dtype in (torch.bfloat16, torch.float16) and self.is_possible
        }
        needed = sum(parameter.numel() * torch.float32.itemsize for parameter in rounded.values())
        if rounded and not has_room_for(needed, next(model.parameters()).device):
            self.tolerances = BF16_RELATIVE_TOLERANCE, BF16_ABSOLUTE_TOLERANCE
            rounded = {}
        self._wide = {name: parameter.float() for name, parameter in rounded.items()}

    def refuse_a_wrong_model(self) -> None:
        """Compare sequences that stand alone with the padded rows that any model can get.

        Raises:
            InputError: the model fails, or the log-probs differ.
        """
        if not self.is_possible:
            return
        rows = padded_batch(self.sequences)
        continued: PackedBatch = {**rows, "input_ids_BL": self._continued(rows["input_ids_BL"])}
        try:
            alone = [self._logps(padded_batch([sequence])) for sequence in self.sequences]
            padded_S, continued_S = self._logps(rows), self._logps(continued)
            self._run_in_training_mode()
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, RuntimeError, LookupError, AssertionError) as error:
            raise InputError(
                f"{_kind_of(self.model)} cannot be used: it fails on a few tokens "
                f"({_named(error)}); choose another model"
            ) from error
        self.expected_S = torch.cat(alone)
        kind = _kind_of(self.model)
        if (change := self._difference(continued_S, padded_S)) is not None:
            advice = "choose a causal model"
            if getattr(self.model.config.get_text_config(), "is_decoder", None) is False:
                advice += "; if it was trained as one, set is_decoder to true in its config.json"
            raise InputError(
                f"{kind} is not causal: log-probs change {change} when only later tokens change, "
                f"so each token sees those that it must predict; {advice}"
            )
        if (change := self._difference(padded_S, self.expected_S)) is not None:
            raise InputError(
                f"{kind} cannot be used: the log-probs of a sequence change {change} when it is "
                "padded on the right beside other sequences; choose another model"
            )

    def error_of(self, layout: Layout, new_head: LogprobHead | None = None) -> str | None:
        """How the model, as it is now, fails to give the same log-probs; None if it gives them.

        Args:
            new_head: a head that does not know its logit map yet.
        """
        if not self.is_possible:
            return None
        if new_head is not None:
            new_head.learn_logit_map(self.model)
        error = self._difference(self._logps(layout.collate(self.sequences)), self.expected_S)
        weight = next(self.model.parameters())
        if error is None and weight.device.type == "cuda" and weight.dtype != torch.float64:
            # Packed rows use a kernel for bf16 alone there. Autocast leaves float64 as it is.
            rounded_S = self._logps(layout.collate(self.sequences), in_bf16=True)
            tolerances = BF16_RELATIVE_TOLERANCE, BF16_ABSOLUTE_TOLERANCE
            error = _difference(rounded_S, self.expected_S, *tolerances)
        return None if error is None else f"off {error}"

    def _difference(self, found_S: Tensor, expected_S: Tensor) -> str | None:
        return _difference(found_S, expected_S, *self.tolerances)

    def _run_in_training_mode(self) -> None:
        """The longest sequence, as training computes it. Some models then take fewer lengths."""
        modes = [(module, module.training) for module in self.model.modules()]
        device = next(self.model.parameters()).device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            try:
                self.model.train()
                self._logps(padded_batch([self.sequences[-1]]))
            finally:
                for module, mode in modes:
                    module.training = mode

    def _logps(self, batch: PackedBatch, in_bf16: bool = False) -> Tensor:
        device = next(self.model.parameters()).device

        def entered(**inputs: Any) -> Any:
            return functional_call(self.model, self._wide, (), inputs)

        head = LogprobHead.attached_to(self.model)
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=in_bf16)
        windows = _narrow_windows(self.model, self.longest)
        with torch.no_grad(), autocast, windows, computing_in_fp32(self.model):
            logps_S = response_logps(entered, send_to_device(batch, device), head)
        if head is not None:
            head.raise_if_changed()
        return logps_S

    def _continued(self, input_ids_BL: Tensor) -> Tensor:
        """The padded rows with other tokens in place of the padding."""
        continued_BL = input_ids_BL.clone()
        for row, (prompt, response) in enumerate(self.sequences):
            end = len(prompt) + len(response)
            others = self._random_ids(input_ids_BL.shape[1] - end)
            continued_BL[row, end:] = torch.from_numpy(others.astype(np.int64))
        return continued_BL

    def _random_ids(self, length: int) -> TokenIds:
        return token_ids(self._rng.integers(0, self.vocabulary, length))


@contextlib.contextmanager
def _narrow_windows(model: nn.Module, longest: int) -> Iterator[None]:
    """Narrow each sliding window that will matter to 3 tokens, so that it matters in the trial."""
    found: dict[int, Any] = {}
    for module in model.modules():
        for owner in (module, getattr(module, "config", None)):
            window = getattr(owner, "__dict__", {}).get("sliding_window")
            if type(window) is int and window < longest:
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
    if torch.allclose(found_S, expected_S, rtol=relative, atol=absolute, equal_nan=True):
        return None
    return f"by {float((found_S - expected_S).abs().max()):.1g} nats on a few tokens"


def _kind_of(model: Any) -> str:
    return f"model type {printable(str(model.config.model_type))}"


def _named(error: Exception) -> str:
    return printable(f"{type(error).__name__}: {first_line(error)}")


def _why_logits_are_held(trial: _Trial, head: LogprobHead) -> str | None:
    change = "the model changes the output of its head"
    try:
        error = trial.error_of(PADDED_LAYOUT, head)
    except HeadChangedError:
        return f"{change} by more than a scale and a soft cap"
    return None if error is None else f"{change} ({error})"


def _why_packing_fails(trial: _Trial) -> str | None:
    try:
        error = trial.error_of(PACKED_LAYOUT)
    except PackingError as problem:
        return str(problem)
    except RuntimeError as problem:
        # A tensor of another shape or stride than the model expects. Whatever else fails is no
        # property of the model: memory that runs out, a kernel that is not there, a wrong call.
        if type(problem) is not RuntimeError:
            raise
        return f"it fails on packed sequences ({_named(problem)})"
    if error is None:
        return None
    return f"its attention gives other results from packed sequences ({error})"


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
