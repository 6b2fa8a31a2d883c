"""Which prompts a model may answer in one batch. A few tokens decide it, once for each model.

Some models of transformers give a prompt other logits if it shares its batch with longer ones. The
padding leaks into their state (MiniMax, DeepSeek-V4, RecurrentGemma) or shifts their positions (the
decoders of the BART family). RWKV mixes the prompts of a batch even if their lengths are equal.
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Iterator, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tpaw.data.token_ids import TokenIds, token_ids
from tpaw.errors import NonFiniteError
from tpaw.generation.continuous_batching import greedy_logits, why_unsupported
from tpaw.generation.generator import SamplingParams
from tpaw.generation.padded_batches import generate_padded
from tpaw.models.finite import non_finite
from tpaw.models.quantization import computing_in_fp32
from tpaw.runtime.memory import has_room_for

# Lengths of the prompts of the trial. Padding is most of the shorter ones. DeepSeek-V4 compresses
# 128 tokens into one, so the longest has more; a convolution looks beyond the shortest.
TRIAL_LENGTHS = (144, 1, 5, 20)
TRIAL_STEPS = 4
# Largest difference of the logits of a prompt in a batch from those of the prompt alone, relative
# to the spread of the logits over the vocabulary. Right models gave up to 1e-5, wrong ones 3e-2 and
# more.
TOLERANCE = 1e-2
# The same for the median over all tokens, where a model is too large to compute in fp32. Rounding
# gave up to 6e-2 in bf16, and more where it chose another expert; wrong models gave 1e-1 and more.
LOW_PRECISION_TOLERANCE = 0.1


class Batching(enum.Enum):
    """How a model answers prompts. The members are in the order of their speed."""

    CONTINUOUS = "by continuous batching"
    ANY_LENGTHS = "in batches of prompts of any length"
    EQUAL_LENGTHS = "in batches of prompts of equal length"
    ONE_BY_ONE = "one prompt at a time"
    WITHOUT_CACHE = "one prompt at a time and without a cache"


class BatchingChoice(NamedTuple):
    """The fastest way for a model to answer that gives the right logits.

    Attributes:
        batching: the way.
        reasons: why each faster way is not used; empty for most models.
    """

    batching: Batching
    reasons: tuple[str, ...]

    @property
    def note(self) -> str | None:
        """One line for the user; None if nothing is slower than usual."""
        if not self.reasons:
            return None
        return (
            "Continuous batching is disabled for this model, so generation is slower: "
            f"{'; '.join(self.reasons)}. It answers {self.batching.value}."
        )


_CHOICES: WeakKeyDictionary[PreTrainedModel, BatchingChoice] = WeakKeyDictionary()


def choose_batching(model: PreTrainedModel) -> BatchingChoice:
    """Choose the fastest way that gives a prompt the logits that it has alone.

    The first call for a model generates a few tokens; later calls return the same choice.

    Args:
        model: a model in evaluation mode, with an empty generation config.

    Raises:
        NonFiniteError: the model's logits are NaN or infinite.
    """
    if model not in _CHOICES:
        _CHOICES[model] = _choose(model)
    return _CHOICES[model]


def _choose(model: PreTrainedModel) -> BatchingChoice:
    reasons = []
    for batching in Batching:
        if batching is Batching.CONTINUOUS and (reason := why_unsupported(model)) is not None:
            reasons.append(reason)
            continue
        difference = _difference(model, batching)
        if difference is None:
            return BatchingChoice(batching, tuple(reasons))
        reasons.append(f"{batching.value}, its logits are {difference}")
    return BatchingChoice(batching, tuple(reasons[:-1]))


def _difference(model: PreTrainedModel, batching: Batching) -> str | None:
    """Say how the logits in a batch differ from those of each prompt alone; None if they agree."""
    try:
        with _in_fp32(model) as is_precise:
            errors = _errors(model, batching)
    except NonFiniteError:
        if batching is Batching.WITHOUT_CACHE:
            raise  # the model is broken, and not only its padded batches
        return "NaN"
    error = float(errors.max() if is_precise else errors.median())
    if error <= (TOLERANCE if is_precise else LOW_PRECISION_TOLERANCE):
        return None
    return f"off by {error:.0%}"


@contextlib.contextmanager
def _in_fp32(model: PreTrainedModel) -> Iterator[bool]:
    """Widen bf16 and fp16 weights for the time of the context, because rounding hides differences.

    Yields:
        Whether the model computes in fp32. It does not if the memory is too small.
    """
    rounded = [
        (tensor, tensor.data)
        for tensor in (*model.parameters(), *model.buffers())
        if tensor.dtype in (torch.bfloat16, torch.float16)
    ]
    needed = sum(data.numel() * torch.float32.itemsize for _, data in rounded)
    if not has_room_for(needed, model.device):
        yield False
        return
    try:
        for tensor, data in rounded:
            tensor.data = data.float()
        with computing_in_fp32(model):
            yield True
    finally:
        for tensor, data in rounded:
            tensor.data = data


@torch.inference_mode()
def _errors(model: PreTrainedModel, batching: Batching) -> Tensor:
    """The relative difference for each emitted token, (prompts × steps)."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = min(TRIAL_LENGTHS[0], (positions or 10**6) - TRIAL_STEPS)
    lengths = [min(length, longest) for length in TRIAL_LENGTHS]
    if batching is Batching.EQUAL_LENGTHS:
        lengths = [longest] * len(lengths)
    vocabulary = model.get_input_embeddings().num_embeddings
    rng = np.random.default_rng(0)
    prompts = [token_ids(rng.integers(0, vocabulary, length)) for length in lengths]
    is_alone = batching in (Batching.ONE_BY_ONE, Batching.WITHOUT_CACHE)
    errors = []
    for batch in [[prompt] for prompt in prompts] if is_alone else [prompts]:
        emitted, found_NTV = _greedy(model, batch, batching)
        for prompt, response, found_TV in zip(batch, emitted, found_NTV, strict=True):
            ids = torch.tensor([[*prompt, *response]], device=model.device)
            logits_LV = model(input_ids=ids, use_cache=False).logits[0].float()
            errors.append(_relative_error(model, found_TV, logits_LV[len(prompt) - 1 : -1]))
    return torch.cat(errors)


def _greedy(
    model: PreTrainedModel, prompts: Sequence[TokenIds], batching: Batching
) -> tuple[list[list[int]], Tensor]:
    """A few greedy tokens for each prompt, and their logits, (prompts, steps, vocabulary)."""
    if batching is Batching.CONTINUOUS:
        return greedy_logits(model, prompts, TRIAL_STEPS)
    params = SamplingParams(0.0, 1.0, 0, TRIAL_STEPS, max_length=10**6, stop_token_ids=())
    use_cache = batching is not Batching.WITHOUT_CACHE
    emitted, logits_NTV = generate_padded(
        model, prompts, params, use_cache=use_cache, keep_logits=True
    )
    assert logits_NTV is not None
    return emitted, logits_NTV.float()


def _relative_error(model: PreTrainedModel, found_TV: Tensor, expected_TV: Tensor) -> Tensor:
    if not all(bool(logits.amax(-1).isfinite().all()) for logits in (found_TV, expected_TV)):
        raise non_finite(model, "logits")
    # Some models set the logits of unused tokens to -inf.
    is_used_TV = ~(found_TV.isinf() & expected_TV.isinf())
    found_TV, expected_TV = found_TV.where(is_used_TV, 0.0), expected_TV.where(is_used_TV, 0.0)
    spread_T = (expected_TV - expected_TV.mean(-1, keepdim=True)).norm(dim=-1)
    error_T: Tensor = (found_TV - expected_TV).norm(dim=-1) / spread_T.clamp(min=1e-6)
    return error_T
