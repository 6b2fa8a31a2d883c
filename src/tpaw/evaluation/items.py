"""Files of items: one JSON line for each example or document that was evaluated."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Item = dict[str, Any]


def write_items(path: Path, items: Sequence[Item]) -> None:
    """Write items as JSON lines."""
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")


def read_items(path: Path) -> list[Item]:
    """Read the items that `write_items` wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
