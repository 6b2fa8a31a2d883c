"""Work that is cut into shards: any process can do a shard, in any order.

A task says how to open what the work needs, a loaded model for example, and what to do with one
shard. It is pickled and sent to other processes, so it holds settings and paths, and no tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

from tpaw.runtime.progress import OnDone

Shard = TypeVar("Shard", contravariant=True)
Result = TypeVar("Result", covariant=True)
Holder = TypeVar("Holder", contravariant=True)

# Does one shard. It reports progress and may be stopped by the function that it reports to.
Do = Callable[[Shard, OnDone], Result]


class ShardTask(Protocol[Holder, Shard, Result]):
    """What a stage does with each of its shards."""

    def opened(self, holder: Holder) -> AbstractContextManager[Do[Shard, Result]]:
        """Open what the work needs.

        Args:
            holder: what a process keeps between tasks, such as loaded models.
        """
        ...

    def title(self, shard: Shard) -> str:
        """Say what is done, for messages."""
        ...


def do_here(
    task: ShardTask[Holder, Shard, Result],
    holder: Holder,
    shards: Iterable[Shard],
    on_done: OnDone,
) -> Iterator[Result]:
    """Do shards one after another in this process. The task is opened only if there is a shard.

    Args:
        task: what to do.
        holder: what this process keeps between tasks.
        shards: the work.
        on_done: called with the amount of work done since the last call. It may raise.

    Yields:
        The results, in the order of the shards.
    """
    with contextlib.ExitStack() as stack:
        do: Do[Shard, Result] | None = None
        for shard in shards:
            do = do or stack.enter_context(task.opened(holder))
            yield do(shard, on_done)
