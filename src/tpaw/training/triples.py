"""Triples (x, y, y_gen), and the dataset of them that `TeamTrainer` reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
        responses_of: each opponent with its responses, one for each example.

    Attributes:
        target_keys, generated_keys: keys in a `LogprobStore`, of shape (triples,).
        is_truncated: bool, of shape (triples,): the response was cut at the length limit.
    """

    def __init__(
        self, examples: Sequence[Example], responses_of: Iterable[tuple[int, Sequence[Response]]]
    ) -> None:
        self.examples = Examples.of(examples)
        opponents = [(opponent, Responses.of(responses)) for opponent, responses in responses_of]
        self.opponents = [opponent for opponent, _ in opponents]
        self.responses = [responses for _, responses in opponents]
        for opponent, responses in zip(self.opponents, self.responses, strict=True):
            _check_pairs(self.examples, responses, opponent)
        targets = sequence_keys(
            map(TokenSequence, self.examples.prompt_ids, self.examples.target_ids)
        )
        self.target_keys = np.tile(targets, len(self.responses))
        generated = [
            sequence_keys(map(TokenSequence, self.examples.prompt_ids, responses.token_ids))
            for responses in self.responses
        ]
        self.generated_keys = np.concatenate([key_array(b""), *generated])
        reasons = (reason for responses in self.responses for reason in responses.finish_reasons)
        self.is_truncated = np.array([reason == "length" for reason in reasons], dtype=bool)

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
        opponent, row = divmod(int(index), len(self.examples))
        return Triple(
            self.examples[row],
            self.responses[opponent][row],
            self.opponents[opponent],
        )

    def token_ids(self, index: int) -> tuple[TokenIds, TokenIds, TokenIds]:
        """The ids of prompt, target and generated response of a triple."""
        opponent, row = divmod(index, len(self.examples))
        generated = self.responses[opponent].token_ids[row]
        return self.examples.prompt_ids[row], self.examples.target_ids[row], generated

    def sequences(self) -> DistinctSequences:
        """What must be scored: of each triple the target, then the generated response."""
        times = len(self.responses)
        prompts = np.tile(self.examples.prompt_numbers, times)
        targets = np.tile(self.examples.target_ids.lengths, times)
        lengths = [responses.token_ids.lengths for responses in self.responses]
        generated = np.concatenate([np.empty(0, dtype=np.int64), *lengths])
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
        return cls(
            triples,
            np.stack([store.logps(triples.target_keys) for store in stores], axis=1),
            np.stack([store.logps(triples.generated_keys) for store in stores], axis=1),
        )

    def __len__(self) -> int:
        return len(self.triples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Three int32 arrays of token ids, two float64 arrays (K,), and a bool."""
        prompt, target, generated = self.triples.token_ids(index)
        return {
            "prompt_ids": prompt,
            "target_ids": target,
            "generated_ids": generated,
            "player_target_logps": self.target_logps_NK[index],
            "player_generated_logps": self.generated_logps_NK[index],
            "is_truncated": bool(self.triples.is_truncated[index]),
        }
