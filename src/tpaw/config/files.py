"""Read and write configurations as YAML: files, recipes, `extends` and `--set`.

This module does not know the settings. It treats a configuration as a nested mapping or as any
pydantic model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from itertools import takewhile
from pathlib import Path
from textwrap import wrap
from typing import Any

import yaml
from pydantic import BaseModel

from tpaw.config.messages import nearest
from tpaw.errors import InputError


class _Loader(yaml.SafeLoader):
    """Reads numbers as YAML 1.2 does: 1e-6 is a float. PyYAML follows YAML 1.1: 1e-6 is text.

    It also refuses a key that occurs twice in a mapping.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key!r} occurs twice", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return dict(super().construct_mapping(node, deep=deep))


class _Dumper(yaml.SafeDumper):
    """Quotes every text that `_Loader` would read as a number."""


_FLOAT = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")
for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def recipe_names() -> list[str]:
    """Names of all recipes that come with the package, sorted."""
    folder = files("tpaw") / "config" / "recipes"
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name[-5:] == ".yaml")


def recipe_summaries() -> dict[str, str]:
    """What each recipe is for.

    Returns:
        Name of the recipe to the first sentence of the comment at the top of its file.
    """
    summaries = {}
    for name in recipe_names():
        lines = _recipe_path(name).read_text(encoding="utf-8").splitlines()
        comment = (line[1:].strip() for line in takewhile(lambda line: line[:1] == "#", lines))
        summaries[name] = re.split(r"(?<=\.)\s", " ".join(comment), maxsplit=1)[0]
    return summaries


def load_tree(
    sources: Sequence[str | Mapping[str, Any]], overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Read and merge YAML files, recipes and mappings. The result is not validated.

    Args:
        sources: paths of YAML files, names of recipes, or mappings with the same content as a
            file. A later source overrides an earlier one.
        overrides: texts of the form `section.key=value`. They override every source.

    Returns:
        The merged nested mapping.

    Raises:
        InputError: a file or recipe does not exist, is not valid YAML, or extends itself; or an
            override is malformed.
    """
    tree: dict[str, Any] = {}
    for source in sources:
        tree = _merge(tree, _read_source(source, ()) if isinstance(source, str) else source)
    for override in overrides:
        tree = _merge(tree, _parse_override(override))
    return tree


def read_mapping(path: Path, source: str) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Args:
        path: the file.
        source: the name of the file in error messages.

    Raises:
        InputError: the file is not valid YAML or does not hold a mapping.
    """
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{source}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{source}: {tree!r:.60}: a configuration is a mapping of keys to values")
    return tree


def to_yaml(config: BaseModel, *, comments: bool) -> str:
    """Write a configuration as YAML, with every setting.

    Args:
        config: the configuration.
        comments: whether to put each setting's description above it as a comment.
    """
    return "\n".join(_yaml_lines(config, comments, indent=0)) + "\n"


def nested(key: str, value: Any) -> dict[str, Any]:
    """Turn a key path and a value into a nested mapping: `a.b`, 1 gives {"a": {"b": 1}}."""
    first, *rest = key.split(".")
    for part in reversed(rest):
        value = {part: value}
    return {first: value}


def _recipe_path(name: str) -> Path:
    return Path(str(files("tpaw") / "config" / "recipes" / f"{name}.yaml"))


def _read_source(source: str, ancestors: tuple[str, ...]) -> dict[str, Any]:
    path = Path(source)
    if not path.is_file():
        path = _recipe_path(source)
    if not path.is_file():
        raise InputError(f"{source}: no such file or recipe{nearest(source, recipe_names())}")
    if source in ancestors:
        raise InputError(
            f"{source}: extends itself: {' → '.join((*ancestors, source))}; remove one `extends`"
        )
    tree = read_mapping(path, source)
    parents = tree.pop("extends", [])
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(name, str) for name in parents):
        raise InputError(f"{source}: extends: {parents!r}; must be a name or a list of names")
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
        raise InputError(f"--set {override}: not an assignment; write it as section.key=value")
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
