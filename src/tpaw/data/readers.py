"""Read records from files, saved datasets and the Hugging Face Hub.

A malformed line or file raises an error that names the file and the line.
"""

from __future__ import annotations

import csv
import json
import os
import re
import reprlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from tpaw.config.messages import nearest
from tpaw.config.schema import DataConfig
from tpaw.errors import InputError, first_line, printable
from tpaw.runtime.progress import OnDone, ignore
from tpaw.storage.resources import resolve_path

Record = Mapping[str, Any]

SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet", ".csv", ".arrow")
_BLANKS = re.compile(r"[ \t\n\r]*")


# Records that decide the format of a source.
_HEAD = 100
# Records that are converted to Python at a time.
_RECORDS_AT_A_TIME = 256
_BYTES_AT_A_TIME = 1 << 20


class Records(list[Record]):
    """Records, as mappings of column name to value.

    Attributes:
        columns: names of all columns of the source, also of those that were not read.
    """

    def __init__(self, records: Iterable[Record], columns: Iterable[str]) -> None:
        super().__init__(records)
        self.columns = tuple(columns)


class RecordStream:
    """The records of a source, read as they are asked for. They can be read once.

    Attributes:
        head: the first 100 records, which have been read.
    """

    def __init__(self, records: Iterator[Record], columns: Iterable[str] | None) -> None:
        first = list(islice(records, _HEAD))
        self.head = Records(first, (first[0] if first else ()) if columns is None else columns)
        self._rest = records

    def __iter__(self) -> Iterator[Record]:
        yield from self.head
        yield from self._rest


def read_records(config: DataConfig, key: str, columns: Collection[str] | None = None) -> Records:
    """Read all records into memory; see `open_records`."""
    stream = open_records(config, key, columns)
    return Records(stream, stream.head.columns)


def count_records(config: DataConfig, key: str, on_done: OnDone = ignore) -> int:
    """Count the records of a source, at most `config.limit`; see `open_records`.

    Args:
        config: where the records are.
        key: key path of `config` for error messages.
        on_done: called with the number of records counted since the last call.

    Raises:
        InputError: the source cannot be read, or a record is malformed.
    """
    records, count = iter(open_records(config, key, columns=())), 0
    while found := sum(1 for _ in islice(records, _RECORDS_AT_A_TIME)):
        on_done(found)
        count += found
    return count


def open_records(
    config: DataConfig, key: str, columns: Collection[str] | None = None
) -> RecordStream:
    """Open a local file or folder, or a Hub dataset, to read its records one after another.

    Args:
        config: where the records are.
        key: key path of `config` for error messages, for example `data`.
        columns: the columns to read from a file or dataset that stores columns separately. A
            value that Python cannot hold does no harm in any other column. Default: all.

    Returns:
        The records; at most `config.limit` of them. The rest of a file is not read.

    Raises:
        InputError: the source does not exist, cannot be read, is malformed, or has no records.
            A record that is malformed raises it when it is reached.
    """
    path = resolve_path(config.path)
    name = f"{key}.path: {config.path}"
    suffix = Path(path).suffix.lower()
    known: Sequence[str] | None = None
    if os.path.isfile(path):
        if suffix in _TEXT_READERS:
            records = _TEXT_READERS[suffix](Path(path), name)
        elif suffix in _TABLE_READERS:
            known, records = _TABLE_READERS[suffix](Path(path), name, columns, config.limit)
        else:
            raise InputError(f"{name}: unknown file type; must be one of {', '.join(SUFFIXES)}")
    elif os.path.isdir(path) or not (suffix in SUFFIXES or config.path.startswith((".", "/", "~"))):
        known, records = _dataset(path, config, key, columns)
    else:
        raise InputError(f"{name}: no such file or folder; check the path")
    stream = RecordStream(islice(records, config.limit), known)
    if not stream.head:
        raise InputError(f"{name}: has no records; give a file with at least one")
    return stream


def _read_jsonl(path: Path, name: str) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    place = f"{name}: line {number}"
                    start = _BLANKS.match(line).end()  # type: ignore[union-attr]
                    record, end = _json_object(line, start, place)
                    if line[end:].strip():
                        raise InputError(f"{place}: malformed JSON: text after the object")
                    yield record
        except UnicodeDecodeError as error:
            raise InputError(f"{name}: not UTF-8 text: {error}") from None


def _read_json(path: Path, name: str) -> Iterator[Record]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = _JsonText(file)
            if text.next_character() == "[":
                yield from _json_list(text, name)
                return
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8 text: {error}") from None
    yield from _read_jsonl(path, name)  # many .json files have one object on each line


def _json_list(text: _JsonText, name: str) -> Iterator[Record]:
    text.skip_character()
    number = 0
    while (character := text.next_character()) != "]":
        number += 1
        if number > 1:
            if character != ",":
                raise InputError(
                    f"{name}: malformed JSON: no comma or ] after record {number - 1}, line "
                    f"{text.line}"
                )
            text.skip_character()
            text.next_character()
        yield text.take_object(f"{name}: record {number}")
    text.skip_character()
    if text.next_character():
        raise InputError(f"{name}: malformed JSON: text after the list of records")


class _JsonText:
    """The text of a JSON file, read as far as it is needed."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._text = ""
        self._position = 0
        # Of what was read and dropped: its characters, its lines, and where the next line begins.
        self._dropped = self._lines = self._line_begin = 0

    @property
    def line(self) -> int:
        """Number of the present line, from 1."""
        return self._lines + self._text.count("\n", 0, self._position) + 1

    def next_character(self) -> str:
        """Move to the next character that is not blank and return it; "" at the end."""
        while True:
            self._position = _after(self._text, self._position)
            if self._position < len(self._text):
                return self._text[self._position]
            if not self._read_more():
                return ""

    def skip_character(self) -> None:
        """Move on by one character."""
        self._position += 1

    def take_object(self, place: str) -> Record:
        """Parse the object that begins here, and move behind it."""
        while True:
            try:
                value, end = _json_value(self._text, self._position, place)
            except json.JSONDecodeError as error:  # the object may end in what is not read yet
                if not self._read_more():
                    raise InputError(f"{place}: malformed JSON: {self._described(error)}") from None
                continue
            if end < len(self._text) or not self._read_more():
                self._position = end
                return _checked_object(value, place)

    def _read_more(self) -> bool:
        """Drop what is done and read as much again as is left, so that each byte is read once."""
        begin = self._position
        more = self._file.read(max(_BYTES_AT_A_TIME, len(self._text) - begin))
        if not more:
            return False
        self._line_begin = self._begin_of_line(begin)
        self._lines += self._text.count("\n", 0, begin)
        self._dropped += begin
        self._text, self._position = self._text[begin:] + more, 0
        return True

    def _begin_of_line(self, position: int) -> int:
        """Where the line of a position begins, counted from the beginning of the file."""
        before = self._text.rfind("\n", 0, position)
        return self._line_begin if before < 0 else self._dropped + before + 1

    def _described(self, error: json.JSONDecodeError) -> str:
        line = self._lines + self._text.count("\n", 0, error.pos) + 1
        character = self._dropped + error.pos
        column = character - self._begin_of_line(error.pos) + 1
        return f"{error.msg}: line {line} column {column} (char {character})"


def _json_object(text: str, start: int, place: str) -> tuple[Record, int]:
    """Parse the object that starts at `start`; return it and the position after it."""
    try:
        value, end = _json_value(text, start, place)
    except json.JSONDecodeError as error:
        raise InputError(f"{place}: malformed JSON: {error}") from None
    return _checked_object(value, place), end


def _json_value(text: str, start: int, place: str) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text, start)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise InputError(f"{place}: malformed JSON: nested too deeply") from None
    except ValueError as error:  # a key that stands twice, or a number with too many digits
        raise InputError(f"{place}: malformed JSON: {error}") from None


def _checked_object(value: Any, place: str) -> Record:
    if not isinstance(value, dict):
        shown = printable(reprlib.repr(value), 40)
        raise InputError(f"{place}: {shown}: each record must be a JSON object")
    return value


def _after(text: str, position: int) -> int:
    """The position of the next character that is not blank."""
    return _BLANKS.match(text, position).end()  # type: ignore[union-attr]


def _without_repetition(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"the key {_first_repeated([key for key, _ in pairs])} stands twice")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_without_repetition)


def _read_csv(path: Path, name: str) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            _check_columns(reader.fieldnames or (), name)
            for record in reader:
                if None in record or None in record.values():
                    columns = len(reader.fieldnames or ())
                    raise InputError(f"{name}: line {reader.line_num}: must have {columns} fields")
                yield record
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(f"{name}: line {reader.line_num + 1}: {error}") from None


# Names of all columns, and the records with the columns that were asked for.
Table = tuple[Sequence[str], Iterator[Record]]


def _read_parquet(
    path: Path, name: str, columns: Collection[str] | None, limit: int | None
) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def records() -> Iterator[Record]:
        try:
            with pq.ParquetFile(path, buffer_size=_BYTES_AT_A_TIME) as file:
                batches = file.iter_batches(_RECORDS_AT_A_TIME, columns=wanted)
                yield from _from_batches(batches, wanted, limit, name)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{name}: not a readable parquet file: {error}") from None

    try:
        known = pq.read_schema(path).names
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{name}: not a readable parquet file: {error}") from None
    wanted = _wanted(known, columns, name)
    return known, records()


def _read_arrow(path: Path, name: str, columns: Collection[str] | None, limit: int | None) -> Table:
    import pyarrow as pa

    def batches(open_arrow: Callable[[Any], Any]) -> Iterator[Any]:
        with pa.memory_map(str(path)) as source, open_arrow(source) as file:
            if open_arrow is pa.ipc.open_stream:
                yield from file
            else:
                yield from map(file.get_batch, range(file.num_record_batches))

    def records(open_arrow: Callable[[Any], Any]) -> Iterator[Record]:
        try:
            yield from _from_batches(batches(open_arrow), wanted, limit, name)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{name}: not a readable arrow file: {error}") from None

    problem: Exception | None = None
    for open_arrow in (pa.ipc.open_stream, pa.ipc.open_file):  # datasets writes the stream format
        try:
            with pa.memory_map(str(path)) as source, open_arrow(source) as file:
                known = file.schema.names
        except (pa.ArrowException, OSError) as error:
            problem = error
        else:
            wanted = _wanted(known, columns, name)
            return known, records(open_arrow)
    raise InputError(f"{name}: not a readable arrow file: {problem}")


def _wanted(known: Sequence[str], columns: Collection[str] | None, name: str) -> list[str]:
    _check_columns(known, name)
    return [column for column in known if columns is None or column in columns]


def _from_batches(
    batches: Iterable[Any], wanted: Sequence[str], limit: int | None, name: str
) -> Iterator[Record]:
    """Records of the wanted columns of pyarrow's record batches, at most `limit` of them."""
    start = 0
    for batch in batches:
        for begin in range(0, len(batch), _RECORDS_AT_A_TIME):
            size = _RECORDS_AT_A_TIME if limit is None else min(_RECORDS_AT_A_TIME, limit - start)
            part = batch.slice(begin, size)
            values = {c: _python_values(part.column(c), c, start, name) for c in wanted}
            yield from ({c: values[c][i] for c in wanted} for i in range(len(part)))
            start += len(part)
            if start == limit:
                return


def _python_values(array: Any, column: str, start: int, name: str) -> list[Any]:
    """The values of a column; `start` is the number of the first record."""
    try:
        return list(array.to_pylist())
    except Exception:  # pyarrow raises many types; the same value raises again below
        for number, value in enumerate(array, start=start + 1):
            try:
                value.as_py()
            except Exception as error:
                place = f"{name}: record {number}: column {column}"
                text = f"{type(error).__name__}: {error}"
                raise InputError(f"{place}: the value cannot be read: {text}") from None
        raise


def _check_columns(columns: Sequence[str], name: str) -> None:
    if len(set(columns)) < len(columns):
        raise InputError(f"{name}: the column {_first_repeated(columns)} stands twice; rename one")


def _first_repeated(names: Sequence[str]) -> str:
    repeated = next(name for i, name in enumerate(names) if name in names[:i])
    return printable(repr(repeated), 60)


def _dataset(path: str, config: DataConfig, key: str, columns: Collection[str] | None) -> Table:
    """Records of a saved dataset, or of a dataset repository, on the Hub or in a folder."""
    import datasets

    name = f"{key}.path: {config.path}"
    is_folder = os.path.isdir(path)
    try:
        if any(os.path.isfile(os.path.join(path, file)) for file in _SAVED):
            loaded = datasets.load_from_disk(path)
        else:
            loaded = datasets.load_dataset(
                path,
                name=config.name,
                split=config.split,
                revision=None if is_folder else config.revision,
            )
    except Exception as error:  # datasets and the Hub's client raise many types
        if isinstance(error, ValueError):
            _check_configuration(path, config, key)
        problem = f"{type(error).__name__}: {first_line(error)}"
        if is_folder:
            raise InputError(
                f"{name}: the folder is not a dataset ({problem}); give a folder that save_to_disk "
                "wrote, or a copy of a Hub dataset"
            ) from None
        raise InputError(
            f"{name}: neither a local file or folder nor a dataset that the Hub provides "
            f"({problem}); check the path, the Hub id and your access rights"
        ) from None
    if isinstance(loaded, datasets.DatasetDict):
        if config.split not in loaded:
            raise InputError(f"{name}: has no split {config.split!r}; available: {_listed(loaded)}")
        loaded = loaded[config.split]
    known = list(loaded.column_names)
    wanted = [column for column in known if columns is None or column in columns]
    rows = min(len(loaded), config.limit or len(loaded))
    if not wanted:
        return known, ({} for _ in range(rows))
    return known, _from_dataset(loaded.select_columns(wanted).select(range(rows)), name)


def _from_dataset(loaded: Any, name: str) -> Iterator[Record]:
    try:
        for batch in loaded.iter(_RECORDS_AT_A_TIME):
            yield from (
                dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)
            )
    except Exception as error:  # a value that Python cannot hold, or a library that is missing
        problem = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"{name}: a record cannot be read ({problem})") from None


def _check_configuration(path: str, config: DataConfig, key: str) -> None:
    """Refuse a dataset with several configurations unless `name` is one of them."""
    import datasets

    try:
        names = datasets.get_dataset_config_names(path, revision=config.revision)
    except Exception:  # whoever calls reports the first error
        return
    if config.name is None and len(names) > 1:
        raise InputError(
            f"{key}.name: missing; {config.path} has the configurations {_listed(names)}; set "
            f"{key}.name to one of them"
        )
    if config.name is not None and config.name not in names:
        raise InputError(
            f"{key}.name: {config.name!r}: {config.path} has no such configuration"
            f"{nearest(config.name, sorted(names))}"
        )


def _listed(names: Any) -> str:
    return ", ".join(sorted(map(str, names)))


# What `save_to_disk` of the library datasets writes, for a Dataset and for a DatasetDict.
_SAVED = ("state.json", "dataset_dict.json")

_TEXT_READERS: Mapping[str, Callable[[Path, str], Iterator[Record]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".csv": _read_csv,
}
_TABLE_READERS: Mapping[str, Callable[[Path, str, Collection[str] | None, int | None], Table]] = {
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
