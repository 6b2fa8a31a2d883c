"""Where the stages compute. This module has the protocol, and the engine of a single process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from tpaw.pipeline.job import TrainingJob
from tpaw.pipeline.training import TrainingData, train_and_publish
from tpaw.pipeline.worker import Worker
from tpaw.runtime.progress import Advance, OnDone
from tpaw.runtime.shards import Result, Shard, ShardTask, do_here
from tpaw.training.triples import Triples


class Engine(Protocol):
    """Does the shards of a stage, and trains."""

    def do(
        self, task: ShardTask[Worker, Shard, Result], shards: Iterable[Shard], on_done: OnDone
    ) -> Iterator[Result]:
        """Do shards, in any order.

        Args:
            task: what to do with a shard.
            shards: the work. A shard is taken when a worker is free.
            on_done: called with the amount of work done since the last call. It may raise to stop
                the work; delivered shards stay.
        """
        ...

    def train(
        self,
        job: TrainingJob,
        triples: Triples | None,
        progress: AbstractContextManager[Advance],
    ) -> None:
        """Train θ_{t+1} and publish it.

        Args:
            job: what is trained.
            triples: what is trained on. Another process reads it from the run directory.
            progress: the progress bar of the training.

        Raises:
            Interrupted: the user asked for a stop; the step is saved.
        """
        ...


class InProcess:
    """Everything in this process, on one device.

    Args:
        worker: of this process.
        data: the data of the run.
    """

    def __init__(self, worker: Worker, data: TrainingData) -> None:
        self.worker = worker
        self.data = data

    def do(
        self, task: ShardTask[Worker, Shard, Result], shards: Iterable[Shard], on_done: OnDone
    ) -> Iterator[Result]:
        """See `Engine`."""
        return do_here(task, self.worker, shards, on_done)

    def train(
        self,
        job: TrainingJob,
        triples: Triples | None,
        progress: AbstractContextManager[Advance],
    ) -> None:
        """See `Engine`."""
        self.worker.stop.check()
        with progress as advance:
            train_and_publish(
                job, self.data, self.worker.players, advance, self.worker.stop, triples
            )


def parts(items: Sequence[Any], size: int) -> Iterator[tuple[int, Sequence[Any]]]:
    """Cut a list into parts of `size`, each with its first place."""
    for first in range(0, len(items), size):
        yield first, items[first : first + size]
