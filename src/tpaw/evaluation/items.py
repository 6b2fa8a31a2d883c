"""Outcomes item by item, as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Item = dict[str, Any]


def write_items(path: Path, items: Sequence[Item]) -> None:
    """Write outcomes as JSON lines."""
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")


def read_items(path: Path) -> list[Item]:
    """Read what `write_items` wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
