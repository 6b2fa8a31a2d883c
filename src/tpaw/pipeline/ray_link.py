"""What the controller and the workers of the Ray engine say to each other.

`Link` is a small actor beside the controller. Workers tell it their progress, and it tells them to
stop. This module is imported in its process, so it imports no torch.
"""

from __future__ import annotations

import os
import socket
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import ray
import ray.exceptions

from tpaw.config.schema import RunConfig
from tpaw.errors import InputError, Interrupted, StorageError, TpawError, WorkerError
from tpaw.storage.failures import storage_failure
from tpaw.storage.run_directory import RunDirectory

SECONDS_BETWEEN_LOOKS = 0.2
SECONDS_BETWEEN_REPORTS = 0.2
# A network file system may show a new file late.
SECONDS_TO_SEE_THE_LOCK = 5.0


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
        lock: content of the run's lock file, which names the controller.
        folder: working directory of the controller, which relative paths refer to.
        threads: threads of a worker on a CPU; None leaves torch's choice.
    """

    config: RunConfig
    root: str
    lock: str
    folder: str
    threads: int | None

    def enter(self) -> RunDirectory:
        """Go there.

        Raises:
            InputError: this machine does not see the run directory.
        """
        run, host = RunDirectory(self.root), socket.gethostname()
        deadline = time.monotonic() + SECONDS_TO_SEE_THE_LOCK
        while not self._is_shared(run):
            if time.monotonic() > deadline:
                raise InputError(
                    f"--output {self.root}: the machine {host} does not see this run directory; "
                    "put it on a file system that every machine of the cluster shares"
                )
            time.sleep(SECONDS_BETWEEN_LOOKS)
        if not Path(self.folder).is_dir():
            raise InputError(
                f"the machine {host} does not see {self.folder}, from which tpaw was started; "
                "start it from a folder on a file system that every machine of the cluster shares"
            )
        os.chdir(self.folder)
        if self.threads is not None:
            import torch

            torch.set_num_threads(self.threads)
        return run

    def _is_shared(self, run: RunDirectory) -> bool:
        try:
            return run.lock_file.read_text(encoding="utf-8") == self.lock
        except OSError:
            return False


class Failure(NamedTuple):
    """An error of a worker.

    Attributes:
        error: the error, if a user can act on it.
        text: its message or its traceback, and where it happened.
    """

    error: TpawError | None
    text: str

    @classmethod
    def of(cls, error: BaseException, work: str, root: str) -> Failure:
        """The error that this process is handling, at `work` in the run directory `root`."""
        where = f"{work}, on the machine {socket.gethostname()}"
        if not isinstance(error, TpawError) and (reason := storage_failure(error, root)):
            error = StorageError(f"{reason}; what is published is kept")
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

    def report(self, work: str, count: int) -> int:
        """Say how much of a piece of work is done, in all; return what `stop_number` does."""
        self._counts[work] = count
        return self._stop

    def note(self, text: str) -> None:
        """Keep a line for the user."""
        self._notes.append(text)

    def fail(self, failure: Failure) -> None:
        """Keep an error of a group that trains: the first that a user can act on, or the last."""
        if self._failure is None or self._failure.error is None:
            self._failure = failure

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


class Reporter:
    """An `OnDone` that tells the link, a few times a second, and hears of a stop.

    Raises:
        Interrupted: the work is no longer wanted.
    """

    def __init__(self, link: Any, work: str) -> None:
        self.link = link
        self.work = work
        self.done = 0
        self._told = time.monotonic()
        self._answer: Any = None

    def __call__(self, count: int) -> None:
        """Add to the amount of work that is done."""
        self.done += count
        now = time.monotonic()
        if now - self._told > SECONDS_BETWEEN_REPORTS:
            self._told = now
            # The answer to the report before has arrived by now, so nobody waits for it.
            if self._answer is not None and (number := ray.get(self._answer)):
                raise Interrupted(number)
            self._answer = self.link.report.remote(self.work, self.done)


LINK: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Link)
