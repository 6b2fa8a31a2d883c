"""Peak memory of a piece of work, in a process of its own.

CPU: the kernel's high-water mark of resident memory, set back once model and data are there, less
what was resident then. So it counts gradients, optimizer state, activations and logits, and not
the weights. CUDA: torch's peak of allocated memory, likewise less what was allocated before.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import re
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

Prepare = Callable[..., Callable[[], Any]]


def peak_bytes(prepare: Prepare, *args: Any) -> int:
    """Bytes at the peak of `prepare(*args)()`, above those in use once it is prepared.

    Args:
        prepare: a module's function (it is called in another process); makes the work ready.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_measure, args=(sender, prepare, args, torch.get_num_threads())
    )
    process.start()
    sender.close()
    try:
        peak = receiver.recv()
    except EOFError:
        raise RuntimeError(
            f"{prepare.__name__} failed in its process; its error is above"
        ) from None
    finally:
        process.join()
    return int(peak)


def _measure(sender: Connection, prepare: Prepare, args: tuple[Any, ...], threads: int) -> None:
    torch.set_num_threads(threads)
    sender.send(_peak_of(prepare(*args)))


def _peak_of(work: Callable[[], Any]) -> int:
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.memory_allocated():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before
    # What the allocator keeps for itself would hide as much of the peak.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    resident = _status_bytes("VmRSS")
    work()
    return _status_bytes("VmHWM") - resident


def _status_bytes(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {name}")
    return int(found.group(1)) * 1024
