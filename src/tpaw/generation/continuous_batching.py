"""Continuous batching: a sequence that ends makes room for a prompt that waits.

Shape suffixes: N sequences that are generated now, L tokens, W columns of the cache, V vocabulary,
B blocks of the vocabulary, K tokens of a block.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    DynamicCache,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from tpaw.data.token_ids import TokenIds
from tpaw.generation.generator import SamplingParams
from tpaw.generation.slot_cache import SlotCache
from tpaw.logprobs.attention import PACKED
from tpaw.logprobs.packing import PromptGroup, assign_padded
from tpaw.runtime.progress import OnDone

# Tokens of one forward pass over prompts. It bounds the activations; more would not be faster.
PROMPT_TOKENS_PER_PASS = 8192
# Waiting prompts join when this share of the slots is free. Their forward pass delays all other
# sequences, and takes about as long for one prompt as for many.
FREE_SHARE = 1 / 8
# Columns beyond the longest sequence. The cache is copied once for so many tokens.
SPARE_COLUMNS = 64
BLOCK = 256
# `is_enough` is called once for so many tokens of a sequence.
ASK_EVERY = 4


def why_unsupported(model: PreTrainedModel) -> str | None:
    """Why continuous batching does not support a model; None if it does.

    It does if `generate` of transformers gives the model nothing but ids, a mask and positions, and
    caches nothing but keys and values by column.
    """
    arguments = inspect.signature(model.forward).parameters
    if not {"input_ids", "attention_mask", "past_key_values"} <= set(arguments):
        return "its forward takes no ids, mask and cache"
    if (
        model.is_remote_code()
        or type(model).prepare_inputs_for_generation
        is not GenerationMixin.prepare_inputs_for_generation
    ):
        return "it prepares its own inputs"
    config = model.config.get_text_config(decoder=True)
    if not model._supports_default_dynamic_cache() or any(
        type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer)
        for layer in DynamicCache(config=config).layers
    ):
        return "its cache is not one of keys and values"
    if getattr(config, "attention_chunk_size", None) is not None:
        return "it attends in chunks"
    attention = str(config._attn_implementation)
    if attention not in ("eager", "sdpa", PACKED) and not attention.startswith("flash_attention_"):
        return f"its attention is {attention}"
    return None


class GenerationRequest:
    """A prompt that is being answered, and what the model has emitted after it."""

    def __init__(self, index: int, prompt: TokenIds, limit: int, seed: int) -> None:
        self.index = index
        self.prompt = prompt
        self.limit = limit
        self.emitted: list[int] = []
        # Random numbers of its own, so that other requests and their order do not change them.
        self.draws = np.random.default_rng((seed, index))

    @property
    def longest(self) -> int:
        """Tokens of the prompt plus the longest response."""
        return len(self.prompt) + self.limit


@torch.inference_mode()
def generate_continuously(
    model: PreTrainedModel,
    prompts: Sequence[TokenIds],
    params: SamplingParams,
    tokens_per_batch: int,
    seed: int,
    on_done: OnDone,
    is_enough: Callable[[Sequence[int]], bool] | None = None,
) -> list[list[int]]:
    """What a model without `why_unsupported` emits after each prompt, in their order.

    The longest prompts come first. A row's answer depends on the seed, its place among `prompts`
    and itself; on other rows by no more than rounding.

    Args:
        on_done: called with the number of rows that have ended. It may raise.
        is_enough: asked now and then, with all that a row has emitted; true ends the row.
    """
    rows = [
        GenerationRequest(i, prompt, params.limit(prompt), seed) for i, prompt in enumerate(prompts)
    ]
    rows.sort(key=lambda row: (-row.longest, -len(row.prompt)))
    waiting = deque(rows)
    emitted: dict[int, list[int]] = {}
    forward = _Forward(model)
    cache, active = forward.cache, list[GenerationRequest]()
    while waiting or active:
        if waiting:
            longest = max(row.longest for row in (waiting[0], *active))
            free = _free_slots(cache, len(waiting), longest, tokens_per_batch)
            if free >= cache.slots * FREE_SHARE:
                newcomers = [waiting.popleft() for _ in range(min(free, len(waiting)))]
                forward.read(newcomers)
                active += newcomers
        logits_NV = forward.step(active)
        ended = []
        tokens = _choose(logits_NV, active, params)
        for slot, (row, token) in enumerate(zip(active, tokens, strict=True)):
            row.emitted.append(token)
            count = len(row.emitted)
            if (
                token in params.stop_token_ids
                or count >= row.limit
                or (is_enough and count % ASK_EVERY == 0 and is_enough(row.emitted))
            ):
                emitted[row.index] = row.emitted
                ended.append(slot)
        if ended:
            active = [active[slot] for slot in cache.drop(ended)]
            on_done(len(ended))
    return [emitted[i] for i in range(len(prompts))]


def _free_slots(cache: SlotCache, waiting: int, longest: int, tokens_per_batch: int) -> int:
    """Slots for those who wait, in a cache that grows where shorter rows leave room for more."""
    slots = max(1, min(tokens_per_batch // longest, len(cache.starts) + waiting))
    if slots > cache.slots * (1 + FREE_SHARE):
        cache.reshape(slots, longest + SPARE_COLUMNS)
    return cache.slots - len(cache.starts)


class _Forward:
    """The model's own forward, over the rows of a cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        config = model.config.get_text_config(decoder=True)
        self.cache = SlotCache(len(DynamicCache(config=config).layers))
        arguments = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in arguments
        self._options: dict[str, Any] = {"use_cache": True}
        if "logits_to_keep" in arguments:
            self._options["logits_to_keep"] = 1

    def read(self, rows: Sequence[GenerationRequest]) -> None:
        """All of the prompts but their last token, which is the first to be stepped with.

        Padded on the right and without a mask, as `layout` has it: no token sees what stands to
        its right.
        """
        lengths = [len(row.prompt) - 1 for row in rows]
        for chosen in assign_padded(
            [PromptGroup.single(n) for n in lengths], PROMPT_TOKENS_PER_PASS
        ):
            filled = DynamicCache()  # of no config: it keeps every token of a sliding window too
            longest = lengths[chosen[0]]
            if longest:
                input_ids = torch.zeros((len(chosen), longest), dtype=torch.int64)
                for row, i in enumerate(chosen):
                    input_ids[row, : lengths[i]] = torch.tensor(rows[i].prompt[:-1])
                self.model(
                    input_ids=input_ids.to(self.model.device),
                    past_key_values=filled,
                    **self._options,
                )
            self.cache.add(filled, [lengths[i] for i in chosen])

    def step(self, rows: Sequence[GenerationRequest]) -> Tensor:
        """Logits (N, V), float32, of the token after the last of each row."""
        cache, device = self.cache, self.model.device
        last = [row.emitted[-1] if row.emitted else int(row.prompt[-1]) for row in rows]
        tokens_N, starts_N = torch.tensor([last, cache.starts], device=device)
        columns_W = torch.arange(cache.begin, cache.end + 1, device=device)
        options = dict(self._options)
        if self._takes_positions:
            options["position_ids"] = (cache.end - starts_N)[:, None]
        output = self.model(
            input_ids=tokens_N[:, None],
            attention_mask=(columns_W >= starts_N[:, None]).long(),
            past_key_values=cache,
            **options,
        )
        cache.step()
        logits_NV: Tensor = output.logits[:, -1].float()
        return logits_NV


def _choose(
    logits_NV: Tensor, rows: Sequence[GenerationRequest], params: SamplingParams
) -> list[int]:
    """The likeliest token of each row at temperature 0, else one drawn."""
    if params.temperature == 0:
        return list(logits_NV.argmax(-1).tolist())
    draws = torch.tensor([[row.draws.random()] for row in rows], dtype=torch.float64)
    warpers = LogitsProcessorList()
    if params.temperature != 1:
        warpers.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    return draw(torch.softmax(warpers(None, logits_NV), -1), draws)


def draw(probabilities_NV: Tensor, draws_N1: Tensor) -> list[int]:
    """Tokens by inversion: the first whose cumulative probability is above the draw.

    `torch.multinomial` takes a random number for every token of the vocabulary, here it is one a
    row. A block of the vocabulary is found first, then the token in it: that leaves the device
    one pass over the probabilities, which is deterministic where a cumulative sum is not.

    Args:
        draws_N1: in [0, 1), float64, on the CPU.
    """
    padding = -probabilities_NV.shape[1] % BLOCK
    blocks_NBK = F.pad(probabilities_NV, (0, padding)).view(len(draws_N1), -1, BLOCK)
    block_N1, rest_N1 = _invert(blocks_NBK.sum(-1, dtype=torch.float64).cpu(), draws_N1)
    index_N1K = block_N1.to(blocks_NBK.device)[..., None].expand(-1, -1, BLOCK)
    inside_NK = blocks_NBK.gather(1, index_N1K)[:, 0].double().cpu()
    place_N1, _ = _invert(inside_NK, rest_N1)
    return list((block_N1 * BLOCK + place_N1)[:, 0].tolist())


def _invert(weights_NK: Tensor, draws_N1: Tensor) -> tuple[Tensor, Tensor]:
    """Where each draw falls, and how far into that weight, both as shares in [0, 1)."""
    cumulative_NK = weights_NK.cumsum(-1)
    total_N1 = cumulative_NK[:, -1:]
    # Below the total in spite of rounding, so that no weight of 0 is ever met.
    target_N1 = torch.minimum(draws_N1 * total_N1, total_N1.nextafter(torch.zeros(())))
    place_N1 = torch.searchsorted(cumulative_NK, target_N1, right=True)
    weight_N1 = weights_NK.gather(1, place_N1)
    before_N1 = cumulative_NK.gather(1, place_N1) - weight_N1
    return place_N1, ((target_N1 - before_N1) / weight_N1).clamp(0, 1)
