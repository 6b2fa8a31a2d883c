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

from tpaw.data.token_ids import TokenSequence, read_table
from tpaw.storage.artifacts import Facts, ShardedArtifact

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
        self.folder = folder
        self._shards = ShardedArtifact(folder, always_growing=True)
        self._logps: dict[Key, float] = {}
        self._stage_of: dict[Key, str] = {}
        for entry in self._shards.entries:
            self._read(entry)

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

    def begin(self) -> None:
        """Create the folder, so that shards can be delivered into it. Call it once, before that.

        Shards that were delivered to a process that died are read.
        """
        before = self._shards.names
        self._shards.begin()
        for entry in self._shards.entries:
            if entry["path"] not in before:
                self._read(entry)

    def receive(
        self, record: Path, stage: str, keys: Sequence[Key], logps: NDArray[np.float64]
    ) -> None:
        """Publish a delivered shard. Its log-probs are never computed again.

        Args:
            record: of the delivery; see `storage.artifacts.deliver`.
            stage: for whom the shard was computed.
            keys: one for each sequence of the shard.
            logps: float64, in nats, (sequences,).
        """
        self._shards.receive(record)
        self._remember(stage, keys, logps.tolist())

    def _read(self, entry: Facts) -> None:
        table = read_table(self.folder / entry["path"])
        self._remember(entry["stage"], table["sequence"], table["logp"])

    def _remember(self, stage: str, keys: Sequence[Key], logps: Sequence[float]) -> None:
        self._logps.update(zip(keys, logps, strict=True))
        self._stage_of.update(dict.fromkeys(keys, stage))
