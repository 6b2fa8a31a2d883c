"""The generator protocol: token ids of prompts in, token ids of responses out. Also a test fake.

A caller opens a generator for a player and closes it, because a backend owns memory or processes:

    with open_generator(player, config.generate) as generator:
        completions = generator.generate(prompts, params, seed=0, on_done=ignore)

To add a backend, write a file in this folder with a function of the type `OpenGenerator`.
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
    """All sampling settings. The model's own generation config is not used.

    Attributes:
        temperature: 0 means greedy decoding.
        top_p: 1 disables nucleus sampling.
        top_k: 0 disables top-k sampling.
        max_new_tokens: longest response in tokens, end-of-sequence token included.
        max_length: longest prompt plus response in tokens. It shortens the response to a long
            prompt.
        stop_token_ids: each of these tokens ends a response. The token is part of the response.
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
        """Build the sampling settings of a run.

        Args:
            config: the section `generate` of the run's configuration.
            max_length: the run's `max_length`, in tokens.
            stop_token_ids: the tokens that end a response.
        """
        return cls(
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            max_new_tokens=config.max_new_tokens,
            max_length=max_length,
            stop_token_ids=stop_token_ids,
        )

    def greedy(self, max_new_tokens: int | None = None) -> SamplingParams:
        """Return the same settings with greedy decoding.

        Args:
            max_new_tokens: longest response in tokens; None keeps the present limit.
        """
        return self._replace(temperature=0.0, max_new_tokens=max_new_tokens or self.max_new_tokens)

    def limit(self, prompt_ids: TokenIds) -> int:
        """Return the longest possible response to a prompt, in tokens."""
        return min(self.max_new_tokens, self.max_length - len(prompt_ids))


class Completion(NamedTuple):
    """A response as token ids.

    Attributes:
        token_ids: int32. The last one is a stop token only if the model emitted it.
        finish_reason: "stop" if a stop token ended the response, "length" if it was truncated.
        server_logp: the log-prob that a server gives for the response, in nats, summed over its
            tokens; None from a backend that gives none. It is only compared with TPAW's own.
    """

    token_ids: TokenIds
    finish_reason: FinishReason
    server_logp: float | None = None


class Generator(Protocol):
    """A backend that generates responses to prompts. Prompts and responses are token ids."""

    def generate(
        self,
        prompts: Sequence[TokenIds],
        params: SamplingParams,
        seed: int,
        on_done: OnDone,
        first: int = 0,
    ) -> list[Completion]:
        """Generate one completion for each prompt.

        The Hugging Face backend gives the same completions for the same seed. Other backends need
        not.

        Args:
            prompts: int32 token ids.
            params: sampling settings.
            seed: seeds the random draws.
            on_done: called from the caller's thread with the number of prompts finished since the
                last call. It may raise to stop the work.
            first: place of the first prompt, where the prompts are a part of a longer list with
                one seed. Then every prompt gets the random numbers that it has in the whole list.

        Returns:
            The completions, in the order of the prompts.
        """
        ...


class OpenGenerator(Protocol):
    """A function that opens a generator for a player. The context manager closes the generator."""

    def __call__(self, player: Player, config: GenerateConfig) -> AbstractContextManager[Generator]:
        """Load the player's model, or start a server for it.

        Args:
            player: the checkpoint that generates.
            config: the section `generate` of the run's configuration.
        """
        ...


def finish(emitted: Sequence[int], params: SamplingParams, limit: int) -> Completion:
    """Make a completion: cut the token ids after the first stop token or at the limit.

    Args:
        emitted: token ids that the model emitted.
        params: its `stop_token_ids` end a response.
        limit: longest response in tokens.
    """
    for position, token in enumerate(emitted[:limit]):
        if token in params.stop_token_ids:
            return Completion(token_ids(emitted[: position + 1]), "stop")
    return Completion(token_ids(emitted[:limit]), "length")


class FakeGenerator:
    """A generator for tests: a function of the prompt's token ids and the seed gives the response.

    Args:
        answer: returns the token ids of the response.

    Attributes:
        is_open: whether a context that `opener` returned is open.
    """

    def __init__(self, answer: Callable[[TokenIds, int], Sequence[int]]) -> None:
        self.answer = answer
        self.is_open = False

    @contextlib.contextmanager
    def opener(self, player: Player, config: GenerateConfig) -> Iterator[Generator]:
        """Return this generator for any player. The method is an `OpenGenerator`."""
        self.is_open = True
        try:
            yield self
        finally:
            self.is_open = False

    def generate(
        self,
        prompts: Sequence[TokenIds],
        params: SamplingParams,
        seed: int,
        on_done: OnDone,
        first: int = 0,
    ) -> list[Completion]:
        """See `Generator.generate`."""
        completions = []
        for prompt in prompts:
            emitted = self.answer(prompt, seed)
            completions.append(finish(emitted, params, params.limit(prompt)))
            on_done(1)
        return completions
