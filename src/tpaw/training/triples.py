"""Triples (x, y, y_gen), and the dataset of them that `TeamTrainer` reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from tpaw.data.examples import Example
from tpaw.data.token_ids import TokenSequence
from tpaw.errors import ArtifactError
from tpaw.generation.responses import Response
from tpaw.scoring.store import Key, LogprobStore, sequence_key

# The opponent of a preference pair, whose rejected answer comes from the data.
FROM_THE_DATA = -1


class Triple(NamedTuple):
    """(x, y, y_gen): an example and the response of one opponent to its prompt.

    Attributes:
        opponent: index of the player that responded, or `FROM_THE_DATA`.
        target_key, generated_key: of the two sequences in a `LogprobStore`.
    """

    example: Example
    response: Response
    opponent: int
    target_key: Key
    generated_key: Key

    @classmethod
    def of(cls, example: Example, response: Response, opponent: int) -> Triple:
        """The triple of an example and a response."""
        generated = TokenSequence(example.prompt_ids, response.token_ids)
        return cls(
            example, response, opponent, sequence_key(example.target), sequence_key(generated)
        )

    @property
    def target(self) -> TokenSequence:
        """Prompt and target."""
        return self.example.target

    @property
    def generated(self) -> TokenSequence:
        """Prompt and generated response."""
        return TokenSequence(self.example.prompt_ids, self.response.token_ids)

    def sequences(self) -> Iterator[tuple[Key, TokenSequence]]:
        """What must be scored, by key."""
        yield self.target_key, self.target
        yield self.generated_key, self.generated


def pair_with_responses(
    examples: Sequence[Example], responses: Sequence[Response], opponent: int
) -> list[Triple]:
    """One triple for each example and the opponent's response to it.

    Raises:
        ArtifactError: the responses belong to other examples.
    """
    triples = []
    for example, response in zip(examples, responses, strict=True):
        if example.id != response.example_id:
            raise ArtifactError(
                f"the responses of θ_{opponent} belong to other examples: {response.example_id} "
                f"where {example.id} was expected"
            )
        triples.append(Triple.of(example, response, opponent))
    return triples


def preference_pairs(examples: Sequence[Example]) -> list[Triple]:
    """One triple for each example with a rejected answer, which plays the generated response."""
    return [
        Triple.of(example, Response(example.id, example.rejected_ids, "", "stop"), FROM_THE_DATA)
        for example in examples
        if example.rejected_ids is not None
    ]


class TripleDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """D_O with its reference log-probs, as `TeamTrainer` reads it.

    Args:
        target_logps_NK, generated_logps_NK: float64, in nats: N triples, K players.
    """

    def __init__(
        self,
        triples: Sequence[Triple],
        target_logps_NK: NDArray[np.float64],
        generated_logps_NK: NDArray[np.float64],
    ) -> None:
        self.triples = triples
        self.target_logps_NK = target_logps_NK
        self.generated_logps_NK = generated_logps_NK

    @classmethod
    def of(cls, triples: Sequence[Triple], stores: Sequence[LogprobStore]) -> TripleDataset:
        """Triples with their log-probs under each player, all of which are in the stores."""
        target_keys = [triple.target_key for triple in triples]
        generated_keys = [triple.generated_key for triple in triples]
        return cls(
            triples,
            np.stack([store.logps(target_keys) for store in stores], axis=1),
            np.stack([store.logps(generated_keys) for store in stores], axis=1),
        )

    def __len__(self) -> int:
        return len(self.triples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Three int32 arrays of token ids, two float64 arrays (K,), and a bool."""
        triple = self.triples[index]
        return {
            "prompt_ids": triple.example.prompt_ids,
            "target_ids": triple.example.target_ids,
            "generated_ids": triple.response.token_ids,
            "player_target_logps": self.target_logps_NK[index],
            "player_generated_logps": self.generated_logps_NK[index],
            "is_truncated": triple.response.finish_reason == "length",
        }
