"""Memory that runs out is one line that says what to lower."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from messages import refused

from tpaw.errors import MemoryShortageError
from tpaw.runtime.memory import memory_limited_by, return_free_memory

AMOUNT = {"reason": re.compile(r"(?<=out \().*(?=\))")}


def raises(error):
    def work():
        raise error

    return work


SHORTAGES = {
    "torch on a CPU": lambda: torch.empty(2**58),
    "numpy": lambda: np.empty(2**58),
    "torch on a GPU": raises(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")),
    "cuBLAS": raises(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublas")),
    "C++": raises(RuntimeError("std::bad_alloc")),
    "Python": raises(MemoryError()),
    "threads": raises(RuntimeError("can't start new thread")),
    "the operating system": raises(OSError(12, "Cannot allocate memory")),
}


@pytest.mark.parametrize("where", SHORTAGES)
def test_a_shortage_names_the_setting_its_value_and_the_reason(where):
    with (
        refused("score.tokens_per_row", 8192, error=MemoryShortageError, hide=AMOUNT) as caught,
        memory_limited_by("score.tokens_per_row", 8192),
    ):
        SHORTAGES[where]()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error", [RuntimeError("index out of range"), OSError(28, "No space left"), ValueError("x")]
)
def test_other_errors_pass_unchanged(error):
    with pytest.raises(type(error)) as caught, memory_limited_by("score.tokens_per_row", 1):
        raise error
    assert caught.value is error


def resident():
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another library keeps no memory")
def test_what_is_free_goes_back_to_the_operating_system():
    size, count = 8_000, 10_000  # too small to be mapped alone, too large for Python's own pools
    blocks = [bytearray(size) for _ in range(count)]
    del blocks[:-1]  # the last one lies at the top, so that nothing below it goes back by itself
    held = resident()
    return_free_memory()
    assert held - resident() > 0.8 * size * count
