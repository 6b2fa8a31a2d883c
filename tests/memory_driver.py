"""Work whose peak memory is known; called by test_benchmarks.py in a process of its own."""

from __future__ import annotations

import numpy as np


def keeps_little(mebibytes):
    return lambda: np.ones(mebibytes * 2**20, dtype=np.uint8).sum()
