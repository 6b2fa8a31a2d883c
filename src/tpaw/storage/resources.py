"""Paths that a configuration may name: files of the package, and the user's home."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

PACKAGE_SCHEME = "tpaw://"


def resolve_path(path: str) -> str:
    """Turn tpaw://starter/model into the file that comes with the package, ~ into the home."""
    if not path.startswith(PACKAGE_SCHEME):
        return str(Path(path).expanduser()) if path.startswith("~") else path
    return str(files("tpaw").joinpath(path.removeprefix(PACKAGE_SCHEME)))
