"""Resolve the paths of a configuration: `tpaw://…` and `~`."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

PACKAGE_SCHEME = "tpaw://"


def resolve_path(path: str) -> str:
    """Resolve a path of the configuration.

    Args:
        path: `tpaw://starter/model` names a file of the package; `~` names the home folder. Any
            other text, such as a Hub id, is returned unchanged.
    """
    if not path.startswith(PACKAGE_SCHEME):
        return str(Path(path).expanduser()) if path.startswith("~") else path
    return str(files("tpaw").joinpath(path.removeprefix(PACKAGE_SCHEME)))
