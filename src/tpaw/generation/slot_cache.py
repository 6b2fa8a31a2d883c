"""A key-value cache for rows that come and go.

Shape suffixes: S slots, H key-value heads, C columns, D size of a head, N rows.

transformers' `DynamicCache` copies every key and value at every token, and keeps a row for as long
as its batch. Here a row has a slot of a buffer that is written in place. All rows end at one
column, as if padded on the left, so a model sees masks and positions just as in `generate`; that
is right for whatever it makes of distances between columns (RoPE, ALiBi, sliding windows).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache


class _SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, `keys` and `values` (S, H, C, D); written one token at a time.

    Rows lie in the first slots. Columns before a row's first are left over from others, and
    finite: attention masks them.
    """

    is_sliding = False

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        self._cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for states (rows, H, tokens, D) like these."""
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
        """Write the states (N, H, 1, D) of the token that comes next; views of all there are."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, begin, end = len(self._cache.starts), self._cache.begin, self._cache.end
        self.keys[:rows, :, end : end + 1] = key_states
        self.values[:rows, :, end : end + 1] = value_states
        return self.keys[:rows, :, begin : end + 1], self.values[:rows, :, begin : end + 1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that the mask covers, and the first of them."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Columns from the longest row's first to the last that is filled."""
        return self._cache.end - self._cache.begin

    def get_max_length(self) -> int:
        """-1: it never refuses a token."""
        return -1


class SlotCache(Cache):
    """Rows in slots, all ending at the same column.

    Attributes:
        slots: S. At most so many rows.
        columns: C.
        starts: the first column of each row, by slot.
        end: the column that the next token is written to.
    """

    def __init__(self, layers: int) -> None:
        self.slots = self.columns = self.end = 0
        self.starts: list[int] = []
        super().__init__(layers=[_SlotLayer(self) for _ in range(layers)])

    @property
    def begin(self) -> int:
        """The first column that any row uses."""
        return min(self.starts, default=self.end)

    def reshape(self, slots: int, columns: int) -> None:
        """Take other sizes, and move what is there to the first columns."""
        begin, end, rows = self.begin, self.end, len(self.starts)
        self.slots, self.columns = slots, columns
        self.starts, self.end = [start - begin for start in self.starts], end - begin
        for layer in self.layers:
            if layer.is_initialized:
                keys, values = layer.keys, layer.values
                layer.lazy_initialization(keys, values)
                layer.keys[:rows, :, : self.end] = keys[:rows, :, begin:end]
                layer.values[:rows, :, : self.end] = values[:rows, :, begin:end]

    def add(self, filled: DynamicCache, lengths: Sequence[int]) -> None:
        """Give slots to new rows, none longer than a row that is there.

        Args:
            filled: their first tokens, padded on the right; empty where no row has any.
            lengths: how many tokens each has there.
        """
        if not self.starts:
            self.end = max(lengths)
        first_slot = len(self.starts)
        self.starts += [self.end - length for length in lengths]
        for layer, source in zip(self.layers, filled.layers, strict=False):
            if not layer.is_initialized:
                layer.lazy_initialization(source.keys, source.values)
            for row, length in enumerate(lengths):
                columns = slice(self.end - length, self.end)
                layer.keys[first_slot + row, :, columns] = source.keys[row, :, :length]
                layer.values[first_slot + row, :, columns] = source.values[row, :, :length]

    def drop(self, gone: Sequence[int]) -> list[int]:
        """Free slots; the last rows move into them. Returns which row each slot now has."""
        kept = len(self.starts) - len(gone)
        free = [slot for slot in gone if slot < kept]
        moved = sorted(set(range(kept, len(self.starts))).difference(gone))
        order = list(range(kept))
        for slot, row in zip(free, moved, strict=True):
            order[slot] = row
        if free:
            for layer in self.layers:
                for states in (layer.keys, layer.values):
                    states[free, :, self.begin : self.end] = states[moved, :, self.begin : self.end]
        self.starts = [self.starts[row] for row in order]
        return order

    def step(self) -> None:
        """Count the token that the model has written for every row; make room for the next."""
        self.end += 1
        if self.end == self.columns:
            self.reshape(self.slots, self.columns)
