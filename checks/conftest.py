"""This repository's own checks, on files that do not come with it.

They need the folder that SHARED names (default: ../shared beside the checkout) with
`golden/objective.json`, `data/gsm8k/` and `data/llamafactory/`. The package's tests do without.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    root = Path(__file__).parent.parent
    folder = (root / os.environ.get("SHARED", "../shared")).resolve()
    assert folder.is_dir(), f"{folder} is not there; set SHARED"
    return folder
