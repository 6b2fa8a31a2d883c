"""The engine that computes on many devices and machines. Ray places, restarts and connects.

The run directory says what is done, so this module keeps no state of its own: a worker delivers its
shard into the run directory, and this process, which holds the run's lock, publishes it. Whatever
dies, the same command goes on.

- Shards are done by actors. An actor keeps the player that it loaded. Ray restarts an actor that
  died; its shard goes to the next actor that is free.
- Training is Ray Train's `TorchTrainer` around `train_and_publish`. Ray Train restarts the group
  when a process died, and training goes on from the last saved step.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
from ray.util.placement_group import placement_group_table
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tpaw.config.schema import RunConfig
from tpaw.errors import WorkerError, for_terminal
from tpaw.models.sharding import Member
from tpaw.pipeline.job import TrainingJob
from tpaw.pipeline.ray_cluster import worker_count
from tpaw.pipeline.ray_group import GROUP
from tpaw.pipeline.ray_link import LINK, SECONDS_BETWEEN_LOOKS, Failure, Place, Work
from tpaw.pipeline.ray_placement import free_devices, free_what_is_left, waits
from tpaw.pipeline.ray_workers import SHARD_WORKER
from tpaw.pipeline.worker import LogpsTask, ScoreTask, Worker
from tpaw.runtime.interrupt import StopSignal
from tpaw.runtime.progress import Advance, OnDone, note, note_once
from tpaw.runtime.shards import Result, Shard, ShardTask
from tpaw.storage.artifacts import TEMPORARY_PREFIX
from tpaw.storage.run_directory import RunDirectory
from tpaw.training.triples import Triples

SECONDS_TO_WAIT_FOR_A_WORKER = 60.0
SECONDS_TO_WAIT_FOR_DEVICES = 15.0
SECONDS_TO_CLOSE = 30.0
SECONDS_TO_INTERRUPT = 5.0
WAITING = "Waiting for a worker: the cluster has no free device for one."
# Errors after which the same work may succeed elsewhere: a process, a machine or a result is lost.
DEATHS = (
    ray.exceptions.RayActorError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.OutOfMemoryError,
)


class _FailedTogether(Exception):
    """A member of a group failed, by itself or because another one died."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.text)
        self.failure = failure


class RayEngine:
    """Shards by actors, training by Ray Train; see the module's text.

    Args:
        config: the configuration of the run; `launch` says where.
        run: the run directory, on a file system that all machines share.
        stop: tells whether the user asked for a stop.

    Raises:
        InputError: the cluster cannot be reached, or has fewer devices than are asked for.
    """

    def __init__(self, config: RunConfig, run: RunDirectory, stop: StopSignal) -> None:
        self.config = config
        self.stop = stop
        self._use_gpu = config.device != "cpu" and bool(ray.cluster_resources().get("GPU"))
        self.workers = worker_count(config)
        threads = None if self._use_gpu else 1
        root, lock = str(run.root.absolute()), run.lock_file.read_text(encoding="utf-8")
        self._place = Place(config, root, lock, os.getcwd(), threads)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        self._here = {"scheduling_strategy": here}
        self._link = LINK.options(**self._here).remote()
        self._actors: list[Any] = []  # each holds a player
        self._ready: set[Any] = set()  # those whose process has run
        self._group: list[Any] = []  # hold one player together; see `score.sharded`

    def do(
        self, task: ShardTask[Worker, Shard, Result], shards: Iterable[Shard], on_done: OnDone
    ) -> Iterator[Result]:
        """See `Engine`.

        Raises:
            TpawError: an error of a worker. Its message names the shard and the machine.
        """
        if self.config.score.sharded and isinstance(task, ScoreTask | LogpsTask):
            yield from self._do_together(task, shards, on_done)
            return
        self._end_group()
        todo = enumerate(shards)
        if (first := next(todo, None)) is None:
            return
        ray.get(self._link.begin.remote())
        waiting = deque([Work(*first)])
        starting = {actor.ready.remote(): actor for actor in self._started()}
        idle: list[Any] = []
        running: dict[Any, tuple[Any, Work]] = {}
        results: deque[Result] = deque()
        finished = shown = 0
        since = time.monotonic()
        try:
            while True:
                while idle and (waiting or (following := next(todo, None)) is not None):
                    work = waiting.popleft() if waiting else Work(*following)  # type: ignore[misc]
                    actor = idle.pop()
                    running[self._given(actor, task, work)] = actor, work
                while results:  # what is done with a result may take long; the workers are busy
                    yield results.popleft()
                if not running and not waiting:
                    on_done(finished - shown)
                    return
                arrived, _ = ray.wait([*running, *starting], timeout=SECONDS_BETWEEN_LOOKS)
                counts = self._look()
                partly = sum(counts.get(work.key, 0) for _, work in running.values())
                on_done(max(0, finished + partly - shown))
                shown = max(shown, finished + partly)
                for reference in arrived:
                    if reference in starting:
                        actor = starting.pop(reference)
                        if self._has_started(reference, actor):
                            idle.append(actor)
                        else:
                            actor = self._replaced(actor)
                            starting[actor.ready.remote()] = actor
                        continue
                    actor, work = running.pop(reference)
                    try:
                        answer = ray.get(reference)
                    except DEATHS as error:
                        waiting.append(self._once_more(task.title(work.shard), work, str(error)))
                        # Ray restarts it. Others of its machine may be dead too, without any work.
                        starting |= {other.ready.remote(): other for other in (actor, *idle)}
                        idle.clear()
                        continue
                    idle.append(actor)
                    if isinstance(answer, Failure):
                        raise answer.as_error()
                    result, amount = answer
                    finished += amount
                    results.append(result)
                if running or idle:
                    since = time.monotonic()
                elif time.monotonic() - since > SECONDS_TO_WAIT_FOR_A_WORKER:
                    note_once(WAITING)
        finally:
            if running:  # an error or a stop: the others end at their next report
                self._link.stop.remote(signal.SIGTERM)

    def train(
        self,
        job: TrainingJob,
        triples: Triples | None,
        progress: AbstractContextManager[Advance],
    ) -> None:
        """See `Engine`. A stop reaches the processes, which save the step."""
        self.stop.check()
        self.release()  # training needs the devices
        ray.get(self._link.begin.remote())
        folder = Path(self._place.root) / f"{TEMPORARY_PREFIX}ray-train"
        settings = {"place": self._place, "job": job, "link": self._link}
        gpus = self.config.launch.gpus_per_worker if self._use_gpu else 1
        fit = GROUP.options(**self._here).remote(
            settings,
            self.workers * gpus,
            self._use_gpu,
            self.config.launch.max_retries,
            str(folder),
        )
        shown, has_told, others = 0, False, set(placement_group_table())
        since, has_ended = time.monotonic(), False
        try:
            with progress as advance:
                while not ray.wait([fit], timeout=SECONDS_BETWEEN_LOOKS)[0]:
                    counts = self._look()
                    self._raise_failure()
                    if "training" not in counts or waits(others):
                        self.stop.check()  # nobody trains who could save the step
                        if time.monotonic() - since > SECONDS_TO_WAIT_FOR_DEVICES:
                            free_what_is_left(others)
                        if time.monotonic() - since > SECONDS_TO_WAIT_FOR_A_WORKER:
                            note_once(WAITING)
                    else:
                        since = time.monotonic()
                    advance(max(counts.get("training", 0) - shown, 0))
                    shown = max(shown, counts.get("training", 0))
                    if self.stop.signal_number is not None and not has_told:
                        ray.get(self._link.stop.remote(self.stop.signal_number))
                        has_told = True
                self._look()
                failure = self._raise_failure()
                try:
                    ray.get(fit)
                except ray.exceptions.RayError as error:
                    why = for_terminal(str(error)).strip()
                    if failure is not None:  # the last line of Ray's text names its own error
                        why = f"{why.splitlines()[-1]}\n{failure.text}"
                    raise WorkerError(
                        f"training of θ_{job.t + 1} failed, launch.max_retries is "
                        f"{self.config.launch.max_retries}; saved steps are kept. {why}"
                    ) from error
                advance(max(job.steps - shown, 0))
                has_ended = True
        finally:
            ray.cancel(fit, force=True)
            free_devices(others, 0.0 if has_ended else SECONDS_TO_INTERRUPT)
            shutil.rmtree(folder, ignore_errors=True)

    def release(self) -> None:
        """End the actors, which frees their devices."""
        closing = [actor.close.remote() for actor in self._actors if actor in self._ready]
        if closing:  # their servers have ended then, and the memory of devices is free
            ray.wait(closing, num_returns=len(closing), timeout=SECONDS_TO_CLOSE)
        for actor in [*self._actors, *self._group]:
            ray.kill(actor)
        self._actors, self._group = [], []
        self._ready.clear()

    def _do_together(
        self, task: ShardTask[Worker, Shard, Result], shards: Iterable[Shard], on_done: OnDone
    ) -> Iterator[Result]:
        """Do one shard after another, each by all workers, which hold the model together.

        Where one of them dies, the others wait in vain or fail. So all are ended, and begin anew.
        """
        for number, shard in enumerate(shards):
            ray.get(self._link.begin.remote())
            work, shown = Work(number, shard), 0
            while True:
                try:
                    doing = [self._given(member, task, work) for member in self._joined()]
                    waiting = doing
                    while waiting:
                        arrived, waiting = ray.wait(waiting, timeout=SECONDS_BETWEEN_LOOKS)
                        for answer in ray.get(arrived):
                            if isinstance(answer, Failure):
                                raise _FailedTogether(answer)
                        # Each member counts what all do.
                        done = self._look().get(work.key, 0)
                        on_done(max(0, done - shown))
                        shown = max(shown, done)
                    result, amount = ray.get(doing[0])
                    break
                except (*DEATHS, ray.exceptions.RayTaskError) as error:
                    self._end_group()
                    work = self._once_more(task.title(shard), work, str(error))
                except _FailedTogether as failed:
                    if failed.failure.error is not None:  # another try would not help
                        raise failed.failure.as_error() from None
                    self._end_group()
                    work = self._once_more(task.title(shard), work, failed.failure.text)
            on_done(max(0, amount - shown))
            yield result

    def _joined(self) -> list[Any]:
        """The workers as a group that holds one model."""
        if not self._group:
            self.release()  # the group needs the devices
            gpus = self.config.launch.gpus_per_worker if self._use_gpu else 1
            options = {"num_gpus": int(self._use_gpu), "num_cpus": 1, "max_restarts": 0}
            count = self.workers * gpus
            self._group = [SHARD_WORKER.options(**options).remote() for _ in range(count)]
            self._wait([member.ready.remote() for member in self._group])
            address = ray.get(self._group[0].address.remote())
            self._wait(
                [
                    actor.join.remote(address, Member(rank, count), self.config.device)
                    for rank, actor in enumerate(self._group)
                ]
            )
        return self._group

    def _wait(self, references: list[Any]) -> None:
        """Wait for all, and for a stop."""
        since = time.monotonic()
        while references:
            arrived, references = ray.wait(references, timeout=SECONDS_BETWEEN_LOOKS)
            ray.get(arrived)
            self.stop.check()
            if time.monotonic() - since > SECONDS_TO_WAIT_FOR_A_WORKER:
                note_once(WAITING)

    def _end_group(self) -> None:
        if self._group:
            self.release()

    def _started(self) -> list[Any]:
        if not self._actors:
            self._actors = [self._new_actor() for _ in range(self.workers)]
        return self._actors

    def _new_actor(self) -> Any:
        gpus = self.config.launch.gpus_per_worker if self._use_gpu else 0
        retries = self.config.launch.max_retries
        return SHARD_WORKER.options(num_gpus=gpus, num_cpus=1, max_restarts=retries).remote()

    def _has_started(self, reference: Any, actor: Any) -> bool:
        """Whether the process of an actor runs; False if it ran before and Ray gave it up.

        Raises:
            WorkerError: it has never run.
        """
        try:
            ray.get(reference)
        except ray.exceptions.RayActorError as error:
            if actor not in self._ready:
                raise WorkerError(
                    f"a worker did not start (launch.max_retries: "
                    f"{self.config.launch.max_retries}); every machine of the cluster needs the "
                    f"environment of tpaw. {for_terminal(str(error))}"
                ) from error
            return False
        self._ready.add(actor)
        return True

    def _replaced(self, actor: Any) -> Any:
        """A new actor in place of one that died as often as it may."""
        self._ready.discard(actor)
        place = self._actors.index(actor)
        self._actors[place] = self._new_actor()
        return self._actors[place]

    def _raise_failure(self) -> Failure | None:
        """Raise an error that trying again would not help; return another one."""
        failure: Failure | None = ray.get(self._link.failure.remote())
        if failure is not None and failure.error is not None:
            self.stop.check()
            raise failure.as_error()
        return failure

    def _given(self, actor: Any, task: Any, work: Work) -> Any:
        return actor.do.remote(self._place, self._link, task, work)

    def _look(self) -> dict[str, int]:
        """What is done of each piece of work. Lines that workers have for the user are printed."""
        counts, notes = ray.get(self._link.take.remote())
        for text in notes:
            note_once(text)
        return dict(counts)

    def _once_more(self, title: str, work: Work, why: str) -> Work:
        limit = self.config.launch.max_retries
        if work.tries >= limit:
            raise WorkerError(
                f"{title}: its worker died {work.tries + 1} times (launch.max_retries: {limit}): "
                f"{for_terminal(why)}"
            )
        note(f"{title}: its worker died; another one does it again.")
        return work._replace(tries=work.tries + 1)
