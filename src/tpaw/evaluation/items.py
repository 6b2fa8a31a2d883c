"""Files of items: one JSON line for each example or document that was evaluated."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

Item = dict[str, Any]


def items_file(task: str) -> str:
    """Return the path of a task's items inside the folder of an evaluation.

    Args:
        task: the harness's name of the task. Characters that a file name should not have are
            replaced. A hash of the name then keeps the names of two tasks apart.
    """
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", task)
    if name != task:
        name += f"-{hashlib.sha256(task.encode()).hexdigest()[:8]}"
    return f"items/{name}.jsonl"


def write_items(path: Path, items: Sequence[Item]) -> None:
    """Write items as JSON lines."""
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")


def read_items(path: Path, limit: int | None = None) -> list[Item]:
    """Read the items that `write_items` wrote, or the first of them.

    Args:
        limit: how many; None for all.
    """
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in islice(lines, limit)]
