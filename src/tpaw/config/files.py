"""YAML files in and out: recipes that extend one another, `--set`, comments.

Nothing here knows the settings themselves; a configuration is a nested mapping or a pydantic model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from textwrap import wrap
from typing import Any

import yaml
from pydantic import BaseModel

from tpaw.config.messages import nearest
from tpaw.errors import InputError


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


def load_tree(
    sources: Sequence[str | Mapping[str, Any]], overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Read YAML files or recipes by name and merge them; later sources override earlier ones.

    Args:
        sources: a mapping stands for the content of a file.
        overrides: texts `section.key=value`; they override every source.

    Raises:
        InputError: a file or recipe that does not exist, is not YAML, or extends itself.
    """
    tree: dict[str, Any] = {}
    for source in sources:
        tree = _merge(tree, _read_source(source, ()) if isinstance(source, str) else source)
    for override in overrides:
        tree = _merge(tree, _parse_override(override))
    return tree


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


def to_yaml(config: BaseModel, *, comments: bool) -> str:
    """The complete configuration as YAML, with each field's text as a comment where asked."""
    return "\n".join(_yaml_lines(config, comments, indent=0)) + "\n"


def nested(key: str, value: Any) -> dict[str, Any]:
    """The mapping in which `section.key` has the value."""
    first, *rest = key.split(".")
    for part in reversed(rest):
        value = {part: value}
    return {first: value}


def _read_source(source: str, ancestors: tuple[str, ...]) -> dict[str, Any]:
    path = Path(source)
    if not path.is_file():
        path = Path(str(files("tpaw") / "config" / "recipes" / f"{source}.yaml"))
    if not path.is_file():
        raise InputError(f"{source}: no such file or recipe{nearest(source, recipe_names())}")
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
