"""The engine that computes on many devices and machines. Ray places, restarts and connects.

The run directory says what is done, so this module keeps no state of its own: a worker delivers its
shard into the run directory, and this process, which holds the run's lock, publishes it. Whatever
dies, the same command goes on. Only this module imports ray.

- Shards are done by actors. An actor keeps the player that it loaded. Ray restarts an actor that
  died; its shard goes to the next actor that is free.
- Training is Ray Train's `TorchTrainer` around `train_and_publish`. Ray Train restarts the group
  when a process died, and training goes on from the last saved step.
- `_Link` is a small actor beside this process. Workers tell it their progress, and it tells them to
  stop.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tpaw.config.schema import LaunchConfig, RunConfig
from tpaw.data.inputs import load_inputs
from tpaw.errors import InputError, TpawError, WorkerError, first_line, printable
from tpaw.models.tokenizers import load_tokenizer
from tpaw.pipeline.players import LoadedPlayers
from tpaw.pipeline.published import Published
from tpaw.pipeline.training import TrainingData, TrainingJob, train_and_publish
from tpaw.pipeline.worker import Worker
from tpaw.runtime.interrupt import StopSignal
from tpaw.runtime.isolation import isolated
from tpaw.runtime.progress import Advance, OnDone, note, note_once, notes_go_to
from tpaw.runtime.shards import Do, Result, Shard, ShardTask
from tpaw.storage.artifacts import TEMPORARY_PREFIX
from tpaw.storage.run_directory import RunDirectory
from tpaw.training.triples import Triple

SECONDS_BETWEEN_LOOKS = 0.2
SECONDS_BETWEEN_REPORTS = 0.2
SECONDS_TO_WAIT_FOR_A_WORKER = 60.0


class Place(NamedTuple):
    """Where a worker finds the run: paths that every machine must share.

    Attributes:
        config: the configuration of the run.
        root: absolute path of the run directory.
        folder: working directory of the controller, which relative paths refer to.
        threads: threads of a worker on a CPU; None leaves torch's choice.
    """

    config: RunConfig
    root: str
    folder: str
    threads: int | None

    def enter(self) -> RunDirectory:
        """Go there.

        Raises:
            InputError: this machine does not see the run directory.
        """
        run = RunDirectory(self.root)
        if not run.has_begun() or not Path(self.folder).is_dir():
            raise InputError(
                f"--output {self.root}: the machine {socket.gethostname()} does not see this run "
                "directory; put it on a file system that every machine of the cluster shares"
            )
        os.chdir(self.folder)
        if self.threads is not None:
            import torch

            torch.set_num_threads(self.threads)
        return run


class Failure(NamedTuple):
    """An error of a worker.

    Attributes:
        error: the error, if a user can act on it.
        text: its message or its traceback, and where it happened.
    """

    error: TpawError | None
    text: str

    @classmethod
    def of(cls, error: BaseException, work: str) -> Failure:
        """The error that this process is handling, at `work`."""
        where = f"{work}, on the machine {socket.gethostname()}"
        if isinstance(error, TpawError):
            return cls(error, f"{error} ({where})")
        return cls(None, f"{where}:\n{traceback.format_exc().rstrip()}")

    def as_error(self) -> Exception:
        """The error to raise in the controller, of the same type where a user can act on it."""
        if self.error is None:
            return WorkerError(f"a worker failed at {self.text}")
        found = type(self.error).__new__(type(self.error))
        found.args = (self.text,)
        found.__dict__.update(self.error.__dict__)
        return found


class _Link:
    """Carries progress from the workers to the controller, and the stop to the workers."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._notes: list[str] = []
        self._failure: Failure | None = None
        self._stop = 0

    def report(self, work: str, count: int) -> None:
        """Say how much of a piece of work is done, in all."""
        self._counts[work] = count

    def note(self, text: str) -> None:
        """Keep a line for the user."""
        self._notes.append(text)

    def fail(self, failure: Failure) -> None:
        """Keep the first error of a group that trains."""
        self._failure = self._failure or failure

    def failure(self) -> Failure | None:
        """The error that the group failed with."""
        return self._failure

    def stop(self, number: int) -> None:
        """Ask for a stop."""
        self._stop = number

    def stop_number(self) -> int:
        """Number of the signal that asked for a stop; 0 if there was none."""
        return self._stop

    def take(self) -> tuple[dict[str, int], list[str]]:
        """What is done of each piece of work, and the lines since the last call."""
        notes, self._notes = self._notes, []
        return dict(self._counts), notes

    def begin(self) -> None:
        """Forget the stage before."""
        self._counts, self._failure, self._stop = {}, None, 0


class _Reporter:
    """An `OnDone` that tells the link, a few times a second."""

    def __init__(self, link: Any, work: str) -> None:
        self.link = link
        self.work = work
        self.done = 0
        self._told = time.monotonic()

    def __call__(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self._told > SECONDS_BETWEEN_REPORTS:
            self._told = now
            self.link.report.remote(self.work, self.done)


class _RayWorker:
    """Does shards. It keeps the player that it loaded, and what its last task has opened."""

    def __init__(self) -> None:
        self._worker: Worker | None = None
        self._task: Any = None
        self._opened = contextlib.ExitStack()
        self._do: Do[Any, Any] | None = None

    def begin(self, place: Place, link: Any) -> None:
        """Begin, or begin anew after Ray has restarted this process."""
        self._place = place
        self._link = link

    def do(self, task: Any, work: _Work) -> Any:
        """Do a shard. Return its result and the amount of work, or the failure as a whole."""
        notes_go_to(lambda text: self._link.note.remote(text))
        reporter = _Reporter(self._link, work.key)
        try:
            with isolated(deterministic=self._place.config.deterministic):
                return self._opened_for(task)(work.shard, reporter), reporter.done
        except Exception as error:
            self._close()
            return Failure.of(error, task.title(work.shard))

    def _opened_for(self, task: Any) -> Do[Any, Any]:
        if self._worker is None:
            run, config = self._place.enter(), self._place.config
            tokenizer = load_tokenizer(config.model, str(run.inputs / "tokenizer"))
            self._worker = Worker(config, run, tokenizer)
        if self._do is None or task != self._task:
            self._close()
            self._task = task
            self._do = self._opened.enter_context(task.opened(self._worker))
        return self._do

    def _close(self) -> None:
        self._do = self._task = None
        self._opened.close()


class _RemoteStop(StopSignal):
    """The stop signal of a process that trains: the controller's, as the link tells it."""

    def __init__(self, link: Any) -> None:
        super().__init__()
        self._link = link
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while self.signal_number is None:
            time.sleep(SECONDS_BETWEEN_LOOKS)
            with contextlib.suppress(ray.exceptions.RayError):
                self.signal_number = ray.get(self._link.stop_number.remote()) or None


def _train_in_group(settings: dict[str, Any]) -> None:
    """One process of a group that trains; Ray Train calls it."""
    import torch
    from ray.train import get_context
    from ray.train.torch import get_device

    place: Place = settings["place"]
    job: TrainingJob = settings["job"]
    link: Any = settings["link"]
    if ray.get(link.failure.remote()) is not None:
        return  # an error, and not the death of a process: trying again would not help
    rank = get_context().get_world_rank()
    done = 0

    def advance(count: int, note: str = "") -> None:
        nonlocal done
        done += count
        if rank == 0:
            link.report.remote("training", done)

    notes_go_to(lambda text: link.note.remote(text))
    try:
        run = place.enter()
        if (device := get_device()).type == "cuda":
            torch.cuda.set_device(device)
        data = TrainingData(place.config, load_inputs(run.inputs, place.config), Published(run))
        with isolated(deterministic=place.config.deterministic):
            train_and_publish(job, data, LoadedPlayers(place.config), advance, _RemoteStop(link))
    except Exception as error:
        ray.get(link.fail.remote(Failure.of(error, f"training, process {rank}")))
        raise


def _run_group(
    settings: dict[str, Any], workers: int, use_gpu: bool, retries: int, folder: str
) -> None:
    """Run the group. It is a task, so that the controller stays free to look and to stop."""
    from ray.train import FailureConfig, ScalingConfig
    from ray.train import RunConfig as TrainRunConfig
    from ray.train.torch import TorchTrainer

    TorchTrainer(
        _train_in_group,
        train_loop_config=settings,
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu),
        run_config=TrainRunConfig(
            storage_path=folder, failure_config=FailureConfig(max_failures=retries)
        ),
    ).fit()


# Actors and tasks of Ray.
_LINK: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Link)
_WORKER: Any = ray.remote(max_restarts=-1, max_task_retries=0)(_RayWorker)
_GROUP: Any = ray.remote(num_cpus=0)(_run_group)


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
        self._place = Place(config, str(run.root.absolute()), os.getcwd(), threads)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        self._here = {"scheduling_strategy": here}
        self._link = _LINK.options(**self._here).remote()
        self._actors: list[Any] = []

    def do(
        self, task: ShardTask[Worker, Shard, Result], shards: Iterable[Shard], on_done: OnDone
    ) -> Iterator[Result]:
        """See `Engine`.

        Raises:
            TpawError: an error of a worker. Its message names the shard and the machine.
        """
        todo = enumerate(shards)
        if (first := next(todo, None)) is None:
            return
        ray.get(self._link.begin.remote())
        waiting = deque([_Work(*first)])
        starting = {self._begun(actor): actor for actor in self._started()}
        idle: list[Any] = []
        running: dict[Any, tuple[Any, _Work]] = {}
        finished = shown = 0
        since = time.monotonic()
        while True:
            while idle and (waiting or (following := next(todo, None)) is not None):
                work = waiting.popleft() if waiting else _Work(*following)  # type: ignore[misc]
                actor = idle.pop()
                running[actor.do.remote(task, work)] = actor, work
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
                    if _has_started(reference):
                        idle.append(actor)
                    else:
                        starting[self._begun(actor)] = actor
                    continue
                actor, work = running.pop(reference)
                try:
                    answer = ray.get(reference)
                except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
                    waiting.append(self._once_more(task.title(work.shard), work, error))
                    starting[self._begun(actor)] = actor  # Ray restarts it
                    continue
                idle.append(actor)
                if isinstance(answer, Failure):
                    raise answer.as_error()
                result, amount = answer
                finished += amount
                yield result
            if running or idle:
                since = time.monotonic()
            elif time.monotonic() - since > SECONDS_TO_WAIT_FOR_A_WORKER:
                note_once("Waiting for a worker: the cluster has no free device for one.")

    def train(
        self,
        job: TrainingJob,
        triples: Sequence[Triple] | None,
        progress: AbstractContextManager[Advance],
    ) -> None:
        """See `Engine`. A stop reaches the processes, which save the step."""
        self.stop.check()
        self.release()  # training needs the devices
        ray.get(self._link.begin.remote())
        folder = Path(self._place.root) / f"{TEMPORARY_PREFIX}ray-train"
        settings = {"place": self._place, "job": job, "link": self._link}
        gpus = self.config.launch.gpus_per_worker if self._use_gpu else 1
        fit = _GROUP.options(**self._here).remote(
            settings,
            self.workers * gpus,
            self._use_gpu,
            self.config.launch.max_retries,
            str(folder),
        )
        shown, has_told = 0, False
        try:
            with progress as advance:
                while not ray.wait([fit], timeout=SECONDS_BETWEEN_LOOKS)[0]:
                    counts = self._look()
                    advance(max(counts.get("training", 0) - shown, 0))
                    shown = max(shown, counts.get("training", 0))
                    if self.stop.signal_number is not None and not has_told:
                        ray.get(self._link.stop.remote(self.stop.signal_number))
                        has_told = True
                self._look()
                if (failure := ray.get(self._link.failure.remote())) is not None:
                    self.stop.check()
                    raise failure.as_error()
                try:
                    ray.get(fit)
                except ray.exceptions.RayError as error:
                    raise WorkerError(
                        f"training of θ_{job.t + 1} failed {self.config.launch.max_retries + 1} "
                        f"times: {printable(first_line(error))}; the saved steps are kept, so run "
                        "the same command again"
                    ) from error
                advance(max(job.steps - shown, 0))
        finally:
            ray.cancel(fit, force=True)
            shutil.rmtree(folder, ignore_errors=True)

    def release(self) -> None:
        """End the actors, which frees their devices."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []

    def _started(self) -> list[Any]:
        if not self._actors:
            gpus = self.config.launch.gpus_per_worker if self._use_gpu else 0
            options = {"num_gpus": gpus, "num_cpus": 1}
            self._actors = [_WORKER.options(**options).remote() for _ in range(self.workers)]
        return self._actors

    def _begun(self, actor: Any) -> Any:
        return actor.begin.remote(self._place, self._link)

    def _look(self) -> dict[str, int]:
        """What is done of each piece of work. Lines that workers have for the user are printed."""
        counts, notes = ray.get(self._link.take.remote())
        for text in notes:
            note_once(text)
        return dict(counts)

    def _once_more(self, title: str, work: _Work, error: Exception) -> _Work:
        limit = self.config.launch.max_retries
        if work.tries >= limit:
            raise WorkerError(
                f"{title}: its worker died {work.tries + 1} times (launch.max_retries: {limit}): "
                f"{printable(first_line(error))}; published shards are kept"
            ) from error
        note(f"{title}: its worker died; another one does it again.")
        return work._replace(tries=work.tries + 1)


class _Work(NamedTuple):
    number: int
    shard: Any
    tries: int = 0

    @property
    def key(self) -> str:
        return f"{self.number}.{self.tries}"


def _has_started(reference: Any) -> bool:
    try:
        ray.get(reference)
    except ray.exceptions.RayActorError:
        return False
    return True


def worker_count(config: RunConfig) -> int:
    """How many workers the cluster has room for, or as many as are asked for.

    Raises:
        InputError: there is no room for so many.
    """
    launch, there = config.launch, ray.cluster_resources()
    gpus = int(there.get("GPU", 0))
    if config.device == "cuda" and not gpus:
        raise InputError("device: cuda: the Ray cluster has no GPU; set device to auto or cpu")
    use_gpu = bool(gpus) and config.device != "cpu"
    room = gpus // launch.gpus_per_worker if use_gpu else int(there.get("CPU", 0))
    kind = f"{gpus} GPUs" if use_gpu else f"{room} CPU cores"
    wanted = room if launch.workers == "all" else launch.workers
    if not 1 <= wanted <= room:
        each = f"launch.gpus_per_worker: {launch.gpus_per_worker}" if use_gpu else "one"
        raise InputError(
            f"launch.workers: {launch.workers}: the Ray cluster has {kind}; each worker needs "
            f"{each}"
        )
    processes = wanted * (launch.gpus_per_worker if use_gpu else 1)
    if config.train.batch_size % processes:
        raise InputError(
            f"train.batch_size: {config.train.batch_size}: must be a multiple of the {processes} "
            "processes that train together; change it, or launch.workers"
        )
    return wanted


@contextlib.contextmanager
def connected(launch: LaunchConfig) -> Iterator[None]:
    """Join the Ray cluster, or start one on this machine for the time of the context.

    A program that is connected already stays connected to its cluster.

    Raises:
        InputError: there is no cluster at the address.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent to anybody
    try:
        with _signals_kept():
            ray.init(
                address=launch.address or "local",
                include_dashboard=None if launch.address else False,
                log_to_driver=False,
                logging_level="ERROR",
            )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(
            f"launch.address: {launch.address}: no Ray cluster answers there "
            f"({printable(first_line(error))}); start one by `ray start --head`, or remove the "
            "setting to use this machine alone"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray replaces the handler of SIGTERM, which stops a run at its next safe point."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in kept.items():
                signal.signal(number, handler)
