"""A command in a process group of its own that never outlives this process."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tpaw.errors import InputError, printable
from tpaw.runtime import watchdog

# Seconds between SIGTERM and SIGKILL.
GRACE = 15.0
# What the watchdog may take itself, on a machine with much to do.
SECONDS_OF_WATCHDOG = 10.0


class ProcessGroup:
    """A command that runs beside this process, with all processes that it starts.

    All of them end when `stop` is called, and also when this process is killed with SIGKILL: a
    second process watches this one (`watchdog.py`). A process that leaves its process group, as a
    daemon does, is not ended.

    Args:
        command: program and arguments.
        log: file for what the command prints.
        setting: the setting that holds the command, for messages.

    Raises:
        InputError: the program cannot be started.
    """

    def __init__(self, command: Sequence[str], log: Path, setting: str) -> None:
        with log.open("wb") as output:
            self._watchdog = subprocess.Popen(
                [sys.executable, "-I", watchdog.__file__, str(os.getpid()), str(GRACE), *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                start_new_session=True,
            )
        assert self._watchdog.stdout is not None
        with self._watchdog.stdout as told:
            line = told.readline().decode(errors="replace").strip()
        self._group = int(line) if line.isdigit() else None
        if self._group is None:
            self.stop()
            raise InputError(f"{setting}: {printable(line)}; it cannot be started")

    @property
    def exit_code(self) -> int | None:
        """Exit code of the command; None while it runs. 128 plus the signal that killed it."""
        return self._watchdog.poll()

    def stop(self) -> None:
        """End the command and everything that it started. It returns when they are gone."""
        assert self._watchdog.stdin is not None
        with contextlib.suppress(OSError):
            self._watchdog.stdin.close()
        self._watchdog.terminate()  # a fork of this process may hold the pipe open
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._watchdog.wait(GRACE + watchdog.SECONDS_TO_KILL + SECONDS_OF_WATCHDOG)
        self._watchdog.kill()
        self._watchdog.wait()
        # Only a watchdog that was killed leaves processes; else the number may be another group's.
        if self._group is not None and self._watchdog.returncode < 0:
            deadline = time.monotonic() + watchdog.SECONDS_TO_KILL
            # macOS answers PermissionError for a group whose processes have all ended.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                while time.monotonic() < deadline:
                    os.killpg(self._group, signal.SIGKILL)
                    time.sleep(0.01)
