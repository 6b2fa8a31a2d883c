"""The devices that Ray has reserved for a group of this run: its placement groups."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Any

import ray
from ray import PlacementGroupID
from ray.util.placement_group import (
    PlacementGroup,
    placement_group_table,
    remove_placement_group,
)


def free_devices(others: Collection[str], seconds: float = 0.0) -> None:
    """Give back the devices that a group of this run has reserved, and end its processes.

    Ray Train does so itself, but later, or not at all if it was interrupted.

    Args:
        others: placement groups that were there before. They stay.
        seconds: how long to go on. Ray Train, when it is interrupted, may begin another group
            before it ends.
    """
    deadline = time.monotonic() + seconds
    while True:
        for number in _groups_of_run(others):
            _remove(number)
        if time.monotonic() >= deadline:
            return
        time.sleep(0.2)


def free_what_is_left(others: Collection[str]) -> None:
    """Give back devices that a group has while another group of this run waits for devices.

    Ray Train has one group at a time. One that it gave up when a machine died may get devices later
    and keep them for ever.

    Args:
        others: placement groups that belong to others.
    """
    groups = _groups_of_run(others)
    if any(group["state"] == "PENDING" for group in groups.values()):
        for number, group in groups.items():
            if group["state"] == "CREATED":
                _remove(number)


def _remove(number: str) -> None:
    remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(number))))


def _groups_of_run(others: Collection[str]) -> dict[str, Any]:
    """The placement groups of this run: what Ray says of each, by number."""
    job = ray.get_runtime_context().get_job_id()
    return {
        number: group
        for number, group in placement_group_table().items()
        if number not in others and number.endswith(job) and group["state"] != "REMOVED"
    }


def waits(others: Collection[str]) -> bool:
    """Whether a group of this run waits for its devices. Its processes may have died before."""
    return any(group["state"] != "CREATED" for group in _groups_of_run(others).values())
