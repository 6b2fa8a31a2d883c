"""What a generator is, and one for tests that needs no model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

from tpaw.data.token_ids import TokenIds, token_ids

FinishReason = Literal["stop", "length"]
OnDone = Callable[[int], None]


class SamplingParams(NamedTuple):
    """How to sample; complete, so that nothing comes from a model's own generation config.

    Attributes:
        temperature: 0 is greedy.
        top_p: 1 is off.
        top_k: 0 is off.
        max_new_tokens: longest response, end-of-sequence included.
        max_length: longest prompt plus response; a long prompt gets a shorter response.
        stop_token_ids: any of them ends a response and is its last token.
        tokens_per_batch: of the prompts answered at a time and of their longest possible answers;
            for backends that have batches.
    """

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    max_length: int
    stop_token_ids: tuple[int, ...]
    tokens_per_batch: int

    def limit(self, prompt_ids: TokenIds) -> int:
        """Longest response to this prompt, in tokens."""
        return min(self.max_new_tokens, self.max_length - len(prompt_ids))


class Completion(NamedTuple):
    """An answer as the generator emitted it.

    Attributes:
        token_ids: int32; ends with a stop token where the model emitted one, never otherwise.
        finish_reason: "stop", or "length" for a truncated one.
    """

    token_ids: TokenIds
    finish_reason: FinishReason


class Generator(Protocol):
    """Anything that answers prompts given as token ids."""

    def generate(
        self, prompts: Sequence[TokenIds], sampling: SamplingParams, seed: int, on_done: OnDone
    ) -> list[Completion]:
        """One completion a prompt, in order; the same seed gives the same completions.

        `on_done` is called with the number of prompts finished since its last call. It may raise
        to stop the work.
        """
        ...


def finish(emitted: Sequence[int], sampling: SamplingParams, limit: int) -> Completion:
    """Cut what a model emitted at its first stop token or at the limit, whichever comes first."""
    for position, token in enumerate(emitted[:limit]):
        if token in sampling.stop_token_ids:
            return Completion(token_ids(emitted[: position + 1]), "stop")
    return Completion(token_ids(emitted[:limit]), "length")


class FakeGenerator:
    """Answers by a function of the prompt's ids and the seed: for tests of whatever generates."""

    def __init__(self, answer: Callable[[TokenIds, int], Sequence[int]]) -> None:
        self.answer = answer

    def generate(
        self, prompts: Sequence[TokenIds], sampling: SamplingParams, seed: int, on_done: OnDone
    ) -> list[Completion]:
        """See `Generator.generate`."""
        completions = []
        for prompt in prompts:
            emitted = self.answer(prompt, seed)
            completions.append(finish(emitted, sampling, sampling.limit(prompt)))
            on_done(1)
        return completions
