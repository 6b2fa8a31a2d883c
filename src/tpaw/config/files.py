"""YAML in, YAML out: recipes that extend one another, `--set`, errors with a key path, comments."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from textwrap import wrap
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from tpaw.config.schema import RunConfig, at_iteration
from tpaw.errors import InputError

PACKAGE_SCHEME = "tpaw://"

Kind = TypeVar("Kind", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """YAML 1.2 numbers: 1e-6 is a float. PyYAML's YAML 1.1 would read it as text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key!r} stands twice", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return dict(super().construct_mapping(node, deep=deep))


class _Dumper(yaml.SafeDumper):
    """Quotes whatever `_Loader` would not read as text."""


_FLOAT = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")
for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def recipe_names() -> list[str]:
    """Names of the recipes and variants that come with the package."""
    folder = files("tpaw") / "config" / "recipes"
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name[-5:] == ".yaml")


def resolve_package_path(path: str) -> str:
    """Turn tpaw://starter/model into the file that comes with the package, ~ into the home."""
    if not path.startswith(PACKAGE_SCHEME):
        return str(Path(path).expanduser()) if path.startswith("~") else path
    return str(files("tpaw").joinpath(path.removeprefix(PACKAGE_SCHEME)))


def load_config(
    sources: Sequence[str | Mapping[str, Any]], overrides: Sequence[str] = ()
) -> RunConfig:
    """Read and validate a configuration; see `RunConfig.load`. A mapping stands for a file."""
    tree: dict[str, Any] = {}
    for source in sources:
        tree = _merge(tree, _read_source(source, ()) if isinstance(source, str) else source)
    for override in overrides:
        tree = _merge(tree, _parse_override(override))
    return validate(tree)


def validate(tree: Mapping[str, Any]) -> RunConfig:
    """Validate a nested mapping; every problem is listed with its key path."""
    return validate_as(RunConfig, tree)


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


def read_mapping(path: Path, source: str) -> dict[str, Any]:
    """Read a YAML file that is a mapping of keys; `source` is its name in errors.

    Raises:
        InputError: it is not.
    """
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{source}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{source}: a configuration is a mapping of keys, not {tree!r:.60}")
    return tree


def to_yaml(config: RunConfig, *, comments: bool) -> str:
    """The complete configuration as YAML, with each field's text as a comment where asked."""
    return "\n".join(_yaml_lines(config, comments, indent=0)) + "\n"


def differences(old: RunConfig, new: RunConfig, begun: int = 0) -> list[str]:
    """Lines `key: old → new` of every setting that a run under way may not change.

    Args:
        begun: iterations that have begun to train. A setting that has a value for each iteration
            may change for those to come.
    """
    old_values, new_values = (
        dict(_leaves(config.model_dump(by_alias=True)))
        | {key: [at_iteration(value, t) for t in range(begun)] for key, value in per.items()}
        for config in (old, new)
        for per in [config.per_iteration()]
    )
    changeable = set(_changeable_keys(RunConfig))
    return [
        f"{key}: {old_values.get(key)!r} → {new_values.get(key)!r}"
        for key in sorted(old_values.keys() | new_values.keys())
        if key not in changeable and old_values.get(key) != new_values.get(key)
    ]


def nested(key: str, value: Any) -> dict[str, Any]:
    """The mapping in which `section.key` has the value."""
    first, *rest = key.split(".")
    for part in reversed(rest):
        value = {part: value}
    return {first: value}


def explain_unknown(key: str, names: Iterable[str], known: Sequence[str]) -> None:
    """Refuse a name that is not among the known ones.

    Raises:
        InputError: naming the key and the nearest known name.
    """
    for name in names:
        if name not in known:
            raise InputError(f"{key}: {name!r} is not known{_nearest(name, known)}")


def _read_source(source: str, ancestors: tuple[str, ...]) -> dict[str, Any]:
    path = Path(source)
    if not path.is_file():
        path = Path(str(files("tpaw") / "config" / "recipes" / f"{source}.yaml"))
    if not path.is_file():
        raise InputError(f"{source}: no such file or recipe{_nearest(source, recipe_names())}")
    if source in ancestors:
        raise InputError(f"{source}: extends itself by way of {' → '.join(ancestors)}")
    tree = read_mapping(path, source)
    parents = tree.pop("extends", [])
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(name, str) for name in parents):
        raise InputError(f"{source}: extends: {parents!r}; it must be a name or a list of names")
    merged: dict[str, Any] = {}
    for parent in parents:
        beside = path.parent / parent
        name = str(beside) if beside.is_file() else parent
        merged = _merge(merged, _read_source(name, (*ancestors, source)))
    return _merge(merged, tree)


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _parse_override(override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise InputError(f"--set {override}: write it as section.key=value")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise InputError(f"--set {override}: {text!r} is not a YAML value") from None
    return nested(key, value)


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
            model = _section_of(field)
        elif isinstance(part, int):
            keys[-1] += f"[{part}]"
        elif problem["type"] == "extra_forbidden":
            keys.append(str(part))
    path = ".".join(keys)
    if problem["type"] == "extra_forbidden":
        prefix = path.rpartition(".")[0]
        known = list(_keys_of(model))
        nearest = _nearest(keys[-1], known, prefix=f"{prefix}." if prefix else "")
        return f"{path}: unknown key{nearest}"
    if problem["type"] == "missing":
        return f"{path}: missing; it must be set"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if problem["type"] == "value_error":
        return f"{path}: {message}" if path else message
    value = list(problem["input"]) if isinstance(problem["input"], tuple) else problem["input"]
    return f"{path}: {value!r} is not allowed: {message.replace('a valid tuple', 'a list')}"


def _nearest(name: str, known: Sequence[str], prefix: str = "") -> str:
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


def _section_of(field: FieldInfo) -> Any:
    candidates = (field.annotation, *getattr(field.annotation, "__args__", ()))
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def _changeable_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        key = prefix + (field.alias or name)
        section = _section_of(field)
        if section is not None:
            yield from _changeable_keys(section, f"{key}.")
        elif isinstance(field.json_schema_extra, dict) and field.json_schema_extra["changeable"]:
            yield key


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _yaml_lines(section: BaseModel, comments: bool, indent: int) -> Iterator[str]:
    pad = "  " * indent
    for name, field in type(section).model_fields.items():
        key, value = field.alias or name, getattr(section, name)
        if comments and field.description:
            yield from (f"{pad}# {line}" for line in wrap(field.description, 96 - len(pad)))
        if isinstance(value, BaseModel):
            yield f"{pad}{key}:"
            yield from _yaml_lines(value, comments, indent + 1)
        else:
            plain = list(value) if isinstance(value, tuple) else value
            plain = dict(plain) if isinstance(plain, Mapping) else plain
            text = yaml.dump(plain, Dumper=_Dumper, default_flow_style=True, width=10**6)
            yield f"{pad}{key}: {text.removesuffix('...' + chr(10)).strip()}"
