"""A few of the cases of `checks/fuzz.py`; `make fuzz` runs 2,000."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parents[1] / "checks" / "fuzz.py"


@pytest.mark.process
def test_no_mutated_file_gives_a_traceback_a_hang_or_a_raw_escape(tmp_path):
    done = subprocess.run(
        [sys.executable, FUZZ, "--count", "30", "--seed", "1", "--jobs", "1"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
