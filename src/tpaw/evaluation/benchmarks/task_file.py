"""A task file of one's own, in the harness's format. It is code.

The harness imports the functions that it names (`!function`) and renders its templates with jinja
without a sandbox.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml


class _Function(str):
    """The value of `!function`: module.name, where the module is beside the file."""


class _Loader(yaml.SafeLoader):
    """Reads a task file without running its functions."""


def _function(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> _Function:
    return _Function(loader.construct_scalar(node))


_Loader.add_constructor("!function", _function)


def content_hash(path: Path) -> str:
    """Hash a task file and every local file that it names: includes, functions and data.

    Args:
        path: the task file. As in the harness, includes and functions are relative to the file
            that names them. Data is relative to the task file.

    Returns:
        The sha256 of relative paths and contents. A copy of the folder has the same hash.
    """
    digest = hashlib.sha256()
    files = {file.resolve() for file in _named_files(path, path.parent, set())}
    for name, file in sorted((os.path.relpath(f, path.parent.resolve()), f) for f in files):
        with file.open("rb") as handle:
            digest.update(f"{name}\n{hashlib.file_digest(handle, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def _named_files(path: Path, data_folder: Path, seen: set[Path]) -> Iterator[Path]:
    if path in seen or not path.is_file():
        return  # the harness names a file that is missing or included in a circle
    seen.add(path)
    yield path
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError):
        return  # the harness says what is wrong
    for key, value in _leaves(tree):
        if isinstance(value, _Function):
            yield from _existing(path.parent / f"{value.rpartition('.')[0].replace('.', '/')}.py")
        elif key == "include":
            yield from _named_files(path.parent / value, data_folder, seen)
        elif key in ("dataset_path", "data_files", "data_dir"):
            yield from _existing(data_folder / value)


def _leaves(tree: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Return every text of a task file, with the name of the field that holds it."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            # `data_files` may be a mapping from splits to files.
            yield from _leaves(value, key if key == "data_files" else str(name))
    elif isinstance(tree, list):
        for value in tree:
            yield from _leaves(value, key)
    elif isinstance(tree, str):
        yield key, tree


def _existing(path: Path) -> Iterator[Path]:
    """Return the file, the files of the folder, or the files that the pattern matches."""
    if path.is_dir():
        yield from (file for file in path.rglob("*") if file.is_file())
    elif path.is_file():
        yield path
    elif "*" in path.name:
        yield from (file for file in path.parent.glob(path.name) if file.is_file())
