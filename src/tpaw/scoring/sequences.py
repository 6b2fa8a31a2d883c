"""The sequences that an iteration needs log-probs of: each once, with its key."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from tpaw.data.columns import KeyArray, key_array
from tpaw.data.token_ids import TokenSequence
from tpaw.scoring.store import sequence_key


class DistinctSequences:
    """Distinct sequences, in the order of their first occurrence. They are made when indexed.

    Args:
        keys: of sequences that may occur several times, of shape (all,).
        prompts: int64, of shape (all,). Sequences with equal numbers have the same prompt.
        lengths: int64, of shape (all,): response tokens.
        sequence: returns a sequence, given its position in these arrays.

    Attributes:
        keys, prompts, lengths: those of the distinct sequences.
    """

    def __init__(
        self,
        keys: KeyArray,
        prompts: NDArray[np.int64],
        lengths: NDArray[np.int64],
        sequence: Callable[[int], TokenSequence],
    ) -> None:
        self._positions = np.sort(np.unique(keys, return_index=True)[1])
        self._sequence = sequence
        self.keys = keys[self._positions]
        self.prompts = prompts[self._positions]
        self.lengths = lengths[self._positions]

    @classmethod
    def of(cls, sequences: Iterable[TokenSequence]) -> DistinctSequences:
        """The distinct ones of some sequences that are in memory."""
        known = list(sequences)
        numbers: dict[bytes, int] = {}
        prompts = [numbers.setdefault(prompt.tobytes(), len(numbers)) for prompt, _ in known]
        return cls(
            sequence_keys(known),
            np.array(prompts, dtype=np.int64),
            np.array([len(response) for _, response in known], dtype=np.int64),
            known.__getitem__,
        )

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> TokenSequence:
        return self._sequence(int(self._positions[index]))

    def scoring_order(self, among: NDArray[np.int64]) -> NDArray[np.int64]:
        """The order in which sequences are scored.

        Sequences of a prompt stay together. The prompt with the longest response comes first, so
        that neighbours have similar lengths.

        Args:
            among: indices of the sequences to score, in ascending order.

        Returns:
            The same indices in another order.
        """
        _, first, prompt_of = np.unique(self.prompts[among], return_index=True, return_inverse=True)
        longest = np.zeros(len(first), dtype=np.int64)
        np.maximum.at(longest, prompt_of, self.lengths[among])
        ranks = np.empty(len(first), dtype=np.int64)
        ranks[np.lexsort((first, -longest))] = np.arange(len(first))
        order: NDArray[np.int64] = among[np.argsort(ranks[prompt_of], kind="stable")]
        return order


def sequence_keys(sequences: Iterable[TokenSequence]) -> KeyArray:
    """The keys of sequences, as an array."""
    keys = bytearray()
    for sequence in sequences:
        keys += sequence_key(sequence)
    return key_array(keys)
