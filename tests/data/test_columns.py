"""Columns on disk against lists in memory."""

from __future__ import annotations

import errno
import tempfile

import numpy as np
import pyarrow as pa
import pytest
from messages import refused

from tpaw.data.columns import (
    ColumnWriter,
    IdColumn,
    TextColumn,
    key_array,
    key_list,
    row_keys,
)
from tpaw.data.token_ids import read_columns, read_table, token_ids, write_table
from tpaw.errors import StorageError

ALPHABET = list("ab é漢🙂\n")


def values_of(kind, count, seed):
    """Random values; some are empty, and some stand there twice."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 6, count)
    if kind is IdColumn:
        return [token_ids(rng.integers(0, 3, n)) for n in lengths]
    return ["".join(rng.choice(ALPHABET, n)) for n in lengths]


def plain(values):
    return [v.tolist() if isinstance(v, np.ndarray) else v for v in values]


KINDS = pytest.mark.parametrize("kind", [IdColumn, TextColumn])


@KINDS
@pytest.mark.parametrize("count", [0, 1, 57])
def test_a_column_reads_as_the_list_that_it_was_made_of(kind, count):
    values = values_of(kind, count, seed=count)
    column = kind.of(values)
    expected = plain(values)
    assert len(column) == count
    assert plain(column) == expected
    assert plain(column[i] for i in range(-count, count)) == expected + expected
    assert plain(column[5:40:3]) == expected[5:40:3]
    for outside in (count, -count - 1):
        with pytest.raises(IndexError):
            column[outside]
    assert len(column.lengths) == count


@KINDS
@pytest.mark.parametrize("most", [1, 7, 2**31 - 1])
def test_a_column_becomes_arrow_arrays_that_are_not_too_long(kind, most):
    values = values_of(kind, 40, seed=3)
    found = kind.of(values).to_arrow(values_of_an_array=most)
    expected = pa.array(values, type=pa.list_(pa.int32()) if kind is IdColumn else pa.string())
    assert found.type == expected.type
    assert found.to_pylist() == expected.to_pylist()
    longest = max(len(v if kind is IdColumn else v.encode()) for v in values)
    flat = [len(kind.from_arrow(chunk)[1]) for chunk in found.chunks]
    assert max(flat) <= max(most, longest)
    assert (len(flat) > 1) == (most < 100)


@KINDS
def test_stretches_of_arrow_arrays_are_added(kind):
    values = values_of(kind, 40, seed=4)
    array = pa.array(values, type=pa.list_(pa.int32()) if kind is IdColumn else pa.string())
    writer = ColumnWriter(kind)
    for part in (array.slice(3, 10), array.slice(0, 0), array.slice(20)):
        writer.extend(part)
    writer.append(values[0])
    expected = plain([*values[3:13], *values[20:], values[0]])
    assert plain(writer.finish()) == expected


def test_columns_are_written_as_lists_are_and_read_from_several_files(tmp_path):
    lists = {
        "ids": values_of(IdColumn, 5000, seed=5),
        "text": values_of(TextColumn, 5000, seed=6),
    }
    columns = {"ids": IdColumn.of(lists["ids"]), "text": TextColumn.of(lists["text"])}
    write_table(tmp_path / "a.parquet", lists)
    write_table(tmp_path / "b.parquet", columns)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    kinds = {"ids": IdColumn, "text": TextColumn, "other": TextColumn}
    found = read_columns([tmp_path / "a.parquet", tmp_path / "b.parquet"], kinds)
    assert list(found) == ["ids", "text"]
    for name, values in read_table(tmp_path / "a.parquet").items():
        assert plain(found[name]) == plain(values) * 2


def test_rows_have_equal_keys_where_they_are_equal():
    ids, texts = values_of(IdColumn, 200, seed=7), values_of(TextColumn, 200, seed=8)
    rows = [(tuple(i.tolist()), t[:1]) for i, t in zip(ids, texts, strict=True)]
    found = key_list(row_keys(IdColumn.of(ids), TextColumn.of(t[:1] for t in texts)))
    assert len(set(rows)) < 200
    for i in range(200):
        same = [key == found[i] for key in found]
        assert same == [row == rows[i] for row in rows]
    # The border between two columns counts.
    one = row_keys(TextColumn.of(["ab"]), TextColumn.of(["c"]))
    other = row_keys(TextColumn.of(["a"]), TextColumn.of(["bc"]))
    assert key_list(one) != key_list(other)


def test_keys_keep_the_zeros_at_their_end():
    keys = [bytes(16), b"a" + bytes(15), b"\0" * 15 + b"a"]
    assert key_list(key_array(b"".join(keys))) == keys


@pytest.mark.parametrize("fails", ["opening", "writing"])
def test_a_full_disk_of_temporary_files_is_named(monkeypatch, fails):
    def fail(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = ColumnWriter(TextColumn)
    if fails == "opening":
        monkeypatch.setattr(tempfile, "TemporaryFile", fail)
    else:
        monkeypatch.setattr(writer, "_file", type("Full", (), {"write": fail})())
    with refused(tempfile.gettempdir(), "No space left", "TMPDIR", error=StorageError):
        (writer if fails == "writing" else ColumnWriter(TextColumn)).append("x")
