"""Log-probs on disk: (player's fingerprint, sequence's hash) -> summed log-prob, float64, in nats.

Each pair is computed once in a run. From the third iteration of TPAW on, that is 6N sequences in an
iteration instead of 18N, for N examples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tpaw.data.token_ids import TokenSequence, read_table, write_table
from tpaw.storage.artifacts import ShardedArtifact

Key = bytes


def sequence_key(sequence: TokenSequence) -> Key:
    """Hash of the prompt's and the response's ids, and of where the response begins."""
    prompt, response = sequence
    border = len(prompt).to_bytes(4, "little")
    content = border + prompt.astype("<i4").tobytes() + response.astype("<i4").tobytes()
    return hashlib.blake2b(content, digest_size=16).digest()


class LogprobStore:
    """The log-probs under one player."""

    def __init__(self, folder: Path) -> None:
        self._shards = ShardedArtifact(folder, always_growing=True)
        self._logps: dict[Key, float] = {}
        self._stage_of: dict[Key, str] = {}
        for entry in self._shards.entries:
            table = read_table(folder / entry["path"])
            self._remember(entry["stage"], table["sequence"], table["logp"])

    def __contains__(self, key: Key) -> bool:
        return key in self._logps

    def __len__(self) -> int:
        return len(self._logps)

    def logps(self, keys: Iterable[Key]) -> NDArray[np.float64]:
        """The log-probs of sequences, in nats.

        Raises:
            KeyError: a sequence is not in the store.
        """
        return np.array([self._logps[key] for key in keys], dtype=np.float64)

    def missing_before(self, stage: str, keys: Iterable[Key]) -> list[Key]:
        """Distinct keys, in order, that no other stage has computed.

        The keys that `stage` itself has computed are included. So a stage that is resumed after a
        crash cuts the same work into the same batches, and rounds alike.
        """
        distinct = dict.fromkeys(keys)
        return [key for key in distinct if self._stage_of.get(key, stage) == stage]

    def has_shard(self, name: str) -> bool:
        """Whether a shard is published."""
        return name in self._shards.names

    def publish(
        self,
        name: str,
        stage: str,
        keys: Sequence[Key],
        logps: NDArray[np.float64],
        token_counts: Sequence[int],
        seconds: float,
    ) -> None:
        """Publish one shard. Its log-probs are never computed again."""
        columns = {"sequence": keys, "logp": logps.tolist(), "tokens": token_counts}
        self._shards.publish(
            name,
            lambda path: write_table(path, columns),
            stage=stage,
            sequences=len(keys),
            seconds=round(seconds, 3),
        )
        self._remember(stage, keys, columns["logp"])

    def _remember(self, stage: str, keys: Sequence[Key], logps: Sequence[float]) -> None:
        self._logps.update(zip(keys, logps, strict=True))
        self._stage_of.update(dict.fromkeys(keys, stage))
