"""Continuous batching: when a request ends, a waiting request takes its slot in the cache.

Shape suffixes: N active requests, W columns of the cache, V vocabulary, B blocks of the
vocabulary, K tokens of a block.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    DynamicCache,
    GenerationMixin,
    LogitsProcessor,
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
from tpaw.models.finite import non_finite
from tpaw.runtime.progress import OnDone

# Token budget of one forward pass over prompts. It limits activation memory. A larger budget is
# not faster.
PROMPT_TOKENS_PER_PASS = 8192
# Waiting requests join only when this share of the slots is free. Reading their prompts delays all
# active requests, and reading one prompt takes about as long as reading many.
FREE_SHARE = 1 / 8
# Columns that the cache has beyond the longest sequence. When they are used up, the cache is copied
# to its first columns. So it is copied at most once in this many tokens.
SPARE_COLUMNS = 64
# Tokens in one block of the vocabulary; see `draw`.
BLOCK = 256
# `is_enough` is called once in this many tokens of a request, because it decodes text.
ASK_EVERY = 4


def why_unsupported(model: PreTrainedModel) -> str | None:
    """Say why continuous batching does not support a model.

    A model is supported if transformers' `generate` passes it only token ids, a mask and positions,
    and if its cache holds only keys and values, one column for each token.

    Returns:
        The reason, or None if the model is supported.
    """
    arguments = inspect.signature(model.forward).parameters
    if not {"input_ids", "attention_mask", "past_key_values"} <= set(arguments):
        return "its forward method lacks input_ids, attention_mask or past_key_values"
    if (
        model.is_remote_code()
        or type(model).prepare_inputs_for_generation
        is not GenerationMixin.prepare_inputs_for_generation
    ):
        return "it overrides prepare_inputs_for_generation or is remote code"
    config = model.config.get_text_config(decoder=True)
    if not model._supports_default_dynamic_cache() or any(
        type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer)
        for layer in DynamicCache(config=config).layers
    ):
        return "its cache holds more than keys and values"
    if getattr(config, "attention_chunk_size", None) is not None:
        return "it uses chunked attention"
    attention = str(config._attn_implementation)
    known = ("eager", "sdpa", *PACKED.values())
    if attention not in known and not attention.startswith("flash_attention_"):
        return f"its attention implementation is {attention}"
    return None


class GenerationRequest:
    """A prompt, and the response tokens that the model has emitted for it so far.

    Attributes:
        index: position of the prompt among the prompts of the call.
        prompt: int32 token ids.
        limit: longest response in tokens.
        emitted: token ids of the response so far.
        draws: random numbers of this request.
    """

    def __init__(self, index: int, prompt: TokenIds, limit: int, seed: tuple[int, int]) -> None:
        self.index = index
        self.prompt = prompt
        self.limit = limit
        self.emitted: list[int] = []
        # Each request has its own generator, so its draws do not depend on the other requests.
        self.draws = np.random.default_rng(seed)

    @property
    def longest(self) -> int:
        """Tokens of the prompt plus the longest possible response."""
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
    first: int = 0,
) -> list[list[int]]:
    """Generate one response for each prompt.

    The longest requests start first. A response depends on the seed, on the prompt and on the
    prompt's position. Other requests change its logits only by rounding errors.

    Args:
        model: a model that `why_unsupported` gives no reason for.
        prompts: int32 token ids, at least one token each.
        tokens_per_batch: token budget of the cache: (prompt + longest response) × requests.
        seed: seeds the draws of all requests.
        on_done: called with the number of requests that ended since the last call. It may raise
            to stop the work.
        is_enough: called every `ASK_EVERY` tokens of a request with all token ids that the request
            has emitted. If it returns true, the request ends.
        first: position of the first prompt; see `Generator.generate`.

    Returns:
        The emitted token ids, in the order of the prompts. A stop token is included.

    Raises:
        NonFiniteError: the model's logits are NaN or infinite.
    """
    requests = [
        GenerationRequest(i, prompt, params.limit(prompt), (seed, first + i))
        for i, prompt in enumerate(prompts)
    ]
    requests.sort(key=lambda request: (-request.longest, -len(request.prompt)))
    waiting = deque(requests)
    emitted: dict[int, list[int]] = {}
    forward = _Forward(model)
    cache, active = forward.cache, list[GenerationRequest]()
    while waiting or active:
        if waiting:
            longest = max(request.longest for request in (waiting[0], *active))
            free = _free_slots(cache, len(waiting), longest, tokens_per_batch)
            if free >= cache.slots * FREE_SHARE:
                newcomers = [waiting.popleft() for _ in range(min(free, len(waiting)))]
                forward.read(newcomers)
                active += newcomers
        logits_NV = forward.step(active)
        ended = []
        try:
            tokens = _choose(logits_NV, active, params)
        except FloatingPointError:
            raise non_finite(model, "logits") from None
        for slot, (request, token) in enumerate(zip(active, tokens, strict=True)):
            request.emitted.append(token)
            count = len(request.emitted)
            if (
                token in params.stop_token_ids
                or count >= request.limit
                or (is_enough and count % ASK_EVERY == 0 and is_enough(request.emitted))
            ):
                emitted[request.index] = request.emitted
                ended.append(slot)
        if ended:
            active = [active[slot] for slot in cache.drop(ended)]
            on_done(len(ended))
    return [emitted[i] for i in range(len(prompts))]


@torch.inference_mode()
def generate_tokens(
    model: PreTrainedModel,
    prompt: TokenIds,
    params: SamplingParams,
    seed: tuple[int, int],
    *,
    use_cache: bool,
) -> Iterator[int]:
    """Generate one response, token by token. Whoever no longer asks for tokens ends it.

    Args:
        model: any decoder if `use_cache` is false, else one that `why_unsupported` gives no reason
            for.
        prompt: int32 token ids, at least one.
        seed: seeds the draws: that of `generate_continuously`, and the prompt's position.
        use_cache: if false, every step reads the whole sequence again, which every model can.

    Yields:
        The tokens of the response, its stop token included.

    Raises:
        NonFiniteError: the model's logits are NaN or infinite.
    """
    request = GenerationRequest(0, prompt, params.limit(prompt), seed)
    forward = _Forward(model)
    if use_cache:
        forward.cache.reshape(1, request.longest + 1)
        forward.read([request])
    for _ in range(request.limit):
        logits_NV = forward.step([request]) if use_cache else forward.read_again(request)
        try:
            token = _choose(logits_NV, [request], params)[0]
        except FloatingPointError:
            raise non_finite(model, "logits") from None
        request.emitted.append(token)
        yield token
        if token in params.stop_token_ids:
            return


@torch.inference_mode()
def greedy_logits(
    model: PreTrainedModel, prompts: Sequence[TokenIds], steps: int
) -> tuple[list[list[int]], Tensor]:
    """Generate a few greedy tokens for prompts that share one cache, to compare their logits.

    Args:
        model: a model that `why_unsupported` gives no reason for.
        prompts: int32 token ids, at least one token each.
        steps: tokens to generate for each prompt. Nothing ends a response earlier.

    Returns:
        The token ids, and the logits of every step, (prompts, steps, V), float32.
    """
    requests = [GenerationRequest(i, prompt, steps, (0, i)) for i, prompt in enumerate(prompts)]
    forward = _Forward(model)
    # `read` adds the longest request first, so the slots differ from the order of the prompts.
    forward.cache.reshape(len(requests), max(r.longest for r in requests) + 1)
    logits = []
    requests.sort(key=lambda request: -len(request.prompt))
    forward.read(requests)
    for _ in range(steps):
        logits.append(forward.step(requests))
        for request, token in zip(requests, logits[-1].argmax(-1).tolist(), strict=True):
            request.emitted.append(token)
    order = np.argsort([request.index for request in requests]).tolist()
    return [requests[slot].emitted for slot in order], torch.stack(logits, 1)[order]


def _free_slots(cache: SlotCache, waiting: int, longest: int, tokens_per_batch: int) -> int:
    """Count the free slots. First add slots to the cache if the token budget now allows more.

    Requests start longest first, so the budget allows more slots as the longest requests end.

    Args:
        waiting: number of waiting requests.
        longest: largest `longest` of the active requests and the next waiting one.
    """
    slots = max(1, min(tokens_per_batch // longest, len(cache.starts) + waiting))
    if slots > cache.slots * (1 + FREE_SHARE):
        cache.reshape(slots, longest + SPARE_COLUMNS)
    return cache.slots - len(cache.starts)


class _Forward:
    """Calls the model's own forward method on the requests in a `SlotCache`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        config = model.config.get_text_config(decoder=True)
        self.cache = SlotCache(len(DynamicCache(config=config).layers))
        arguments = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in arguments
        self._options: dict[str, Any] = {"use_cache": True}
        if "logits_to_keep" in arguments:
            self._options["logits_to_keep"] = 1

    def read(self, requests: Sequence[GenerationRequest]) -> None:
        """Add new requests to the cache and compute their keys and values.

        The last token of each prompt is left out, because the first call of `step` reads it.
        Prompts are padded on the right and have no mask, as in `logprobs/packing.py`: in a causal
        model no token attends to the padding on its right.
        """
        lengths = [len(request.prompt) - 1 for request in requests]
        for chosen in assign_padded(
            [PromptGroup.single(n) for n in lengths], PROMPT_TOKENS_PER_PASS
        ):
            # Without a config, DynamicCache also keeps the tokens outside a sliding window.
            filled = DynamicCache()
            longest = lengths[chosen[0]]
            if longest:
                input_ids = torch.zeros((len(chosen), longest), dtype=torch.int64)
                for line, i in enumerate(chosen):
                    input_ids[line, : lengths[i]] = torch.tensor(requests[i].prompt[:-1])
                self.model(
                    input_ids=input_ids.to(self.model.device),
                    past_key_values=filled,
                    **self._options,
                )
            self.cache.add(filled, [lengths[i] for i in chosen])

    def step(self, requests: Sequence[GenerationRequest]) -> Tensor:
        """Read the last token of each request.

        Args:
            requests: in the order of their slots.

        Returns:
            Logits of the next token, (N, V), float32.
        """
        cache, device = self.cache, self.model.device
        last = [
            request.emitted[-1] if request.emitted else int(request.prompt[-1])
            for request in requests
        ]
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

    def read_again(self, request: GenerationRequest) -> Tensor:
        """Read a whole sequence without a cache.

        Returns:
            Logits of the next token, (1, V), float32.
        """
        ids = torch.tensor([[*request.prompt.tolist(), *request.emitted]], device=self.model.device)
        logits_1V: Tensor = self.model(input_ids=ids, use_cache=False).logits[:, -1].float()
        return logits_1V


def _choose(
    logits_NV: Tensor, requests: Sequence[GenerationRequest], params: SamplingParams
) -> list[int]:
    """Choose the next token of each request: the most likely one at temperature 0, else sample.

    Raises:
        FloatingPointError: logits of a request are NaN, or the largest one is infinite.
    """
    if params.temperature == 0:
        token_N1 = logits_NV.argmax(-1, keepdim=True)
        # Read back together with the tokens, because each read waits for the device.
        pairs_N2 = torch.cat([token_N1.double(), logits_NV.gather(1, token_N1).double()], 1).cpu()
        if not bool(pairs_N2.isfinite().all()):
            raise FloatingPointError
        return list(pairs_N2[:, 0].long().tolist())
    draws = torch.tensor([[request.draws.random()] for request in requests], dtype=torch.float64)
    warpers = LogitsProcessorList()
    if params.temperature != 1:
        warpers.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        # A GPU has no deterministic cumulative sum, which transformers' own needs.
        is_strict = logits_NV.is_cuda and torch.are_deterministic_algorithms_enabled()
        warpers.append((TopP if is_strict else TopPLogitsWarper)(params.top_p))
    return draw(torch.softmax(warpers(None, logits_NV), -1), draws)


class TopP(LogitsProcessor):  # type: ignore[misc]
    """The same as `TopPLogitsWarper` but for rounding, and deterministic on a GPU.

    The last token that is kept is the one that a draw of p finds among the sorted probabilities.
    """

    def __init__(self, top_p: float) -> None:
        self.top_p = top_p

    def __call__(self, input_ids: Any, logits_NV: Tensor) -> Tensor:
        """Set the logits to -inf of all tokens but the likeliest that sum to p."""
        sorted_NV, order_NV = logits_NV.sort(stable=True, dim=-1, descending=True)
        p_N1 = torch.full((len(logits_NV), 1), self.top_p, dtype=torch.float64)
        last = draw(torch.softmax(sorted_NV, -1), p_N1)
        last_N1 = torch.tensor(last, device=logits_NV.device)[:, None]
        ranks_V = torch.arange(logits_NV.shape[1], device=logits_NV.device)
        is_removed_NV = torch.zeros_like(order_NV, dtype=torch.bool)
        is_removed_NV.scatter_(1, order_NV, ranks_V > last_N1)
        return logits_NV.masked_fill(is_removed_NV, -torch.inf)


def draw(probabilities_NV: Tensor, draws_N1: Tensor) -> list[int]:
    """Sample by inversion: take the first token whose cumulative probability is above the draw.

    `torch.multinomial` needs one random number for each token of the vocabulary. Inversion needs
    one for each request, so each request can have its own generator. The search has two steps:
    it finds a block of the vocabulary, then the token in that block. The device only sums the
    blocks. This is deterministic; a cumulative sum on a GPU is not.

    Args:
        probabilities_NV: on any device; each row sums to 1.
        draws_N1: in [0, 1), float64, on the CPU.

    Returns:
        N token ids.

    Raises:
        FloatingPointError: a probability is NaN.
    """
    padding = -probabilities_NV.shape[1] % BLOCK
    blocks_NBK = F.pad(probabilities_NV, (0, padding)).view(len(draws_N1), -1, BLOCK)
    sums_NB = blocks_NBK.sum(-1, dtype=torch.float64).cpu()
    if not bool(sums_NB.isfinite().all()):
        raise FloatingPointError
    block_N1, rest_N1 = _invert(sums_NB, draws_N1)
    index_N1K = block_N1.to(blocks_NBK.device)[..., None].expand(-1, -1, BLOCK)
    inside_NK = blocks_NBK.gather(1, index_N1K)[:, 0].double().cpu()
    place_N1, _ = _invert(inside_NK, rest_N1)
    return list((block_N1 * BLOCK + place_N1)[:, 0].tolist())


def _invert(weights_NK: Tensor, draws_N1: Tensor) -> tuple[Tensor, Tensor]:
    """Find the weight that each draw falls into.

    Args:
        weights_NK: not negative; they need not sum to 1.
        draws_N1: in [0, 1).

    Returns:
        The index of the weight, (N, 1), and the part of that weight below the draw, (N, 1), as a
        share in [0, 1]. The share is the draw for a search inside the weight.
    """
    cumulative_NK = weights_NK.cumsum(-1)
    total_N1 = cumulative_NK[:, -1:]
    # Rounding could make the target equal to the total. The search would then return an index
    # past the end, or a token with probability 0.
    target_N1 = torch.minimum(draws_N1 * total_N1, total_N1.nextafter(torch.zeros(())))
    place_N1 = torch.searchsorted(cumulative_NK, target_N1, right=True)
    weight_N1 = weights_NK.gather(1, place_N1)
    before_N1 = cumulative_NK.gather(1, place_N1) - weight_N1
    return place_N1, ((target_N1 - before_N1) / weight_N1).clamp(0, 1)
