"""Read and write configurations as YAML: files, recipes, `extends` and `--set`.

This module does not know the settings, except for those that choose what a section holds. It
treats a configuration as a nested mapping or as any pydantic model.
"""

from __future__ import annotations

import os
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
from tpaw.config.yaml_reader import FLOAT, MAX_DEPTH, parse_yaml
from tpaw.errors import InputError, brief, printable

# Files that one configuration may read through `extends`. A file that is extended twice counts
# twice: otherwise 24 files that extend the next one twice would be 8 million reads.
MAX_FILES = 50


class _Dumper(yaml.SafeDumper):
    """Quotes every text that `parse_yaml` would read as a number."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


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
        InputError: a file or recipe does not exist, is not valid YAML, extends itself or too many
            files; or an override is malformed.
    """
    tree: dict[str, Any] = {}
    for source in sources:
        tree = _merge(tree, _read_source(source, (), []) if isinstance(source, str) else source)
    for override in overrides:
        tree = _merge(tree, _parse_override(override))
    return tree


def read_mapping(path: Path, source: str) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Args:
        path: the file.
        source: the name of the file in error messages.

    Raises:
        InputError: the file cannot be read, is not valid YAML or does not hold a mapping.
    """
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{source}: not valid YAML: {error}") from None
    except OSError as error:
        raise InputError(f"{source}: cannot be read: {error.strerror}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{source}: {brief(tree)}: a configuration is a mapping of keys to values")
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


def _read_source(source: str, ancestors: tuple[str, ...], read: list[str]) -> dict[str, Any]:
    """Read a file or a recipe, and what it extends. `read` collects the names of all of them."""
    # os.path.isfile is false for a name that no file can have. Path.is_file raises OSError.
    path = next((p for p in (Path(source), _recipe_path(source)) if os.path.isfile(p)), None)
    if path is None:
        raise InputError(
            f"{printable(source)}: no such file or recipe{nearest(source, recipe_names())}"
        )
    if source in ancestors:
        raise InputError(
            f"{source}: extends itself: {' → '.join((*ancestors, source))}; remove one `extends`"
        )
    read.append(source)
    if len(read) > MAX_FILES:
        raise InputError(
            f"{read[0]}: extends: more than {MAX_FILES} files are read through it; extend fewer"
        )
    tree = read_mapping(path, source)
    parents = tree.pop("extends", [])
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(name, str) for name in parents):
        raise InputError(f"{source}: extends: {brief(parents)}; must be a name or a list of names")
    merged: dict[str, Any] = {}
    for parent in parents:
        beside = path.parent / parent
        name = str(beside) if os.path.isfile(beside) else parent
        merged = _merge(merged, _read_source(name, (*ancestors, source), read))
    return _merge(merged, tree)


def _merge(base: Mapping[str, Any], over: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        if both and not _is_other_choice(path + key, merged[key], value):
            merged[key] = _merge(merged[key], value, f"{path}{key}.")
        else:
            merged[key] = value
    return merged


def _is_other_choice(path: str, base: Mapping[str, Any], over: Mapping[str, Any]) -> bool:
    """Whether a section has another method or rule than before, and so none of its settings."""
    if path == "objective":
        before = base.get("name", "tpaw")
        return bool(over.get("name", before) != before)
    return path in ("team.opponents", "team.main_players") and over.keys().isdisjoint(base)


def _parse_override(override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    shown = f"--set {printable(override)}"
    if not equals or not all(key.split(".")) or key.count(".") > MAX_DEPTH:
        raise InputError(f"{shown}: not an assignment; write it as section.key=value")
    try:
        value = parse_yaml(text)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or error
        raise InputError(f"{shown}: {brief(text)} is not a YAML value: {problem}") from None
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
