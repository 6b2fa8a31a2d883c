"""Replies on disk, each under the hash of its request: what was asked once is not asked again.

The request names the judge and holds the whole question, so another prompt, answer or order is
another request. Where the judge is reached is no part of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tpaw.errors import ArtifactError
from tpaw.evaluation.judge.endpoint import Reply
from tpaw.storage.artifacts import read_json, write_json


def request_key(request: Mapping[str, Any]) -> str:
    """sha256 of a request."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


class Replies:
    """A folder of replies, one file each; processes may share it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()  # threads may outlive a change of directory

    def get(self, key: str) -> Reply | None:
        """The reply, if there is one.

        Raises:
            ArtifactError: the file is damaged.
        """
        path = self._path(key)
        if not path.is_file():
            return None
        found = read_json(path)
        try:
            return Reply(*(str(found[field]) for field in Reply._fields))
        except (KeyError, TypeError):
            raise ArtifactError(f"{path}: damaged: not a reply; remove it to ask again") from None

    def put(self, key: str, reply: Reply) -> None:
        """Keep a reply."""
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, reply._asdict())

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"
