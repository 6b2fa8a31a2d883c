"""Which settings may change when a run is resumed: those that `schema.py` marks CHANGEABLE."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from tpaw.config.messages import section_of
from tpaw.config.schema import RunConfig, at_iteration
from tpaw.errors import brief


def differences(old: RunConfig, new: RunConfig, begun: int = 0) -> list[str]:
    """The changed settings that a resumed run refuses.

    Args:
        old: the configuration that the run began with.
        new: the configuration to resume with.
        begun: how many iterations have begun to train. A setting with one value for each
            iteration may still change for later iterations.

    Returns:
        One line `key: old → new` for each refused change, sorted by key.
    """
    old_values, new_values = (
        dict(_leaves(config.model_dump(by_alias=True)))
        | {key: [at_iteration(value, t) for t in range(begun)] for key, value in per.items()}
        for config in (old, new)
        for per in [config.per_iteration()]
    )
    changeable = set(_changeable_keys(RunConfig))
    return [
        f"{key}: {brief(old_values.get(key))} → {brief(new_values.get(key))}"
        for key in sorted(old_values.keys() | new_values.keys())
        if key not in changeable and old_values.get(key) != new_values.get(key)
    ]


def _changeable_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        key = prefix + (field.alias or name)
        section = section_of(field)
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
