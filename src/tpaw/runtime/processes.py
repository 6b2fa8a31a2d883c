"""The processes that train one model together. Most runs have one; then none of this waits."""

from __future__ import annotations

import os
from typing import TypeVar

Value = TypeVar("Value")


def process_count() -> int:
    """Number of processes that train together, as torchrun and Ray Train announce it."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def is_main_process() -> bool:
    """Whether this process is the one of them that writes."""
    return process_count() == 1 or os.environ.get("RANK", "0") in ("", "0")


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


def as_main_process_sees(value: Value) -> Value:
    """What the main process gave, in every process. Every process must ask.

    A network file system may show two machines different files.
    """
    if process_count() == 1:
        return value
    import torch.distributed
    from accelerate import PartialState

    box = [value]
    torch.distributed.broadcast_object_list(box, src=0, device=PartialState().device)
    return box[0]
