"""What a generator is: prompts as token ids in, responses as token ids out. And a fake for tests.

A generator is opened for a player and closed again, because a backend owns memory or processes:

    with open_generator(player, config.generate) as generator:
        completions = generator.generate(prompts, params, seed=0, on_done=ignore)

To add a backend, write a file beside this one with a function of the type `OpenGenerator`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Literal, NamedTuple, Protocol

from tpaw.config.schema import GenerateConfig
from tpaw.data.token_ids import TokenIds, token_ids
from tpaw.runtime.progress import OnDone
from tpaw.team import Player

FinishReason = Literal["stop", "length"]


class SamplingParams(NamedTuple):
    """How to sample. It is complete: nothing comes from a model's own generation config.

    Attributes:
        temperature: 0 is greedy decoding.
        top_p: 1 switches nucleus sampling off.
        top_k: 0 switches it off.
        max_new_tokens: longest response in tokens, end-of-sequence included.
        max_length: longest prompt plus response in tokens; a long prompt gets a shorter response.
        stop_token_ids: any of them ends a response and is its last token.
    """

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    max_length: int
    stop_token_ids: tuple[int, ...]

    @classmethod
    def of(
        cls, config: GenerateConfig, max_length: int, stop_token_ids: tuple[int, ...]
    ) -> SamplingParams:
        """The sampling settings of a run."""
        return cls(
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            max_new_tokens=config.max_new_tokens,
            max_length=max_length,
            stop_token_ids=stop_token_ids,
        )

    def greedy(self, max_new_tokens: int | None = None) -> SamplingParams:
        """The same, but always the likeliest token; None keeps the longest response."""
        return self._replace(temperature=0.0, max_new_tokens=max_new_tokens or self.max_new_tokens)

    def limit(self, prompt_ids: TokenIds) -> int:
        """Longest response to this prompt, in tokens."""
        return min(self.max_new_tokens, self.max_length - len(prompt_ids))


class Completion(NamedTuple):
    """A response as the generator emitted it.

    Attributes:
        token_ids: int32; ends with a stop token if the model emitted one, never otherwise.
        finish_reason: "stop", or "length" if the response was truncated.
    """

    token_ids: TokenIds
    finish_reason: FinishReason


class Generator(Protocol):
    """Anything that answers prompts given as token ids."""

    def generate(
        self, prompts: Sequence[TokenIds], params: SamplingParams, seed: int, on_done: OnDone
    ) -> list[Completion]:
        """One completion for each prompt, in order.

        The Hugging Face backend gives the same completions for the same seed. A server need not.

        Args:
            on_done: called from this thread with the number of prompts finished since its last
                call. It may raise to stop the work.
        """
        ...


class OpenGenerator(Protocol):
    """Opens a generator for a player. The context closes it and frees what it owns."""

    def __call__(self, player: Player, config: GenerateConfig) -> AbstractContextManager[Generator]:
        """Load or start whatever answers as `player`."""
        ...


def finish(emitted: Sequence[int], params: SamplingParams, limit: int) -> Completion:
    """Cut what a model emitted at its first stop token or at the limit, whichever comes first."""
    for position, token in enumerate(emitted[:limit]):
        if token in params.stop_token_ids:
            return Completion(token_ids(emitted[: position + 1]), "stop")
    return Completion(token_ids(emitted[:limit]), "length")


class FakeGenerator:
    """Answers by a function of the prompt's ids and the seed. For tests of what uses a generator.

    Attributes:
        is_open: whether the context that `opener` gave is still open.
    """

    def __init__(self, answer: Callable[[TokenIds, int], Sequence[int]]) -> None:
        self.answer = answer
        self.is_open = False

    @contextlib.contextmanager
    def opener(self, player: Player, config: GenerateConfig) -> Iterator[Generator]:
        """An `OpenGenerator` that gives this generator, whoever the player is."""
        self.is_open = True
        try:
            yield self
        finally:
            self.is_open = False

    def generate(
        self, prompts: Sequence[TokenIds], params: SamplingParams, seed: int, on_done: OnDone
    ) -> list[Completion]:
        """See `Generator.generate`."""
        completions = []
        for prompt in prompts:
            emitted = self.answer(prompt, seed)
            completions.append(finish(emitted, params, params.limit(prompt)))
            on_done(1)
        return completions
