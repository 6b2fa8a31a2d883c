"""Rows of any supported shape, from any supported source, as a prompt and a target.

Nothing is tokenised here. A file that cannot be read and a line that is malformed are errors with
their place; a row that cannot be used is `Unusable` with a reason, for `data` to count.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tpaw.config import DataConfig
from tpaw.config_file import resolve_package_path
from tpaw.errors import InputError

Row = Mapping[str, Any]
Message = dict[str, str]

_SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet", ".csv", ".arrow")
_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_SHAREGPT_ROLES |= {"system": "system"}


class Dialogue(NamedTuple):
    """A prompt and its target.

    `prompt` is text, or messages that end with a user turn. `is_chat` says that the chat template
    must be used, because the row is a conversation.
    """

    prompt: str | list[Message]
    target: str
    is_chat: bool


class Unusable(NamedTuple):
    """Why a row cannot be used."""

    reason: str


def read_rows(config: DataConfig, key: str) -> list[Row]:
    """Read the rows of a local file, a saved dataset or a hub id; `key` names it in errors.

    Raises:
        InputError: nothing there, not readable, a malformed line, or no rows.
    """
    path = Path(resolve_package_path(config.path))
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


def shape_of(rows: Sequence[Row], config: DataConfig, key: str) -> Callable[[Row], Any]:
    """How to turn a row into a `Dialogue` (or `Unusable`), from the columns that are there.

    Raises:
        InputError: a named column is missing, or no supported shape fits.
    """
    present = set(rows[0])
    filled = {name for row in rows[:100] for name in row if row[name] is not None}
    name = f"{key}.path: {config.path}"
    if (columns := config.columns) is not None:
        wanted = (columns.messages,) if columns.messages else (columns.prompt, columns.target)
        for column in wanted:
            if column not in present:
                raise InputError(f"{name}: no column {column!r}; there are {_listed(present)}")
        if columns.messages:
            return lambda row: _conversation(row.get(columns.messages or ""), config.turn)
        return lambda row: _pair(row, columns.prompt or "", columns.target or "", _asked)
    shapes: list[tuple[set[str], Callable[[Row], Any]]] = [
        ({"prompt", "completion"}, lambda row: _pair(row, "prompt", "completion", _checked)),
        ({"messages"}, lambda row: _conversation(row.get("messages"), config.turn)),
        ({"conversations"}, lambda row: _sharegpt(row, config.turn)),
        ({"instruction", "output"}, _alpaca),
        ({"question", "answer"}, lambda row: _asked(row.get("question"), row.get("answer"))),
    ]
    for columns_there in (filled, present):  # files of several shapes leave some columns null
        for required, convert in shapes:
            if required <= columns_there:
                return convert
    raise InputError(
        f"{name}: columns {_listed(present)} are none of prompt/completion, messages, "
        f"conversations, instruction/output, question/answer; name yours in {key}.columns"
    )


def _pair(
    row: Row, prompt_column: str, target_column: str, of_texts: Callable[..., Dialogue | Unusable]
) -> Dialogue | Unusable:
    prompt, target = row.get(prompt_column), row.get(target_column)
    if isinstance(prompt, list) or isinstance(target, list):
        prompt = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        target = target if isinstance(target, list) else [{"role": "assistant", "content": target}]
        return _conversation(prompt + target, "last")
    return of_texts(prompt, target)


def _asked(prompt: Any, target: Any, system: Any = None) -> Dialogue | Unusable:
    dialogue = _checked(prompt, target)
    if isinstance(dialogue, Unusable) or not isinstance(prompt, str):
        return dialogue
    messages = [{"role": "user", "content": prompt}]
    if isinstance(system, str) and system.strip():
        messages.insert(0, {"role": "system", "content": system})
    return dialogue._replace(prompt=messages)


def _alpaca(row: Row) -> Dialogue | Unusable:
    instruction, extra = row.get("instruction"), row.get("input")
    if isinstance(instruction, str) and isinstance(extra, str) and extra.strip():
        instruction = f"{instruction}\n{extra}"
    return _asked(instruction, row.get("output"), row.get("system"))


def _sharegpt(row: Row, turn: str) -> Dialogue | Unusable:
    turns = row.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(t, Mapping) for t in turns):
        return Unusable("the conversation is not a list of turns")
    if isinstance(row.get("system"), str) and row["system"].strip():
        turns = [{"from": "system", "value": row["system"]}, *turns]
    messages = []
    for t in turns:  # some files say role and content in a column of this name
        role = str(t.get("from", t.get("role")))
        content = t.get("value", t.get("content"))
        messages.append({"role": _SHAREGPT_ROLES.get(role, role), "content": content})
    return _conversation(messages, turn)


def _conversation(messages: Any, turn: str) -> Dialogue | Unusable:
    if not isinstance(messages, list) or not all(isinstance(m, Mapping) for m in messages):
        return Unusable("the conversation is not a list of messages")
    answers = [i for i, m in enumerate(messages) if m.get("role") == "assistant"]
    if not answers:
        return Unusable("no assistant turn")
    end = answers[0] if turn == "first" else answers[-1]
    prompt, target = messages[:end], messages[end].get("content")
    if not prompt or prompt[-1].get("role") != "user":
        return Unusable("the assistant turn does not follow a user turn")
    for message in prompt:
        if message.get("role") not in ("system", "user", "assistant"):
            return Unusable(f"a turn of role {str(message.get('role'))[:30]!r}")
        if not isinstance(message.get("content"), str):
            return Unusable("a message whose content is not text")
    plain = [{"role": m["role"], "content": m["content"]} for m in prompt]
    checked = _checked(plain[-1]["content"], target, is_chat=True)
    return checked if isinstance(checked, Unusable) else checked._replace(prompt=plain)


def _checked(prompt: Any, target: Any, *, is_chat: bool = False) -> Dialogue | Unusable:
    for name, text in (("prompt", prompt), ("target", target)):
        if not isinstance(text, str):
            return Unusable(f"the {name} is not text")
        if not text.strip():
            return Unusable(f"the {name} is empty")
        if any("\ud800" <= character <= "\udfff" for character in text):
            return Unusable(f"the {name} holds half a surrogate pair")
    return Dialogue(prompt, target, is_chat)


def _read_jsonl(path: Path, name: str) -> list[Row]:
    rows = []
    with path.open(encoding="utf-8-sig") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    rows.append(_json_object(line, f"{name}: line {number}"))
        except UnicodeDecodeError as error:
            raise InputError(f"{name}: not UTF-8 text: {error}") from None
    return rows


def _json_object(text: str, place: str) -> Row:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InputError(f"{place}: malformed JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{place}: a row is a JSON object, not {text.strip():.40}")
    return value


def _read_json(path: Path, name: str) -> list[Row]:
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


def _read_csv(path: Path, name: str) -> list[Row]:
    rows: list[Row] = []
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


def _read_parquet(path: Path, name: str) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return list(pq.read_table(path).to_pylist())
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{name}: not a readable parquet file: {error}") from None


def _read_arrow(path: Path, name: str) -> list[Row]:
    import pyarrow as pa

    problem: Exception | None = None
    for open_arrow in (pa.ipc.open_stream, pa.ipc.open_file):  # datasets writes the stream format
        try:
            with pa.memory_map(str(path)) as source:
                return list(open_arrow(source).read_all().to_pylist())
        except (pa.ArrowException, OSError) as error:
            problem = error
    raise InputError(f"{name}: not a readable arrow file: {problem}")


def _saved_dataset(path: Path, config: DataConfig, name: str) -> list[Row]:
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


def _hub(config: DataConfig, name: str) -> list[Row]:
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


_READERS: Mapping[str, Callable[[Path, str], list[Row]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
