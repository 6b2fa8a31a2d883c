"""Work on many items in copies of this process, in order."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, TypeVar

from tpaw.errors import MemoryShortageError, TpawError

Item = TypeVar("Item")
Result = TypeVar("Result")

# More copies than this are kept busy by one process in few cases only.
_MOST = 16
# The library tokenizers hangs in a copy that uses its threads, which are not copied.
_TOKENIZERS_USE_THREADS = "TOKENIZERS_PARALLELISM"


def copies_to_use() -> int:
    """How many copies of this process have a core each; 1 where a process cannot be copied."""
    if sys.platform != "linux":  # elsewhere, libraries do not survive it
        return 1
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():  # its threads hold locks
        return 1
    return min(len(os.sched_getaffinity(0)), _MOST)


def map_in_copies(
    work: Callable[[Item], Result], items: Iterable[Item], copies: int
) -> Iterator[Result]:
    """`map(work, items)`, by copies of this process.

    Each copy works on one item at a time. The copies end with the iterator, and when this process
    ends in any way.

    Args:
        work: what to do with an item. It must leave the GPU and threads alone.
        items: items that can be pickled. A few more are taken than results were given.
        copies: number of processes.

    Raises:
        TpawError: that `work` raised.
        RuntimeError: `work` raised another error; its traceback is in the message.
        MemoryShortageError: a process was killed.
    """
    remaining = iter(items)
    workers: list[_Copy] = []
    try:
        for _ in range(copies):
            workers.append(_copy(work, workers))
        busy: deque[_Copy] = deque()
        for worker in workers:
            for item in _next(remaining):
                worker.connection.send(item)
                busy.append(worker)
        while busy:
            worker = busy.popleft()
            result = _received(worker)
            for item in _next(remaining):
                worker.connection.send(item)
                busy.append(worker)
            yield result
    finally:
        for worker in workers:
            worker.connection.close()
            os.kill(worker.pid, signal.SIGKILL)  # it holds nothing that could be lost
            os.waitpid(worker.pid, 0)


class _Copy(NamedTuple):
    pid: int
    connection: Connection


def _next(items: Iterator[Item]) -> Iterator[Item]:
    """The next item, if there is one."""
    with contextlib.suppress(StopIteration):
        yield next(items)


def _copy(work: Callable[[Item], Result], others: list[_Copy]) -> _Copy:
    ours, theirs = multiprocessing.Pipe()
    chosen = os.environ.get(_TOKENIZERS_USE_THREADS)
    os.environ[_TOKENIZERS_USE_THREADS] = "false"
    pid = os.fork()
    if pid == 0:
        # With these open, a copy would not notice that the process it was made from has ended.
        for connection in (ours, *(other.connection for other in others)):
            connection.close()
        _serve(work, theirs)  # never returns
    theirs.close()
    if chosen is None:
        del os.environ[_TOKENIZERS_USE_THREADS]
    else:
        os.environ[_TOKENIZERS_USE_THREADS] = chosen
    return _Copy(pid, ours)


def _serve(work: Callable[[Item], Result], connection: Connection) -> None:
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other process decides
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        while True:
            item = connection.recv()
            connection.send(_answer(work, item))
    except (EOFError, OSError):  # the other process has ended
        code = 0
    finally:
        os._exit(code)


def _answer(work: Callable[[Item], Any], item: Item) -> tuple[Any, Exception | None]:
    try:
        return work(item), None
    except TpawError as error:
        return None, error
    except Exception:
        return None, RuntimeError(traceback.format_exc())


def _received(worker: _Copy) -> Any:
    try:
        result, error = worker.connection.recv()
    except (EOFError, OSError):
        raise MemoryShortageError(
            "a process that reads the data was killed, most likely because memory has run out"
        ) from None
    if error is not None:
        raise error
    return result
