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
from typing import Any

from tpaw.config.messages import nearest
from tpaw.config.schema import DataConfig
from tpaw.errors import InputError, first_line, printable
from tpaw.storage.resources import resolve_path

Record = Mapping[str, Any]

_SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet", ".csv", ".arrow")
_BLANKS = re.compile(r"[ \t\n\r]*")


class Records(list[Record]):
    """Records, as mappings of column name to value.

    Attributes:
        columns: names of all columns of the source, also of those that were not read.
    """

    def __init__(self, records: Iterable[Record], columns: Iterable[str]) -> None:
        super().__init__(records)
        self.columns = tuple(columns)


def read_records(config: DataConfig, key: str, columns: Collection[str] | None = None) -> Records:
    """Read the records of a local file or folder, or of a Hub dataset.

    Args:
        config: where the records are.
        key: key path of `config` for error messages, for example `data`.
        columns: the columns to read from a file or dataset that stores columns separately. A
            value that Python cannot hold does no harm in any other column. Default: all.

    Returns:
        The records; at most `config.limit` of them. The rest of a file is not read.

    Raises:
        InputError: the source does not exist, cannot be read, is malformed, or has no records.
    """
    path = resolve_path(config.path)
    name = f"{key}.path: {config.path}"
    suffix = Path(path).suffix.lower()
    if os.path.isfile(path):
        if suffix in _TEXT_READERS:
            rows = list(islice(_TEXT_READERS[suffix](Path(path), name), config.limit))
            records = Records(rows, rows[0] if rows else ())
        elif suffix in _TABLE_READERS:
            records = _TABLE_READERS[suffix](Path(path), name, columns, config.limit)
        else:
            raise InputError(f"{name}: unknown file type; must be one of {', '.join(_SUFFIXES)}")
    elif os.path.isdir(path) or not (
        suffix in _SUFFIXES or config.path.startswith((".", "/", "~"))
    ):
        records = _dataset(path, config, key, columns)
    else:
        raise InputError(f"{name}: no such file or folder; check the path")
    if not records:
        raise InputError(f"{name}: has no records; give a file with at least one")
    return records


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
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8 text: {error}") from None
    if not text.lstrip().startswith("["):  # many .json files have one object on each line
        yield from _read_jsonl(path, name)
        return
    position, number = _after(text, text.index("[") + 1), 0
    while not text.startswith("]", position):
        number += 1
        if number > 1:
            if not text.startswith(",", position):
                line = text.count("\n", 0, position) + 1
                raise InputError(
                    f"{name}: malformed JSON: no comma or ] after record {number - 1}, line {line}"
                )
            position = _after(text, position + 1)
        record, position = _json_object(text, position, f"{name}: record {number}")
        position = _after(text, position)
        yield record
    if text[position + 1 :].strip():
        raise InputError(f"{name}: malformed JSON: text after the list of records")


def _json_object(text: str, start: int, place: str) -> tuple[Record, int]:
    """Parse the object that starts at `start`; return it and the position after it."""
    try:
        value, end = _DECODER.raw_decode(text, start)
    except RecursionError:
        raise InputError(f"{place}: malformed JSON: nested too deeply") from None
    except ValueError as error:
        raise InputError(f"{place}: malformed JSON: {error}") from None
    if not isinstance(value, dict):
        shown = printable(reprlib.repr(value), 40)
        raise InputError(f"{place}: {shown}: each record must be a JSON object")
    return value, end


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


def _read_parquet(
    path: Path, name: str, columns: Collection[str] | None, limit: int | None
) -> Records:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            known = file.schema_arrow.names
            wanted = [column for column in known if columns is None or column in columns]
            return _from_batches(file.iter_batches(columns=wanted), known, wanted, limit, name)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{name}: not a readable parquet file: {error}") from None


def _read_arrow(
    path: Path, name: str, columns: Collection[str] | None, limit: int | None
) -> Records:
    import pyarrow as pa

    problem: Exception | None = None
    for open_arrow in (pa.ipc.open_stream, pa.ipc.open_file):  # datasets writes the stream format
        try:
            with pa.memory_map(str(path)) as source, open_arrow(source) as file:
                known = file.schema.names
                wanted = [column for column in known if columns is None or column in columns]
                batches = (
                    file
                    if open_arrow is pa.ipc.open_stream
                    else map(file.get_batch, range(file.num_record_batches))
                )
                return _from_batches(batches, known, wanted, limit, name)
        except (pa.ArrowException, OSError) as error:
            problem = error
    raise InputError(f"{name}: not a readable arrow file: {problem}")


def _from_batches(
    batches: Iterable[Any],
    known: Sequence[str],
    wanted: Sequence[str],
    limit: int | None,
    name: str,
) -> Records:
    """Records of the wanted columns of pyarrow's record batches."""
    _check_columns(known, name)
    records = Records([], known)
    for batch in batches:
        if limit is not None:
            batch = batch.slice(0, limit - len(records))
        values = {
            column: _python_values(batch.column(column), column, len(records), name)
            for column in wanted
        }
        records += [{column: values[column][i] for column in wanted} for i in range(len(batch))]
        if len(records) == limit:
            break
    return records


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


def _dataset(path: str, config: DataConfig, key: str, columns: Collection[str] | None) -> Records:
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
    try:
        return Records(loaded.select_columns(wanted).select(range(rows)), known)
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
_TABLE_READERS: Mapping[str, Callable[[Path, str, Collection[str] | None, int | None], Records]] = {
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
