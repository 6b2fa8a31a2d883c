"""Generation with a Hugging Face model that is loaded in this process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from transformers import GenerationConfig, PreTrainedModel

from tpaw.config.schema import GenerateConfig
from tpaw.data.token_ids import TokenIds
from tpaw.generation.batching import Batching, choose_batching
from tpaw.generation.continuous_batching import generate_continuously
from tpaw.generation.generator import Completion, Generator, OpenGenerator, SamplingParams, finish
from tpaw.generation.padded_batches import batches_of, generate_in_batches
from tpaw.runtime.memory import memory_limited_by
from tpaw.runtime.progress import OnDone, note_once
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

    It tries on a few tokens which prompts the model may answer in one batch (`choose_batching`),
    and prints a note if the model cannot be answered in the fastest way.

    Args:
        model: it stays on its device and in its dtype.
        tokens_per_batch: token budget of a generation batch: (prompt + longest response) ×
            sequences.
        is_enough: called every few tokens with all token ids that a sequence has emitted. If it
            returns true, the sequence ends with finish reason "length". It saves time if the caller
            cuts the text at a string anyway. Only continuous batching calls it.

    Attributes:
        batching: how the model answers.

    Raises:
        NonFiniteError: the model's logits are NaN or infinite.
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
        choice = choose_batching(model)
        self.batching = choice.batching
        if choice.note is not None:
            note_once(choice.note)

    def generate(
        self,
        prompts: Sequence[TokenIds],
        params: SamplingParams,
        seed: int,
        on_done: OnDone,
        first: int = 0,
    ) -> list[Completion]:
        """See `Generator.generate`.

        Raises:
            NonFiniteError: the model's logits are NaN or infinite.
            MemoryShortageError: memory has run out.
        """
        with memory_limited_by("generate.tokens_per_batch", self.tokens_per_batch):
            emitted = self._emit(prompts, params, seed, on_done, first)
        return [
            finish(tokens, params, params.limit(prompt))
            for prompt, tokens in zip(prompts, emitted, strict=True)
        ]

    def _emit(
        self,
        prompts: Sequence[TokenIds],
        params: SamplingParams,
        seed: int,
        on_done: OnDone,
        first: int,
    ) -> list[list[int]]:
        if self.batching is Batching.CONTINUOUS:
            return generate_continuously(
                self.model,
                prompts,
                params,
                self.tokens_per_batch,
                seed,
                on_done,
                self.is_enough,
                first,
            )
        is_alone = self.batching in (Batching.ONE_BY_ONE, Batching.WITHOUT_CACHE)
        batches = batches_of(
            prompts,
            params,
            1 if is_alone else self.tokens_per_batch,
            of_equal_lengths=self.batching is Batching.EQUAL_LENGTHS,
        )
        return generate_in_batches(
            self.model,
            prompts,
            params,
            list(batches),
            (seed + first) % 2**63,  # the draws are those of a batch, so each part has its own
            on_done,
            use_cache=self.batching is not Batching.WITHOUT_CACHE,
        )
