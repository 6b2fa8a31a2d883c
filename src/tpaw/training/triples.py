"""Triples (x, y, y_gen), and the dataset of them that `TeamTrainer` reads."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from numpy.typing import NDArray

from tpaw.data.columns import TextColumn, key_array
from tpaw.data.examples import Example, Examples
from tpaw.data.token_ids import TokenIds, TokenSequence
from tpaw.errors import ArtifactError
from tpaw.generation.responses import Response, Responses
from tpaw.scoring.sequences import DistinctSequences, sequence_keys
from tpaw.scoring.store import LogprobStore
from tpaw.training.batching import INITIAL_COLUMN

# The opponent of a preference pair, whose rejected answer comes from the data.
FROM_THE_DATA = -1


class Triple(NamedTuple):
    """(x, y, y_gen): an example and the response of one opponent to its prompt.

    Attributes:
        opponent: index of the player that responded, or `FROM_THE_DATA`.
    """

    example: Example
    response: Response
    opponent: int


class Triples(Sequence[Triple]):
    """D_O: the triples of one opponent after those of another, in the order of the examples.

    They are made when indexed. An index gives a `Triple`; a slice gives a list.

    Args:
        examples: the examples.
        responses_of: each opponent with its responses, one for each example. An opponent with k
            responses to a prompt comes k times.
        initial: the responses of θ_0, one for each example, k times too; empty if they are not
            needed. The first triple of a prompt and opponent has the first one, and so on.
        keeps: whether a triple with this example and response is in D_O. Default: all are.

    Attributes:
        responses_in_play: number of responses, those that are not kept included.
        target_keys, generated_keys: keys in a `LogprobStore`, of shape (triples,).
        is_truncated: bool, of shape (triples,): the response was cut at the length limit.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        responses_of: Iterable[tuple[int, Sequence[Response]]],
        initial: Iterable[Sequence[Response]] = (),
        keeps: Callable[[Example, Response], bool] | None = None,
    ) -> None:
        self.examples = Examples.of(examples)
        opponents = [(opponent, Responses.of(responses)) for opponent, responses in responses_of]
        self.opponents = [opponent for opponent, _ in opponents]
        self.responses = [responses for _, responses in opponents]
        self.initial = [Responses.of(responses) for responses in initial]
        for opponent, responses in (*opponents, *((0, responses) for responses in self.initial)):
            _check_pairs(self.examples, responses, opponent)
        self.responses_in_play = len(self.examples) * len(self.responses)
        # Of each triple, its place among all pairs of an opponent and an example.
        self._places = np.arange(self.responses_in_play)
        if keeps is not None:
            pairs = (pair for r in self.responses for pair in zip(self.examples, r, strict=True))
            self._places = np.flatnonzero([keeps(*pair) for pair in pairs])
        targets = sequence_keys(
            map(TokenSequence, self.examples.prompt_ids, self.examples.target_ids)
        )
        self.target_keys = np.tile(targets, len(self.responses))[self._places]
        generated = [
            sequence_keys(map(TokenSequence, self.examples.prompt_ids, responses.token_ids))
            for responses in self.responses
        ]
        self.generated_keys = np.concatenate([key_array(b""), *generated])[self._places]
        reasons = (reason for responses in self.responses for reason in responses.finish_reasons)
        is_truncated = np.array([reason == "length" for reason in reasons], dtype=bool)
        self.is_truncated = is_truncated[self._places]

    def __len__(self) -> int:
        return len(self.target_keys)

    @overload
    def __getitem__(self, index: int) -> Triple: ...
    @overload
    def __getitem__(self, index: slice) -> list[Triple]: ...
    def __getitem__(self, index: int | slice) -> Triple | list[Triple]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(f"triple {index} of {len(self)}")
        opponent, row = self._place(index)
        return Triple(
            self.examples[row],
            self.responses[opponent][row],
            self.opponents[opponent],
        )

    def only(self, indices: NDArray[np.int64]) -> Triples:
        """These triples alone. What is in play stays the same."""
        part = copy.copy(self)
        part._places = self._places[indices]
        part.target_keys = self.target_keys[indices]
        part.generated_keys = self.generated_keys[indices]
        part.is_truncated = self.is_truncated[indices]
        return part

    def token_ids(self, index: int) -> tuple[TokenIds, TokenIds, TokenIds]:
        """The ids of prompt, target and generated response of a triple."""
        opponent, row = self._place(index)
        generated = self.responses[opponent].token_ids[row]
        return self.examples.prompt_ids[row], self.examples.target_ids[row], generated

    def initial_ids(self, index: int) -> TokenIds | None:
        """The ids of θ_0's response to the prompt of a triple; None if it is not needed."""
        if not self.initial:
            return None
        opponent, row = self._place(index)
        return self.initial[opponent % len(self.initial)].token_ids[row]

    def _place(self, index: int) -> tuple[int, int]:
        opponent, row = divmod(int(self._places[index]), len(self.examples))
        return opponent, row

    def sequences(self) -> DistinctSequences:
        """What must be scored: of each triple the target, then the generated response."""
        times = len(self.responses)
        prompts = np.tile(self.examples.prompt_numbers, times)[self._places]
        targets = np.tile(self.examples.target_ids.lengths, times)[self._places]
        lengths = [responses.token_ids.lengths for responses in self.responses]
        generated = np.concatenate([np.empty(0, dtype=np.int64), *lengths])[self._places]
        return DistinctSequences(
            np.stack([self.target_keys, self.generated_keys], axis=1).ravel(),
            np.repeat(prompts, 2),
            np.stack([targets, generated], axis=1).ravel(),
            self._sequence,
        )

    def _sequence(self, position: int) -> TokenSequence:
        """The sequence at a position of the arrays that `sequences` makes."""
        triple, is_generated = divmod(position, 2)
        prompt, target, generated = self.token_ids(triple)
        return TokenSequence(prompt, generated if is_generated else target)


def preference_pairs(examples: Sequence[Example]) -> Triples:
    """One triple for each example; its rejected answer plays the generated response."""
    columns = Examples.of(examples)
    rejected = columns.rejected_ids
    if rejected is None:
        return Triples(columns, [])
    count = len(columns)
    responses = Responses(
        columns.ids, rejected, TextColumn.of([""] * count), TextColumn.of(["stop"] * count)
    )
    return Triples(columns, [(FROM_THE_DATA, responses)])


def _check_pairs(examples: Examples, responses: Responses, opponent: int) -> None:
    """Raise an ArtifactError if the responses belong to other examples."""
    expected, found = examples.ids, responses.example_ids
    if len(expected) != len(found):
        raise ArtifactError(
            f"the responses of θ_{opponent} belong to other examples: {len(found)} responses "
            f"for {len(expected)} examples"
        )
    same = np.array_equal(expected.offsets, found.offsets) and np.array_equal(
        expected.flat, found.flat
    )
    if not same:
        one, other = next((a, b) for a, b in zip(expected, found, strict=True) if a != b)
        raise ArtifactError(
            f"the responses of θ_{opponent} belong to other examples: {other} where {one} was "
            "expected"
        )


class TripleDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """D_O with its reference log-probs, as `TeamTrainer` reads it.

    Args:
        target_logps_NK, generated_logps_NK: float64, in nats: N triples, K players.
    """

    def __init__(
        self,
        triples: Triples,
        target_logps_NK: NDArray[np.float64],
        generated_logps_NK: NDArray[np.float64],
    ) -> None:
        self.triples = triples
        self.target_logps_NK = target_logps_NK
        self.generated_logps_NK = generated_logps_NK

    @classmethod
    def of(cls, triples: Triples, stores: Sequence[LogprobStore]) -> TripleDataset:
        """Triples with their log-probs under each player, all of which are in the stores."""
        none = np.empty((len(triples), 0))  # an objective may need no player
        return cls(
            triples,
            np.column_stack([none, *(store.logps(triples.target_keys) for store in stores)]),
            np.column_stack([none, *(store.logps(triples.generated_keys) for store in stores)]),
        )

    def __len__(self) -> int:
        return len(self.triples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Three or four int32 arrays of token ids, two float64 arrays (K,), and a bool."""
        prompt, target, generated = self.triples.token_ids(index)
        initial = self.triples.initial_ids(index)
        return ({} if initial is None else {INITIAL_COLUMN: initial}) | {
            "prompt_ids": prompt,
            "target_ids": target,
            "generated_ids": generated,
            "player_target_logps": self.target_logps_NK[index],
            "player_generated_logps": self.generated_logps_NK[index],
            "is_truncated": bool(self.triples.is_truncated[index]),
        }
