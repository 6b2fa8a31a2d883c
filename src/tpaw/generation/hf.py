"""Generation with a Hugging Face model that is loaded in this process."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from transformers import GenerationConfig, PreTrainedModel

from tpaw.config.schema import GenerateConfig
from tpaw.data.token_ids import TokenIds
from tpaw.generation.continuous_batching import generate_continuously, why_unsupported
from tpaw.generation.generator import Completion, Generator, OpenGenerator, SamplingParams, finish
from tpaw.logprobs.packing import PromptGroup, assign_padded
from tpaw.runtime.progress import OnDone
from tpaw.team import Player


def hf_opener(load: Callable[[Player], PreTrainedModel]) -> OpenGenerator:
    """Return an `OpenGenerator` that generates with the models that `load` returns.

    Closing such a generator does not free the model, because `load` owns it.

    Args:
        load: returns the player's model. It may cache the model.
    """

    @contextlib.contextmanager
    def open_generator(player: Player, config: GenerateConfig) -> Iterator[Generator]:
        yield HFGenerator(load(player), config.tokens_per_batch)

    return open_generator


class HFGenerator:
    """A `Generator` that uses a loaded model.

    It replaces the model's generation config by an empty one and does not restore it. Otherwise
    transformers' `generate` would take each setting that the call does not give from
    `model.generation_config`. The one of Qwen2.5-Instruct, for example, sets top_k to 20 and a
    repetition penalty of 1.1.

    Args:
        model: it stays on its device and in its dtype.
        tokens_per_batch: token budget of a generation batch: (prompt + longest response) ×
            sequences.
        is_enough: called every few tokens with all token ids that a sequence has emitted. If it
            returns true, the sequence ends with finish reason "length". It saves time if the caller
            cuts the text at a string anyway. `generate_with_transformers` does not call it.

    Attributes:
        why_unsupported: why this model cannot use continuous batching; None if it can.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokens_per_batch: int,
        is_enough: Callable[[Sequence[int]], bool] | None = None,
    ) -> None:
        self.model = model
        self.tokens_per_batch = tokens_per_batch
        self.is_enough = is_enough
        model.generation_config = GenerationConfig()
        self.why_unsupported = why_unsupported(model)
        if self.why_unsupported:
            warnings.warn(
                "continuous batching is disabled for this model, so generation is slower: "
                f"{self.why_unsupported}",
                stacklevel=2,
            )

    def generate(
        self, prompts: Sequence[TokenIds], params: SamplingParams, seed: int, on_done: OnDone
    ) -> list[Completion]:
        """See `Generator.generate`."""
        if self.why_unsupported is None:
            emitted = generate_continuously(
                self.model, prompts, params, self.tokens_per_batch, seed, on_done, self.is_enough
            )
        else:
            emitted = generate_with_transformers(
                self.model, prompts, params, self.tokens_per_batch, seed, on_done
            )
        return [
            finish(tokens, params, params.limit(prompt))
            for prompt, tokens in zip(prompts, emitted, strict=True)
        ]


def generate_with_transformers(
    model: PreTrainedModel,
    prompts: Sequence[TokenIds],
    params: SamplingParams,
    tokens_per_batch: int,
    seed: int,
    on_done: OnDone,
) -> list[list[int]]:
    """Generate with transformers' own `generate`, which supports every model but is slower.

    It batches sequences of similar length, longest first. A batch ends when its longest response
    ends.

    Args:
        prompts: int32 token ids.
        tokens_per_batch: token budget of a batch: (prompt + longest response) × sequences.
        seed: seeds torch's global generator for the time of the call.
        on_done: called with the number of prompts of each finished batch. It may raise to stop the
            work.

    Returns:
        The emitted token ids, in the order of the prompts. They may continue after a stop token and
        beyond the limit of the prompt; `finish` cuts them.
    """
    lengths = [len(prompt) + params.limit(prompt) for prompt in prompts]
    emitted: dict[int, list[int]] = {}
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        for batch in assign_padded([PromptGroup.single(n) for n in lengths], tokens_per_batch):
            responses = _emit(model, [prompts[i] for i in batch], params)
            emitted.update(zip(batch, responses, strict=True))
            on_done(len(batch))
    return [emitted[i] for i in range(len(prompts))]


def _emit(
    model: PreTrainedModel, prompts: Sequence[TokenIds], params: SamplingParams
) -> list[list[int]]:
    longest = max(map(len, prompts))
    input_ids = torch.zeros((len(prompts), longest), dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    # Pad on the left: `generate` appends the responses on the right.
    for line, prompt in enumerate(prompts):
        input_ids[line, longest - len(prompt) :] = torch.tensor(prompt)
        attention_mask[line, longest - len(prompt) :] = 1
    is_greedy = params.temperature == 0
    config = GenerationConfig(
        do_sample=not is_greedy,
        temperature=None if is_greedy else params.temperature,
        top_p=None if is_greedy else params.top_p,
        top_k=None if is_greedy else params.top_k,
        max_new_tokens=max(params.limit(prompt) for prompt in prompts),
        eos_token_id=list(params.stop_token_ids),
        pad_token_id=0,  # `finish` removes it, because it only follows a stop token
    )
    with torch.inference_mode():
        output = model.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            generation_config=config,
        )
    return list(output[:, longest:].tolist())
