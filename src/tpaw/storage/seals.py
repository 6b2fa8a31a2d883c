"""Seals: a checksum inside a file, for manifests and for single files that no manifest lists.

A sealed file is written whole, so its content and its checksum never disagree after a crash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

SEAL = "sha256"
"""The key of the checksum in a JSON mapping."""
_LINE = "# sha256 of the lines above: "


def seal_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Add the checksum of a JSON mapping as its last key."""
    plain = {key: value for key, value in facts.items() if key != SEAL}
    return plain | {SEAL: _hash_of(plain)}


def are_intact(facts: Mapping[str, Any]) -> bool | None:
    """Whether a sealed mapping is as it was written; None if it has no seal."""
    if SEAL not in facts:
        return None
    return bool(facts == seal_facts(facts))


def seal_text(text: str) -> str:
    """Add the checksum of a YAML text as its last line, a comment."""
    return f"{text}{_LINE}{_hash_of(text)}\n"


def is_intact(text: str) -> bool | None:
    """Whether a sealed text is as it was written; None if it has no seal."""
    content, line, _ = text.rpartition(_LINE)
    return text == seal_text(content) if line else None


def _hash_of(content: str | Mapping[str, Any]) -> str:
    text = content if isinstance(content, str) else json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
