"""The processes that train one model together. Most runs have one; then none of this waits."""

from __future__ import annotations

import os


def process_count() -> int:
    """Number of processes that train together, as torchrun and Ray Train announce it."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def is_main_process() -> bool:
    """Whether this process is the one of them that writes."""
    return os.environ.get("RANK", "0") in ("", "0")


def wait_for_all() -> None:
    """Wait until every process is here."""
    if process_count() > 1:
        import torch.distributed

        torch.distributed.barrier()


def largest_of_all(number: int) -> int:
    """The largest number that a process gave. Every process must ask."""
    if process_count() == 1:
        return number
    import torch
    from accelerate import PartialState

    numbers = torch.tensor(number, device=PartialState().device)
    torch.distributed.all_reduce(numbers, op=torch.distributed.ReduceOp.MAX)
    return int(numbers)
