"""A cache of replies on disk. The key is the hash of the request, so nothing is asked twice.

A request contains the name of the judge and the complete prompt. So another prompt, response or
order gives another key. The URL of the endpoint is not part of the key.
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
    """Return the sha256 of a request, which is the key of its reply."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


class Replies:
    """A folder with one file for each reply. Several processes may use it at the same time."""

    def __init__(self, folder: Path) -> None:
        # An absolute path stays valid if the working directory changes while threads run.
        self.folder = folder.absolute()

    def get(self, key: str) -> Reply | None:
        """Return a stored reply, or None if there is none.

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
            raise ArtifactError(
                f"{path}: damaged: not a reply; remove this file to ask again"
            ) from None

    def put(self, key: str, reply: Reply) -> None:
        """Store a reply."""
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, reply._asdict())

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"
