"""Token ids: one-dimensional int32 arrays in memory, list columns in parquet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

TokenIds = NDArray[np.int32]


class TokenSequence(NamedTuple):
    """A prompt and one response to it."""

    prompt_ids: TokenIds
    response_ids: TokenIds


def token_ids(ids: Iterable[int]) -> TokenIds:
    """Token ids as an int32 array; one that is int32 already is returned as it is."""
    if isinstance(ids, np.ndarray) and ids.dtype == np.int32:
        return ids
    return np.asarray(ids if hasattr(ids, "__array__") else list(ids), dtype=np.int32)


def write_table(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Write columns to parquet. A column of arrays becomes a list column."""
    arrays = {}
    for name, values in columns.items():
        is_ids = len(values) > 0 and isinstance(values[0], np.ndarray)
        arrays[name] = pa.array(values, type=pa.list_(pa.int32()) if is_ids else None)
    pq.write_table(pa.table(arrays), path)


def read_table(path: Path) -> dict[str, list[Any]]:
    """Read columns from parquet. List columns become int32 arrays that share one buffer."""
    table = pq.read_table(path)
    return {name: _values(table[name].combine_chunks()) for name in table.column_names}


def _values(column: Any) -> list[Any]:
    if not pa.types.is_list(column.type):
        return list(column.to_pylist())
    offsets = column.offsets.to_numpy()
    flat = column.values.to_numpy().astype(np.int32, copy=False)
    return [flat[a:b] for a, b in pairwise(offsets)]
