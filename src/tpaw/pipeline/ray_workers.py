"""The workers' side of the Ray engine: actors that do shards, and processes that train together.

`Link` is a small actor beside the controller. Workers tell it their progress, and it tells them to
stop.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import ray
import ray.exceptions

from tpaw.config.schema import RunConfig
from tpaw.data.inputs import load_inputs
from tpaw.errors import InputError, TpawError, WorkerError
from tpaw.models.tokenizers import load_tokenizer
from tpaw.pipeline.players import LoadedPlayers
from tpaw.pipeline.published import Published
from tpaw.pipeline.training import TrainingData, TrainingJob, train_and_publish
from tpaw.pipeline.worker import Worker
from tpaw.runtime.interrupt import StopSignal
from tpaw.runtime.isolation import isolated
from tpaw.runtime.progress import notes_go_to
from tpaw.runtime.shards import Do
from tpaw.storage.run_directory import RunDirectory

SECONDS_BETWEEN_LOOKS = 0.2
SECONDS_BETWEEN_REPORTS = 0.2


class Work(NamedTuple):
    """A shard that is given to a worker.

    Attributes:
        number: place of the shard in the stage.
        shard: the shard.
        tries: how many workers died at it.
    """

    number: int
    shard: Any
    tries: int = 0

    @property
    def key(self) -> str:
        """Names this attempt, for its progress."""
        return f"{self.number}.{self.tries}"


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


class Link:
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


class ShardWorker:
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

    def do(self, task: Any, work: Work) -> Any:
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


def run_group(
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
LINK: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Link)
SHARD_WORKER: Any = ray.remote(max_restarts=-1, max_task_retries=0)(ShardWorker)
GROUP: Any = ray.remote(num_cpus=0)(run_group)
