"""Hugging Face `generate`: slow, exact, everywhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import GenerationConfig, PreTrainedModel

from tpaw.generation.base import Completion, OnDone, Sampling, finish
from tpaw.token_table import TokenIds


class HFGenerator:
    """A `Generator` over a loaded model. Its generation config is cleared, for good.

    `generate` fills whatever a call leaves open from `model.generation_config`; Qwen2.5-Instruct's,
    for one, would bring top_k 20 and a repetition penalty of 1.1 into every sample.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        model.generation_config = GenerationConfig()

    def generate(
        self, prompts: Sequence[TokenIds], sampling: Sampling, seed: int, on_done: OnDone
    ) -> list[Completion]:
        """See `Generator.generate`. Rows are batched by length, longest first."""
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        completions: dict[int, Completion] = {}
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            for begin in range(0, len(order), sampling.batch_size):
                rows = order[begin : begin + sampling.batch_size]
                emitted = self._emit([prompts[i] for i in rows], sampling)
                for i, tokens in zip(rows, emitted, strict=True):
                    completions[i] = finish(tokens, sampling, sampling.limit(prompts[i]))
                on_done(len(rows))
        return [completions[i] for i in range(len(prompts))]

    def _emit(self, prompts: Sequence[TokenIds], sampling: Sampling) -> list[list[int]]:
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
            output = self.model.generate(
                input_ids=input_ids.to(self.model.device),
                attention_mask=attention_mask.to(self.model.device),
                generation_config=config,
            )
        return list(output[:, longest:].tolist())
