"""Read records from files, saved datasets and the Hugging Face Hub.

A malformed line or file raises an error that names the file and the line.
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
    """Read the records of a local file, a saved dataset or a Hub dataset.

    Args:
        config: where the records are.
        key: key path of `config` for error messages, for example `data`.

    Returns:
        The records, as mappings of column name to value; at most `config.limit` of them.

    Raises:
        InputError: the source does not exist, cannot be read, is malformed, or has no records.
    """
    path = Path(resolve_path(config.path))
    name = f"{key}.path: {config.path}"
    if path.is_file():
        reader = _READERS.get(path.suffix.lower())
        if reader is None:
            raise InputError(f"{name}: unknown file type; must be one of {', '.join(_SUFFIXES)}")
        records = reader(path, name)
    elif path.is_dir():
        records = _saved_dataset(path, config, name)
    elif path.suffix in _SUFFIXES or config.path.startswith((".", "/", "~")):
        raise InputError(f"{name}: no such file or folder; check the path")
    else:
        records = _hub(config, name)
    if not records:
        raise InputError(f"{name}: has no records; give a file with at least one")
    return records[: config.limit]


def _read_jsonl(path: Path, name: str) -> list[Record]:
    records = []
    with path.open(encoding="utf-8-sig") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    records.append(_json_object(line, f"{name}: line {number}"))
        except UnicodeDecodeError as error:
            raise InputError(f"{name}: not UTF-8 text: {error}") from None
    return records


def _json_object(text: str, place: str) -> Record:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InputError(f"{place}: malformed JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{place}: {text.strip():.40}: each record must be a JSON object")
    return value


def _read_json(path: Path, name: str) -> list[Record]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8 text: {error}") from None
    if not text.lstrip().startswith("["):  # many .json files have one object on each line
        return _read_jsonl(path, name)
    try:
        records = json.loads(text)
    except ValueError as error:
        raise InputError(f"{name}: malformed JSON: {error}") from None
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise InputError(
                f"{name}: record {number}: {record!r:.40}: each record must be a JSON object"
            )
    return list(records)


def _read_csv(path: Path, name: str) -> list[Record]:
    records: list[Record] = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for record in reader:
                if None in record or None in record.values():
                    columns = len(reader.fieldnames or ())
                    raise InputError(f"{name}: line {reader.line_num}: must have {columns} fields")
                records.append(record)
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(f"{name}: line {reader.line_num + 1}: {error}") from None
    return records


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
        raise InputError(f"{name}: the folder is not a saved dataset: {error}") from None
    if isinstance(loaded, datasets.DatasetDict):
        if config.split not in loaded:
            raise InputError(f"{name}: has no split {config.split!r}; available: {_listed(loaded)}")
        loaded = loaded[config.split]
    return list(loaded)


def _hub(config: DataConfig, name: str) -> list[Record]:
    import datasets

    try:
        return list(
            datasets.load_dataset(config.path, split=config.split, revision=config.revision)
        )
    except Exception as error:  # the Hub's client raises many types
        first_line = str(error).partition("\n")[0]
        raise InputError(
            f"{name}: neither a local file or folder nor a dataset that the Hub provides "
            f"({type(error).__name__}: {first_line}); check the path, the Hub id and your access "
            "rights"
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
