"""A key-value cache whose sequences may start and end at different times.

Shape suffixes: S slots, H key-value heads, C columns, D size of a head, N active sequences.

transformers' `DynamicCache` copies every key and value at every token, and it keeps a sequence
until the whole batch has ended. `SlotCache` allocates one buffer and writes it in place. Each
sequence occupies one slot of the buffer, and each token one column. All sequences end at the same
column, as if they were padded on the left. So the model gets the same kind of mask and positions
as from transformers' `generate`, and everything that depends on the distance between columns
(RoPE, ALiBi, sliding windows) is correct.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache


class _SlotLayer(CacheLayerMixin):
    """Keys and values of one layer: `keys` and `values`, both (S, H, C, D).

    Active sequences occupy the first N slots. The columns before a sequence's first column may hold
    values of earlier sequences. These values are finite, and the attention mask hides them.
    """

    is_sliding = False

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        self._cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the buffers.

        Args:
            key_states, value_states: (any, H, any, D); they give H, D, dtype and device.
        """
        self.keys, self.values = (
            states.new_zeros(
                (self._cache.slots, states.shape[1], self._cache.columns, states.shape[3])
            )
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the states of the next token.

        Args:
            key_states, value_states: (N, H, 1, D).

        Returns:
            Views of the keys and values of all used columns, the new one included.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        active, begin, end = len(self._cache.starts), self._cache.begin, self._cache.end
        self.keys[:active, :, end : end + 1] = key_states
        self.values[:active, :, end : end + 1] = value_states
        return self.keys[:active, :, begin : end + 1], self.values[:active, :, begin : end + 1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of columns that the mask covers, and the index of the first one."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Return the number of used columns, which is the length of the longest sequence."""
        return self._cache.end - self._cache.begin

    def get_max_length(self) -> int:
        """Return -1, which means: no maximum."""
        return -1


class SlotCache(Cache):
    """Sequences in slots; all of them end at the same column.

    Args:
        layers: number of layers of the model that cache keys and values.

    Attributes:
        slots: S, the largest number of active sequences.
        columns: C.
        starts: the first column of each active sequence, by slot; N entries.
        end: the column that the next token is written to.
    """

    def __init__(self, layers: int) -> None:
        self.slots = self.columns = self.end = 0
        self.starts: list[int] = []
        super().__init__(layers=[_SlotLayer(self) for _ in range(layers)])

    @property
    def begin(self) -> int:
        """The first column that any active sequence uses."""
        return min(self.starts, default=self.end)

    def reshape(self, slots: int, columns: int) -> None:
        """Allocate buffers of another size and copy the active sequences to their first columns.

        Args:
            slots: the new S, at least the number of active sequences.
            columns: the new C, larger than the longest active sequence.
        """
        begin, end, active = self.begin, self.end, len(self.starts)
        self.slots, self.columns = slots, columns
        self.starts, self.end = [start - begin for start in self.starts], end - begin
        for layer in self.layers:
            if layer.is_initialized:
                keys, values = layer.keys, layer.values
                layer.lazy_initialization(keys, values)
                layer.keys[:active, :, : self.end] = keys[:active, :, begin:end]
                layer.values[:active, :, : self.end] = values[:active, :, begin:end]

    def add(self, filled: DynamicCache, lengths: Sequence[int]) -> None:
        """Copy new sequences into free slots.

        Args:
            filled: keys and values of the new sequences, padded on the right. It is empty if all
                lengths are 0.
            lengths: number of tokens of each new sequence. None may be longer than the longest
                active sequence, because the columns of a new sequence end at `end` too.
        """
        if not self.starts:
            self.end = max(lengths)
        first_slot = len(self.starts)
        self.starts += [self.end - length for length in lengths]
        for layer, source in zip(self.layers, filled.layers, strict=False):
            if not layer.is_initialized:
                layer.lazy_initialization(source.keys, source.values)
            for i, length in enumerate(lengths):
                columns = slice(self.end - length, self.end)
                layer.keys[first_slot + i, :, columns] = source.keys[i, :, :length]
                layer.values[first_slot + i, :, columns] = source.values[i, :, :length]

    def drop(self, gone: Sequence[int]) -> list[int]:
        """Remove sequences and move the last sequences into the slots that become free.

        Args:
            gone: slots of the sequences to remove.

        Returns:
            For each active slot, the slot that its sequence had before the call.
        """
        kept = len(self.starts) - len(gone)
        free = [slot for slot in gone if slot < kept]
        moved = sorted(set(range(kept, len(self.starts))).difference(gone))
        order = list(range(kept))
        for slot, previous in zip(free, moved, strict=True):
            order[slot] = previous
        if free:
            for layer in self.layers:
                for states in (layer.keys, layer.values):
                    states[free, :, self.begin : self.end] = states[moved, :, self.begin : self.end]
        self.starts = [self.starts[slot] for slot in order]
        return order

    def step(self) -> None:
        """Move `end` to the next column. If no column is left, reuse the columns before `begin`."""
        self.end += 1
        if self.end == self.columns:
            self.reshape(self.slots, self.columns)
