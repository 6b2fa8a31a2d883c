"""A validation problem becomes one line: the key, the value, and what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from tpaw.errors import InputError

Kind = TypeVar("Kind", bound=BaseModel)


def validate_as(kind: type[Kind], tree: Mapping[str, Any], prefix: str = "") -> Kind:
    """Validate a nested mapping as a configuration of another kind.

    Raises:
        InputError: a line a problem, with its key path, after `prefix`.
    """
    try:
        return kind.model_validate(dict(tree))
    except ValidationError as error:
        lines = _explain_all(error.errors(), kind)
        raise InputError("\n".join(prefix + line for line in lines)) from None


def explain_unknown(key: str, names: Iterable[str], known: Sequence[str]) -> None:
    """Refuse a name that is not among the known ones.

    Raises:
        InputError: naming the key and the nearest known name.
    """
    for name in names:
        if name not in known:
            raise InputError(f"{key}: {name!r} is not known{nearest(name, known)}")


def _explain_all(problems: Sequence[Any], kind: type[BaseModel]) -> Iterator[str]:
    by_key: dict[str, list[Any]] = {}
    for problem in problems:
        key = _explain(problem, kind).partition(":")[0].partition("[")[0]
        by_key.setdefault(key, []).append(problem)
    for alternatives in by_key.values():
        # A setting that takes one value or a list fails twice; the failed shape is only noise.
        telling = [p for p in alternatives if not p["type"].endswith("_type")]
        yield from dict.fromkeys(_explain(p, kind) for p in telling or alternatives[:1])


def _explain(problem: Any, kind: type[BaseModel]) -> str:
    model: type[BaseModel] = kind
    keys: list[str] = []
    # pydantic's location also names branches of a union; only real keys and positions are shown.
    for part in problem["loc"]:
        field = _field_by_key(model, part) if model is not None else None
        if field is not None:
            keys.append(str(part))
            model = section_of(field)
        elif isinstance(part, int):
            keys[-1] += f"[{part}]"
        elif problem["type"] == "extra_forbidden":
            keys.append(str(part))
    path = ".".join(keys)
    if problem["type"] == "extra_forbidden":
        prefix = path.rpartition(".")[0]
        known = list(_keys_of(model))
        hint = nearest(keys[-1], known, prefix=f"{prefix}." if prefix else "")
        return f"{path}: unknown key{hint}"
    if problem["type"] == "missing":
        return f"{path}: missing; it must be set"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if problem["type"] == "value_error":
        return f"{path}: {message}" if path else message
    value = list(problem["input"]) if isinstance(problem["input"], tuple) else problem["input"]
    return f"{path}: {value!r} is not allowed: {message.replace('a valid tuple', 'a list')}"


def nearest(name: str, known: Sequence[str], prefix: str = "") -> str:
    """The end of an error about an unknown name: the nearest known one, or all of them."""
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


def section_of(field: FieldInfo) -> Any:
    """The model that a field holds; None for a plain setting."""
    candidates = (field.annotation, *getattr(field.annotation, "__args__", ()))
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
