"""Columns of values of unequal lengths, such as token ids and texts, on disk instead of in memory.

A million rows as Python objects take many gigabytes. A column keeps its values one after another in
a file that is mapped into memory, and one offset for each row. The file has no name, so nothing is
left of it after a crash. It is in the folder for temporary files (`TMPDIR`).
"""

from __future__ import annotations

import hashlib
import mmap
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Generic, Self, TypeVar, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tpaw.errors import StorageError

Value = TypeVar("Value")

KEY_BYTES = 16
# Hashes of `KEY_BYTES` bytes. numpy drops the last zero bytes of a single one; `key_list` does not.
KeyArray = NDArray[np.bytes_]

# An Arrow array of this type counts its values in 32 bits.
_VALUES_OF_AN_ARRAY = 2**31 - 1


class Column(Sequence[Value], Generic[Value]):
    """Values of unequal lengths, each a stretch of one flat array.

    Attributes:
        offsets: int64, of shape (rows + 1,): where each value begins, and where the last one ends.
        flat: all values, one after another.
    """

    dtype: type[np.generic]

    def __init__(self, offsets: NDArray[np.int64], flat: NDArray[Any]) -> None:
        self.offsets = offsets
        self.flat = flat

    @classmethod
    def of(cls, values: Iterable[Value]) -> Self:
        """A column of the given values."""
        writer = ColumnWriter(cls)
        for value in values:
            writer.append(value)
        return writer.finish()

    @staticmethod
    def to_flat(value: Any) -> NDArray[Any]:
        """A value as a part of `flat`."""
        raise NotImplementedError

    @staticmethod
    def from_flat(part: NDArray[Any]) -> Any:
        """The value that a part of `flat` stands for."""
        raise NotImplementedError

    @staticmethod
    def from_arrow(values: Any) -> tuple[NDArray[Any], NDArray[Any]]:
        """Offsets and flat values of an Arrow array."""
        raise NotImplementedError

    def part(self, begin: int, end: int) -> Self:
        """The rows from `begin` to `end`, over the same memory."""
        offsets = self.offsets[begin : end + 1]
        return type(self)(offsets - offsets[0], self.flat[offsets[0] : offsets[-1]])

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Length of each value, int64, of shape (rows,)."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> Value: ...
    @overload
    def __getitem__(self, index: slice) -> list[Value]: ...
    def __getitem__(self, index: int | slice) -> Value | list[Value]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        value: Value = self.from_flat(self.flat[self.offsets[index] : self.offsets[index + 1]])
        return value

    def __iter__(self) -> Iterator[Value]:
        begin = 0
        for end in self.offsets[1:]:
            yield self.from_flat(self.flat[begin:end])
            begin = end

    def to_arrow(self, *, values_of_an_array: int = _VALUES_OF_AN_ARRAY) -> pa.ChunkedArray:
        """The column as Arrow arrays over the same memory, as few as can be.

        Args:
            values_of_an_array: flat values that an array may have.
        """
        chunks: list[Any] = []
        begin = 0
        while begin < len(self) or not chunks:
            limit = self.offsets[begin] + values_of_an_array
            end = int(np.searchsorted(self.offsets, limit, side="right")) - 1
            end = min(max(end, begin + 1), len(self))
            chunks.append(self._arrow_array(begin, end))
            begin = end
        return pa.chunked_array(chunks)

    def _arrow_array(self, begin: int, end: int) -> pa.Array:
        offsets = (self.offsets[begin : end + 1] - self.offsets[begin]).astype(np.int32)
        return self.arrow_of(offsets, self.flat[self.offsets[begin] : self.offsets[end]])

    @staticmethod
    def arrow_of(offsets: NDArray[np.int32], flat: NDArray[Any]) -> pa.Array:
        """An Arrow array of flat values."""
        raise NotImplementedError


class IdColumn(Column[NDArray[np.int32]]):
    """Token ids: int32 arrays of one dimension, which cannot be written to."""

    dtype = np.int32

    @staticmethod
    def to_flat(value: NDArray[np.int32]) -> NDArray[np.int32]:
        """See `Column`."""
        return np.ascontiguousarray(value, dtype=np.int32)

    @staticmethod
    def from_flat(part: NDArray[np.int32]) -> NDArray[np.int32]:
        """See `Column`."""
        return part

    @staticmethod
    def from_arrow(values: Any) -> tuple[NDArray[Any], NDArray[Any]]:
        """See `Column`."""
        offsets = values.offsets.to_numpy()
        flat = values.values.to_numpy(zero_copy_only=False)
        return offsets - offsets[:1], flat[offsets[0] : offsets[-1]]

    @staticmethod
    def arrow_of(offsets: NDArray[np.int32], flat: NDArray[np.int32]) -> pa.Array:
        """See `Column`."""
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))


class TextColumn(Column[str]):
    """Texts, as UTF-8."""

    dtype = np.uint8

    @staticmethod
    def to_flat(value: str) -> NDArray[np.uint8]:
        """See `Column`."""
        return np.frombuffer(value.encode(), dtype=np.uint8)

    @staticmethod
    def from_flat(part: NDArray[np.uint8]) -> str:
        """See `Column`."""
        return str(part.data, "utf-8")

    @staticmethod
    def from_arrow(values: Any) -> tuple[NDArray[Any], NDArray[Any]]:
        """See `Column`."""
        _, offsets_buffer, flat_buffer = values.buffers()
        stretch = slice(values.offset, values.offset + len(values) + 1)
        offsets = np.frombuffer(offsets_buffer, dtype=np.int32)[stretch]
        flat = np.frombuffer(flat_buffer or b"", dtype=np.uint8)
        return offsets - offsets[:1], flat[offsets[0] : offsets[-1]]

    @staticmethod
    def arrow_of(offsets: NDArray[np.int32], flat: NDArray[np.uint8]) -> pa.Array:
        """See `Column`."""
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(flat)]
        return pa.StringArray.from_buffers(len(offsets) - 1, *buffers[1:])


AnyColumn = TypeVar("AnyColumn", bound=Column[Any])


class ColumnWriter(Generic[AnyColumn]):
    """Writes a column value by value, or many values at a time."""

    def __init__(self, kind: type[AnyColumn]) -> None:
        self.kind = kind
        try:
            self._file = tempfile.TemporaryFile(prefix="tpaw-", buffering=1 << 20)  # noqa: SIM115
        except OSError as error:
            raise _no_space(error) from None
        self._offsets = array("q", [0])

    def append(self, value: Any) -> None:
        """Add one value.

        Raises:
            StorageError: the disk of the temporary files is full. So do the other methods.
        """
        part = self.kind.to_flat(value)
        self._write(part)
        self._offsets.append(self._offsets[-1] + len(part))

    def extend(self, values: pa.Array) -> None:
        """Add the values of an Arrow array that has no nulls."""
        if not len(values):
            return
        offsets, flat = self.kind.from_arrow(values)
        self._write(np.ascontiguousarray(flat, dtype=self.kind.dtype))
        ends = self._offsets[-1] + offsets[1:].astype(np.int64)
        self._offsets.frombytes(ends.tobytes())

    def finish(self) -> AnyColumn:
        """The column. Nothing can be added afterwards."""
        offsets = np.frombuffer(self._offsets, dtype=np.int64)
        mapped: Any = b""  # an empty file cannot be mapped
        try:
            with self._file as file:
                file.flush()
                if offsets[-1]:  # the mapping outlives the file object
                    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise _no_space(error) from None
        return self.kind(offsets, np.frombuffer(mapped, dtype=self.kind.dtype))

    def _write(self, part: NDArray[Any]) -> None:
        try:
            self._file.write(part.data)
        except OSError as error:
            raise _no_space(error) from None


def row_keys(*columns: Column[Any]) -> KeyArray:
    """Hashes of the rows of some columns.

    Returns:
        16 bytes for each row. Rows are equal where the hashes are.
    """
    keys = bytearray()
    for values in zip(*columns, strict=True):
        digest = hashlib.blake2b(digest_size=KEY_BYTES)
        for column, value in zip(columns, values, strict=True):
            part = column.to_flat(value)
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part.data)
        keys += digest.digest()
    return key_array(keys)


def key_array(content: bytes | bytearray) -> KeyArray:
    """Keys that stand one after another, `KEY_BYTES` each, as an array."""
    return np.frombuffer(content, dtype=f"S{KEY_BYTES}")


def key_list(keys: KeyArray) -> list[bytes]:
    """The keys one by one, with their last zero bytes."""
    content = keys.tobytes()
    return [content[i : i + KEY_BYTES] for i in range(0, len(content), KEY_BYTES)]


def _no_space(error: OSError) -> StorageError:
    return StorageError(
        f"{tempfile.gettempdir()}: {error.strerror}: a temporary file cannot be written; free some "
        "space, or set the environment variable TMPDIR to a folder on a larger disk"
    )
