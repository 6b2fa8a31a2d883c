"""Messages for invalid settings: one line with the key, the value and what is allowed.

Example: `train.lerning_rate: unknown key; did you mean train.learning_rate?`
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from tpaw.config.chosen import Chosen
from tpaw.errors import InputError, brief, printable

# A file with more problems is no attempt at a configuration.
MAX_PROBLEMS = 20

Kind = TypeVar("Kind", bound=BaseModel)


def validate_as(kind: type[Kind], tree: Mapping[str, Any], prefix: str = "") -> Kind:
    """Validate a nested mapping as a pydantic model.

    Args:
        kind: the model's class, for example `RunConfig`.
        tree: the nested mapping, as a YAML file gives it.
        prefix: text to put before each line of the error, for example a file name.

    Returns:
        The validated model.

    Raises:
        InputError: with one line for each problem.
    """
    try:
        return kind.model_validate(dict(tree))
    except ValidationError as error:
        problems = error.errors()
        lines = list(_explain_all(problems[:MAX_PROBLEMS], kind, tree))
        if len(problems) > MAX_PROBLEMS:
            lines.append(f"and {len(problems) - MAX_PROBLEMS} more problems")
        raise InputError("\n".join(prefix + line for line in lines)) from None


def explain_unknown(key: str, names: Iterable[str], known: Sequence[str]) -> None:
    """Refuse a name that is not known.

    Args:
        key: the setting that holds the names.
        names: the names to check.
        known: all allowed names.

    Raises:
        InputError: with the key, the unknown name and the nearest known name.
    """
    for name in names:
        if name not in known:
            raise InputError(f"{key}: {brief(name)}: unknown name{nearest(name, known)}")


def _explain_all(
    problems: Sequence[Any], kind: type[BaseModel], tree: Mapping[str, Any]
) -> Iterator[str]:
    by_key: dict[str, list[Any]] = {}
    for problem in problems:
        key = _explain(problem, kind, tree).partition(":")[0].partition("[")[0]
        by_key.setdefault(key, []).append(problem)
    for alternatives in by_key.values():
        # A setting that takes one value or a list fails once for each form. The error about the
        # form that the user did not choose would only confuse.
        telling = [p for p in alternatives if not p["type"].endswith("_type")]
        yield from dict.fromkeys(_explain(p, kind, tree) for p in telling or alternatives[:1])


def _explain(problem: Any, kind: type[BaseModel], tree: Mapping[str, Any]) -> str:
    model: Any = kind
    content: Any = tree
    keys: list[str] = []
    # pydantic's location also names the branches of a union. The user knows only keys and
    # positions in a list.
    for part in problem["loc"]:
        field = _field_by_key(model, part) if model is not None else None
        if field is not None:
            keys.append(str(part))
            content = content.get(part) if isinstance(content, Mapping) else None
            model = section_of(field, content)
        elif isinstance(part, int):
            keys[-1] += f"[{part}]"
        elif problem["type"] == "extra_forbidden":
            keys.append(printable(str(part)))
    path = ".".join(keys)
    if problem["type"] == "extra_forbidden":
        prefix = path.rpartition(".")[0]
        known = list(_keys_of(model))
        hint = nearest(keys[-1], known, prefix=f"{prefix}." if prefix else "")
        return f"{path}: unknown key{hint}"
    if problem["type"] == "missing":
        return f"{path}: missing; set it"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if problem["type"] == "value_error":
        return f"{path}: {message}" if path else message
    value = list(problem["input"]) if isinstance(problem["input"], tuple) else problem["input"]
    allowed = message.replace("input should", "must").replace("a valid tuple", "a list")
    allowed = re.sub("a valid dictionary or instance of .*", "a mapping of keys to values", allowed)
    return f"{path}: {brief(value)}: not allowed; {allowed}"


def nearest(name: str, known: Sequence[str], prefix: str = "") -> str:
    """The last part of an error about an unknown name.

    Args:
        name: the unknown name.
        known: all known names.
        prefix: text to put before the suggested name, for example its section.

    Returns:
        `; did you mean …?` with the most similar known name, or `; known: …` with all of them.
    """
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {prefix}{close[0]}?"
    return f"; known: {', '.join(known)}"


def _keys_of(model: type[BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield field.alias or name


def _field_by_key(model: type[BaseModel] | None, key: Any) -> FieldInfo | None:
    fields = model.model_fields.items() if model is not None else ()
    return next((field for name, field in fields if key == (field.alias or name)), None)


def section_of(field: FieldInfo, content: Any = None) -> Any:
    """The pydantic model that a field holds, or None if the field is a plain setting.

    Args:
        field: of a configuration.
        content: what was given for it, which may choose the model.
    """
    for mark in field.metadata:
        if isinstance(mark, Chosen) and (kind := mark.kind_of(content)) is not None:
            return kind
    candidates = (field.annotation, *getattr(field.annotation, "__args__", ()))
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
