"""Rows from any supported source.

A file that cannot be read and a line that is malformed are errors with their place.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tpaw.config.schema import DataConfig
from tpaw.errors import InputError
from tpaw.storage.resources import resolve_path

Record = Mapping[str, Any]

_SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet", ".csv", ".arrow")


def read_records(config: DataConfig, key: str) -> list[Record]:
    """Read the rows of a local file, a saved dataset or a hub id; `key` names it in errors.

    Raises:
        InputError: nothing there, not readable, a malformed line, or no rows.
    """
    path = Path(resolve_path(config.path))
    name = f"{key}.path: {config.path}"
    if path.is_file():
        reader = _READERS.get(path.suffix.lower())
        if reader is None:
            raise InputError(f"{name}: not one of {', '.join(_SUFFIXES)}")
        rows = reader(path, name)
    elif path.is_dir():
        rows = _saved_dataset(path, config, name)
    elif path.suffix in _SUFFIXES or config.path.startswith((".", "/", "~")):
        raise InputError(f"{name}: no such file")
    else:
        rows = _hub(config, name)
    if not rows:
        raise InputError(f"{name}: holds no rows")
    return rows[: config.limit]


def _read_jsonl(path: Path, name: str) -> list[Record]:
    rows = []
    with path.open(encoding="utf-8-sig") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    rows.append(_json_object(line, f"{name}: line {number}"))
        except UnicodeDecodeError as error:
            raise InputError(f"{name}: not UTF-8 text: {error}") from None
    return rows


def _json_object(text: str, place: str) -> Record:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InputError(f"{place}: malformed JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{place}: a row is a JSON object, not {text.strip():.40}")
    return value


def _read_json(path: Path, name: str) -> list[Record]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8 text: {error}") from None
    if not text.lstrip().startswith("["):  # many files called .json hold an object a line
        return _read_jsonl(path, name)
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise InputError(f"{name}: malformed JSON: {error}") from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise InputError(f"{name}: row {number}: a row is a JSON object, not {row!r:.40}")
    return list(rows)


def _read_csv(path: Path, name: str) -> list[Record]:
    rows: list[Record] = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    columns = len(reader.fieldnames or ())
                    raise InputError(f"{name}: line {reader.line_num}: not {columns} fields")
                rows.append(row)
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(f"{name}: line {reader.line_num + 1}: {error}") from None
    return rows


def _read_parquet(path: Path, name: str) -> list[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return list(pq.read_table(path).to_pylist())
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{name}: not a readable parquet file: {error}") from None


def _read_arrow(path: Path, name: str) -> list[Record]:
    import pyarrow as pa

    problem: Exception | None = None
    for open_arrow in (pa.ipc.open_stream, pa.ipc.open_file):  # datasets writes the stream format
        try:
            with pa.memory_map(str(path)) as source:
                return list(open_arrow(source).read_all().to_pylist())
        except (pa.ArrowException, OSError) as error:
            problem = error
    raise InputError(f"{name}: not a readable arrow file: {problem}")


def _saved_dataset(path: Path, config: DataConfig, name: str) -> list[Record]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except (FileNotFoundError, ValueError) as error:
        raise InputError(f"{name}: a folder, but not a saved dataset: {error}") from None
    if isinstance(loaded, datasets.DatasetDict):
        if config.split not in loaded:
            raise InputError(f"{name}: no split {config.split!r}; there are {_listed(loaded)}")
        loaded = loaded[config.split]
    return list(loaded)


def _hub(config: DataConfig, name: str) -> list[Record]:
    import datasets

    try:
        return list(
            datasets.load_dataset(config.path, split=config.split, revision=config.revision)
        )
    except Exception as error:  # the hub's client raises a dozen kinds, all of them final here
        first_line = str(error).partition("\n")[0]
        raise InputError(
            f"{name}: neither a file or folder here, nor a dataset that the hub gives "
            f"({type(error).__name__}: {first_line})"
        ) from None


def _listed(names: Any) -> str:
    return ", ".join(sorted(map(str, names)))


_READERS: Mapping[str, Callable[[Path, str], list[Record]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
