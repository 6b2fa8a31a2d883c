"""How much memory is free, and what to do when it runs out."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tpaw.errors import MemoryShortageError, first_line, printable

if TYPE_CHECKING:
    import torch

# Share of the free memory that something temporary may take.
FREE_MEMORY_SHARE = 0.8
# How torch, CUDA libraries, C++ and the operating system report it, where it is no exception of
# its own.
_REPORTS = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "can't start new thread",
    "bad_alloc",
    "alloc_failed",
)


@contextlib.contextmanager
def memory_limited_by(setting: str, value: int) -> Iterator[None]:
    """Turn an error about memory within the context into one that names the setting to lower.

    Args:
        setting: the setting that decides how much memory the work needs, "score.tokens_per_row" for
            example. It may change when a run is resumed.
        value: its present value.

    Raises:
        MemoryShortageError: memory has run out.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryShortageError(
            f"{setting}: {value}: memory has run out ({printable(first_line(error))}); lower "
            f"{setting} and run the same command again. Finished work is kept."
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception reports that memory, or a limit such as that of threads, has run out."""
    if isinstance(error, MemoryError):
        return True
    return any(report in str(error).lower() for report in _REPORTS)


def return_free_memory() -> None:
    """Give freed memory of the CPU back to the operating system.

    glibc keeps it. The memory of a run would otherwise grow from stage to stage.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)


def has_room_for(size: int, device: torch.device) -> bool:
    """Whether something temporary of a size in bytes fits into the memory of a device."""
    return size <= FREE_MEMORY_SHARE * free_memory(device)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device."""
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if "SC_AVPHYS_PAGES" not in os.sysconf_names:  # macOS does not tell
        return sys.maxsize
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
