"""Token ids: int32 arrays of one dimension in memory, list columns in parquet files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tpaw.data.columns import Column, ColumnWriter

TokenIds = NDArray[np.int32]


class TokenSequence(NamedTuple):
    """A prompt and one response to it.

    Attributes:
        prompt_ids: int32, of shape (prompt tokens,).
        response_ids: int32, of shape (response tokens,).
    """

    prompt_ids: TokenIds
    response_ids: TokenIds


def token_ids(ids: Iterable[int]) -> TokenIds:
    """Convert token ids to an int32 array.

    Args:
        ids: token ids in any iterable.

    Returns:
        An array of shape (tokens,). An array that is already int32 is returned without a copy.
    """
    if isinstance(ids, np.ndarray) and ids.dtype == np.int32:
        return ids
    return np.asarray(ids if hasattr(ids, "__array__") else list(ids), dtype=np.int32)


def write_table(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Write a parquet file.

    Args:
        path: the file to write.
        columns: column name to values. Values that are arrays become a list column of int32.
    """
    arrays = {}
    for name, values in columns.items():
        if isinstance(values, Column) and len(values):
            arrays[name] = values.to_arrow()
            continue
        is_ids = len(values) > 0 and isinstance(values[0], np.ndarray)
        arrays[name] = pa.array(values, type=pa.list_(pa.int32()) if is_ids else None)
    pq.write_table(pa.table(arrays), path)


def read_table(path: Path) -> dict[str, list[Any]]:
    """Read a parquet file.

    Returns:
        Column name to values. The values of a list column are int32 arrays, which share one buffer.
    """
    table = pq.read_table(path)
    return {name: _values(table[name].combine_chunks()) for name in table.column_names}


# Few enough to need little memory, and enough to be read fast.
_ROWS_AT_A_TIME = 4096
_BYTES_AT_A_TIME = 1 << 20


def read_columns(
    paths: Iterable[Path], kinds: Mapping[str, type[Column[Any]]]
) -> dict[str, Column[Any]]:
    """Read columns of parquet files, one file after the other, without holding them in memory.

    Args:
        paths: files with the same columns.
        kinds: names of the columns to read, each with its kind.

    Returns:
        Column name to values. A column that no file has is left out.
    """
    writers: dict[str, ColumnWriter[Any]] = {}
    for path in paths:
        with pq.ParquetFile(path, buffer_size=_BYTES_AT_A_TIME) as file:
            names = [name for name in file.schema_arrow.names if name in kinds]
            for name in names:
                writers.setdefault(name, ColumnWriter(kinds[name]))
            for batch in file.iter_batches(_ROWS_AT_A_TIME, columns=names):
                for name in names:
                    writers[name].extend(batch.column(name))
    return {name: writer.finish() for name, writer in writers.items()}


def _values(column: Any) -> list[Any]:
    if not pa.types.is_list(column.type):
        return list(column.to_pylist())
    offsets = column.offsets.to_numpy()
    flat = column.values.to_numpy().astype(np.int32, copy=False)
    return [flat[a:b] for a, b in pairwise(offsets)]
