"""Generation with the Hugging Face model that is loaded."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from transformers import GenerationConfig, PreTrainedModel

from tpaw.data.token_ids import TokenIds
from tpaw.generation.continuous_batching import answer, why_unsupported
from tpaw.generation.generator import Completion, OnDone, SamplingParams, finish
from tpaw.logprobs.packing import PromptGroup, batch


class HFGenerator:
    """A `Generator` over a loaded model. Its generation config is cleared, for good.

    `generate` fills whatever a call leaves open from `model.generation_config`; Qwen2.5-Instruct's,
    for one, would bring top_k 20 and a repetition penalty of 1.1 into every sample.

    Args:
        is_enough: asked every few tokens, with all that a row has emitted, whether it may end; it
            is then "length" that ends it. For those who cut a text at a string: it saves time,
            and does not say where to cut. The slower way of answering does not ask.
    """

    def __init__(
        self, model: PreTrainedModel, is_enough: Callable[[Sequence[int]], bool] | None = None
    ) -> None:
        self.model = model
        self.is_enough = is_enough
        model.generation_config = GenerationConfig()
        self.why_unsupported = why_unsupported(model)
        if self.why_unsupported:
            warnings.warn(
                f"answered by transformers' own generate, which is slower: {self.why_unsupported}",
                stacklevel=2,
            )

    def generate(
        self, prompts: Sequence[TokenIds], sampling: SamplingParams, seed: int, on_done: OnDone
    ) -> list[Completion]:
        """See `Generator.generate`."""
        if self.why_unsupported is None:
            emitted = answer(self.model, prompts, sampling, seed, on_done, self.is_enough)
        else:
            emitted = generate_with_transformers(self.model, prompts, sampling, seed, on_done)
        return [
            finish(tokens, sampling, sampling.limit(prompt))
            for prompt, tokens in zip(prompts, emitted, strict=True)
        ]


def generate_with_transformers(
    model: PreTrainedModel,
    prompts: Sequence[TokenIds],
    sampling: SamplingParams,
    seed: int,
    on_done: OnDone,
) -> list[list[int]]:
    """What any model emits after each prompt, in their order; some emit more than they should.

    Rows are batched by length, longest first, and a batch lasts as long as its longest answer.
    """
    lengths = [len(prompt) + sampling.limit(prompt) for prompt in prompts]
    emitted: dict[int, list[int]] = {}
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        for rows in batch([PromptGroup.single(n) for n in lengths], sampling.tokens_per_batch):
            answers = _emit(model, [prompts[i] for i in rows], sampling)
            emitted.update(zip(rows, answers, strict=True))
            on_done(len(rows))
    return [emitted[i] for i in range(len(prompts))]


def _emit(
    model: PreTrainedModel, prompts: Sequence[TokenIds], sampling: SamplingParams
) -> list[list[int]]:
    longest = max(map(len, prompts))
    input_ids = torch.zeros((len(prompts), longest), dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):  # padded on the left: all end where answers begin
        input_ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        attention_mask[row, longest - len(prompt) :] = 1
    is_greedy = sampling.temperature == 0
    config = GenerationConfig(
        do_sample=not is_greedy,
        temperature=None if is_greedy else sampling.temperature,
        top_p=None if is_greedy else sampling.top_p,
        top_k=None if is_greedy else sampling.top_k,
        max_new_tokens=max(sampling.limit(prompt) for prompt in prompts),
        eos_token_id=list(sampling.stop_token_ids),
        pad_token_id=0,  # emitted after a stop token only, where answers are cut
    )
    with torch.inference_mode():
        output = model.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            generation_config=config,
        )
    return list(output[:, longest:].tolist())
