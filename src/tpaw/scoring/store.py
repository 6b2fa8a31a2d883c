"""Log-probs on disk: (player's fingerprint, sequence's hash) -> summed log-prob, float64, in nats.

Each pair is computed once in a run. From the third iteration of TPAW on, that is 6N sequences in an
iteration instead of 18N, for N examples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tpaw.data.columns import KEY_BYTES, KeyArray, key_array, key_list
from tpaw.data.token_ids import TokenSequence
from tpaw.storage.artifacts import Facts, ShardedArtifact

Key = bytes


def sequence_key(sequence: TokenSequence) -> Key:
    """Hash of the prompt's and the response's ids, and of where the response begins."""
    prompt, response = sequence
    border = len(prompt).to_bytes(4, "little")
    content = border + prompt.astype("<i4").tobytes() + response.astype("<i4").tobytes()
    return hashlib.blake2b(content, digest_size=KEY_BYTES).digest()


class LogprobStore:
    """The log-probs under one player, in arrays that are sorted by key."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shards = ShardedArtifact(folder, always_growing=True)
        self._keys = key_array(b"")
        self._logps = np.empty(0, dtype=np.float64)
        self._stages = np.empty(0, dtype=np.int64)  # for each key, an index into `_stage_names`
        self._stage_names: list[str] = []
        self._not_sorted: list[tuple[KeyArray, NDArray[np.float64], NDArray[np.int64]]] = []
        for entry in self._shards.entries:
            self._read(entry)

    def __contains__(self, key: Key) -> bool:
        return bool(self.contains(key_array(key))[0])

    def __len__(self) -> int:
        self._sort()
        return len(self._keys)

    def contains(self, keys: KeyArray) -> NDArray[np.bool_]:
        """Whether the store has each of some sequences."""
        return self._find(keys) >= 0

    def logps(self, keys: KeyArray | Iterable[Key]) -> NDArray[np.float64]:
        """The log-probs of sequences, in nats.

        Raises:
            KeyError: a sequence is not in the store.
        """
        if not isinstance(keys, np.ndarray):
            keys = np.array(list(keys), dtype=f"S{KEY_BYTES}")
        places = self._find(keys)
        if (places < 0).any():
            raise KeyError(key_list(keys[places < 0])[0])
        return self._logps[places]

    def missing_before(self, stage: str, keys: KeyArray) -> NDArray[np.int64]:
        """Indices of the keys that no other stage has computed, in ascending order.

        The keys that `stage` itself has computed are included. So a stage that is resumed after a
        crash cuts the same work into the same batches, and rounds alike.
        """
        places = self._find(keys)
        is_missing = places < 0
        if stage in self._stage_names:
            is_own = self._stages[places] == self._stage_names.index(stage)
            is_missing |= (places >= 0) & is_own
        return np.flatnonzero(is_missing)

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

    def receive(self, record: Path, stage: str, keys: KeyArray, logps: NDArray[np.float64]) -> None:
        """Publish a delivered shard. Its log-probs are never computed again.

        Args:
            record: of the delivery; see `storage.artifacts.deliver`.
            stage: for whom the shard was computed.
            keys: one for each sequence of the shard.
            logps: float64, in nats, (sequences,).
        """
        self._shards.receive(record)
        self._remember(stage, keys, logps)

    def _read(self, entry: Facts) -> None:
        table = pq.read_table(self.folder / entry["path"], columns=["sequence", "logp"])
        keys = key_array(b"".join(table["sequence"].to_pylist()))
        self._remember(entry["stage"], keys, table["logp"].to_numpy())

    def _remember(self, stage: str, keys: KeyArray, logps: NDArray[np.float64]) -> None:
        if stage not in self._stage_names:
            self._stage_names.append(stage)
        stages = np.full(len(keys), self._stage_names.index(stage))
        self._not_sorted.append((keys, logps, stages))

    def _find(self, keys: KeyArray) -> NDArray[np.int64]:
        """The place of each key in the arrays; -1 where it is not there."""
        self._sort()
        if not len(self._keys):
            return np.full(len(keys), -1)
        order = np.argsort(keys)  # a sorted search needs far fewer reads from memory
        in_order = keys[order]
        found = np.searchsorted(self._keys, in_order)
        found[found == len(self._keys)] = 0
        found[self._keys[found] != in_order] = -1
        places = np.empty(len(keys), dtype=np.int64)
        places[order] = found
        return places

    def _sort(self) -> None:
        """Sort in what was added. Of a key that was added twice, the last log-prob counts."""
        if not self._not_sorted:
            return
        added = [(self._keys, self._logps, self._stages), *self._not_sorted]
        keys, logps, stages = (np.concatenate(parts) for parts in zip(*added, strict=True))
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        is_last = np.append(keys[1:] != keys[:-1], True)
        order = order[is_last]
        self._keys, self._logps, self._stages = keys[is_last], logps[order], stages[order]
        self._not_sorted = []
