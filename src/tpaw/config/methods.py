"""Modules that a configuration names: its objective, its checker. They are imported only then."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import Any

import tpaw.objectives
from tpaw.config.chosen import refusal
from tpaw.config.messages import nearest
from tpaw.errors import brief, first_line, printable
from tpaw.objectives.base import NamedObjective


def method_names() -> list[str]:
    """The methods of the package: the files in `tpaw/objectives`."""
    names = (module.name for module in pkgutil.iter_modules(tpaw.objectives.__path__))
    return sorted(name for name in names if name != "base")


def settings_of(name: Any) -> type[NamedObjective]:
    """The class `Settings` of the module of a method.

    Args:
        name: a file in `tpaw/objectives`, or the dotted name of another module.

    Raises:
        ValidationError: of the key `name`: there is no such module, it cannot be imported, or it
            has no such class.
    """
    shown = f"{brief(name)}:"
    if not isinstance(name, str) or ("." not in name and name not in method_names()):
        hint = nearest(str(name), method_names())
        raise refusal("name", name, f"{shown} unknown name{hint}")
    try:
        module = imported(name if "." in name else f"tpaw.objectives.{name}")
    except ValueError as error:
        raise refusal("name", name, f"{shown} {error}") from None
    settings = getattr(module, "Settings", None)
    if not isinstance(settings, type) or not issubclass(settings, NamedObjective):
        raise refusal(
            "name",
            name,
            f"{shown} the module has no class Settings that is a NamedObjective of "
            "tpaw.objectives.base",
        )
    return settings


def imported(name: str) -> ModuleType:
    """Import a module that a configuration names.

    Raises:
        ValueError: why it cannot be imported, as a clause without the name.
    """
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError("not the dotted name of a module")
    try:
        return importlib.import_module(name)
    except Exception as error:  # of whatever the module runs
        reason = f"{type(error).__name__}: {printable(first_line(error))}"
        raise ValueError(f"the module cannot be imported ({reason})") from None
