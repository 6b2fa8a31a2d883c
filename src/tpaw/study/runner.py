"""Runs a study: every run in a process of its own, several at once, resumed where they stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from tpaw.config.schema import RunConfig
from tpaw.errors import ArtifactError, RunLockedError
from tpaw.evaluation.benchmarks.run import missing_suites
from tpaw.runtime.interrupt import StopSignal
from tpaw.runtime.progress import note, progress
from tpaw.storage.artifacts import read_facts
from tpaw.storage.lock import locked
from tpaw.storage.run_directory import RunDirectory, check_output, needs_trust
from tpaw.study.config import Condition
from tpaw.study.sharing import begin_run, begin_shared, is_prepared, shared_name

SECONDS_BETWEEN_LOOKS = 0.5


class StudyRun(NamedTuple):
    """One run of a study."""

    condition: Condition
    seed: int
    config: RunConfig
    folder: Path

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.condition.name}, seed {self.seed}"

    def iterations_done(self) -> int:
        """How many iterations are published, evaluated and summed up."""
        try:
            return int(read_facts(RunDirectory(self.folder).summary_file)["iterations_done"])
        except (ArtifactError, TypeError, ValueError):  # the run writes it again
            return 0

    def is_done(self) -> bool:
        """Whether all of them are, and every checkpoint is evaluated on every suite."""
        if self.iterations_done() < self.config.iterations:
            return False
        run, suites = RunDirectory(self.folder), self.config.evaluate.suites
        return not any(missing_suites(run, i, suites) for i in range(self.config.iterations + 1))


def runs_of(conditions: Sequence[Condition], seeds: Sequence[int], output: Path) -> list[StudyRun]:
    """Every run, seed by seed, so that all conditions have come as far when one looks."""
    return [
        StudyRun(c, seed, c.config(seed), output / "runs" / c.folder / f"seed-{seed}")
        for seed in seeds
        for c in conditions
    ]


class Process(Protocol):
    """What the study needs of a process that it has started."""

    def poll(self) -> int | None:
        """The exit code; None while the process runs."""

    def wait(self) -> int:
        """The exit code, once there is one."""

    def send_signal(self, sig: int, /) -> None:
        """Send a signal to a process that still runs."""


class Launch(Protocol):
    """Starts `tpaw ARGUMENTS` with so many threads; what it prints goes to the end of the log."""

    def __call__(self, *arguments: str, log: Path, threads: int) -> Process:
        """Start it and do not wait."""


def launch_process(*arguments: str, log: Path, threads: int) -> Process:
    """Start `tpaw ARGUMENTS` in a process of its own."""
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "tpaw", *arguments],
            stdout=file,
            stderr=file,
            stdin=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)},
            start_new_session=True,  # Ctrl-C reaches it from here alone, and once
        )


def run_study(
    runs: Sequence[StudyRun],
    output: Path,
    jobs: int,
    stop: StopSignal,
    launch: Launch = launch_process,
) -> dict[str, str]:
    """Do what is not done yet.

    Args:
        jobs: processes at a time; see `threads_of`.
        launch: starts one of them.

    Returns:
        Name of each run that failed, and the last line that it said. The others went on.

    Raises:
        InputError: a run lies there, finished or not, that had another configuration.
        RunLockedError: another process works on the study.
        Interrupted: a stop was asked for; every run has stopped at a safe point.
    """
    for run in runs:
        check_output(run.folder, run.config)
    output.mkdir(parents=True, exist_ok=True)
    todo = [run for run in runs if not run.is_done()]
    with (
        locked(output / "lock"),
        progress("runs", sum(run.config.iterations for run in runs), "iterations") as advance,
    ):
        shown = 0

        def look() -> None:
            nonlocal shown
            stop.check()
            done = sum(run.iterations_done() for run in runs)
            advance(done - shown)
            shown = done

        pool = Pool(jobs, output / "logs", look, launch)
        try:
            shared = _prepare(todo, output / "shared", pool)
            return shared | _run(todo, output / "shared", pool)
        except BaseException:
            pool.stop()
            raise


def _prepare(todo: Sequence[StudyRun], folder: Path, pool: Pool) -> dict[str, str]:
    """What runs share, for those that have not begun."""
    configs: dict[str, RunConfig] = {}
    for run in todo:
        if RunDirectory(run.folder).iterations_begun() == 0:
            name = shared_name(run.config)
            # Only self-play has answers and log-probs to share.
            if name not in configs or configs[name].method != "self_play":
                configs[name] = run.config
    waiting = deque(name for name in configs if not is_prepared(folder / name))

    def begin(name: str) -> list[str]:
        begin_shared(configs[name], folder / name)
        return _command("prepare", folder / name, configs[name])

    return pool.work(waiting, begin)


def _run(todo: Sequence[StudyRun], shared: Path, pool: Pool) -> dict[str, str]:
    runs = {run.name: run for run in todo}

    def begin(name: str) -> list[str]:
        run = runs[name]
        begin_run(run.config, run.folder, shared / shared_name(run.config), name)
        return _command("run", run.folder, run.config)

    return pool.work(deque(runs), begin)


def _command(name: str, folder: Path, config: RunConfig) -> list[str]:
    # The study's file is the user's own, so what it allows is allowed in its run directories.
    trust = ["--trust"] if needs_trust(config) or config.evaluate.suites else []
    return [name, str(folder), *trust]


def cores() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads_of(jobs: int) -> int:
    """Threads of each process: OMP_NUM_THREADS if it is set, or its part of the cores.

    A user sets it where other work uses the cores: threads that wait for each other there are many
    times as slow as one.
    """
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdecimal() and int(wanted) > 0:
        return int(wanted)
    return max(1, cores() // jobs)


class Pool:
    """Processes of the command line, so many at a time.

    Args:
        jobs: how many.
        logs: folder of what they print.
        look: called again and again. It may raise to stop the work.
        launch: starts a process.
    """

    def __init__(self, jobs: int, logs: Path, look: Callable[[], None], launch: Launch) -> None:
        self.jobs = jobs
        self.logs = logs
        self.look = look
        self.launch = launch
        self.running: dict[str, Process] = {}
        logs.mkdir(parents=True, exist_ok=True)

    def work(self, waiting: deque[str], begin: Callable[[str], list[str]]) -> dict[str, str]:
        """Start `tpaw ARGUMENTS` for all that wait; returns the failures."""
        failures: dict[str, str] = {}
        held: set[str] = set()
        while waiting or self.running:
            self.look()
            for name, process in list(self.running.items()):
                code = process.poll()
                if code is not None:
                    del self.running[name]
                    if code != 0:
                        failures[name] = self._last_line(name) or f"exit {code}"
                        note(f"{name}: {failures[name]}")
            for _ in range(len(waiting)):
                if len(self.running) >= self.jobs:
                    break
                name = waiting.popleft()
                try:
                    arguments = begin(name)
                except RunLockedError as error:
                    # A run of a study that was killed lives on to its end.
                    if name not in held:
                        note(f"{name}: waiting: {error}")
                    held.add(name)
                    waiting.append(name)
                else:
                    self.running[name] = self.launch(
                        *arguments, log=self._log(name), threads=threads_of(self.jobs)
                    )
            time.sleep(SECONDS_BETWEEN_LOOKS)
        self.look()
        return failures

    def stop(self) -> None:
        """Ask all for a stop and wait until they have come to a safe point."""
        for process in self.running.values():
            process.send_signal(signal.SIGTERM)
        for process in self.running.values():
            process.wait()

    def _log(self, name: str) -> Path:
        safe = "".join(c if c.isalnum() or c in "=-+." else "-" for c in name)
        return self.logs / f"{safe}.log"

    def _last_line(self, name: str) -> str:
        text = self._log(name).read_text(encoding="utf-8", errors="replace")
        lines = [line for line in text.splitlines() if line.strip()]
        return "".join(c for c in lines[-1] if c.isprintable()) if lines else ""
