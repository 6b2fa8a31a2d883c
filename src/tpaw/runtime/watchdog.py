"""Run a command in a process group, and end the group when whoever started it is gone.

    python -I watchdog.py PARENT SECONDS COMMAND...

It runs as a script of its own, with the standard library alone. `process_group.py` starts it. A
process that is killed with SIGKILL cannot end its children, so a process of this script does it: it
is in a session of its own, which Ctrl-C and a kill of the parent's process group do not reach.

The script copies itself. The copy runs the command, and the original waits for the copy and passes
signals on. Ray kills the children of a worker that it kills, and so the original, but not the copy.

- Standard input is a pipe from the parent. It is closed when the parent ends or asks for the end.
- Standard output gets one line: the id of the process group, or why the command cannot start.
- Standard error gets what the command prints.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time

SECONDS_BETWEEN_LOOKS = 0.1
# Even SIGKILL waits for a process that the kernel holds, in a file system that is gone for example.
SECONDS_TO_KILL = 10.0
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PR_SET_CHILD_SUBREAPER = 36


class Group:
    """A command, and the process group that it leads.

    Args:
        command: program and arguments.

    Attributes:
        exit_code: of the command, 128 plus the signal that killed it; None while it runs.
    """

    def __init__(self, command: list[str]) -> None:
        self.exit_code: int | None = None
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=sys.stderr, process_group=0
        )
        self.id = self._process.pid

    def is_there(self) -> bool:
        """Whether some process of the group has not ended."""
        # Processes that have ended stay in the group until somebody collects them.
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    break
                if pid == self.id:
                    code = os.waitstatus_to_exitcode(status)
                    self.exit_code = code if code >= 0 else 128 - code
        return self._signal(0)

    def end(self, grace: float) -> None:
        """End every process: by SIGTERM, and after `grace` seconds by SIGKILL."""
        for number, seconds in ((signal.SIGTERM, grace), (signal.SIGKILL, SECONDS_TO_KILL)):
            deadline = time.monotonic() + seconds
            self._signal(number)
            while self.is_there() and time.monotonic() < deadline:
                time.sleep(0.01)

    def _signal(self, number: int) -> bool:
        try:
            os.killpg(self.id, number)
        except (ProcessLookupError, PermissionError):  # macOS says the latter of ended processes
            return False
        return True


def main() -> int:
    """Run the command until it ends, or until the parent is gone. Return its exit code."""
    parent, grace, *command = sys.argv[1:]
    original = os.getpid()
    if copy := os.fork():
        return _waited_for(copy, int(parent))
    asked_to_end: list[int] = []
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: asked_to_end.append(number))
    _adopt_orphans()
    try:
        group = Group(command)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", flush=True)
        return 127
    try:
        print(group.id, flush=True)
        while group.is_there() and group.exit_code is None and os.getppid() == original:
            # A fork of the parent may hold the pipe open, so its end alone does not suffice.
            if select.select([sys.stdin], [], [], SECONDS_BETWEEN_LOOKS)[0] or asked_to_end:
                break
    except OSError:  # nobody reads the line
        pass
    finally:
        code = group.exit_code
        group.end(float(grace))
    return 0 if code is None else code


def _waited_for(copy: int, parent: int) -> int:
    """Wait for the copy, pass signals on to it, and end it when the parent is gone.

    Returns:
        Its exit code.
    """
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: os.kill(copy, number))
    while not (ended := os.waitpid(copy, os.WNOHANG))[0]:
        if os.getppid() != parent:
            os.kill(copy, signal.SIGTERM)
        time.sleep(SECONDS_BETWEEN_LOOKS / 2)
    code = os.waitstatus_to_exitcode(ended[1])
    if code < 0:  # `process_group.py` ends what a killed watchdog leaves
        os.kill(os.getpid(), signal.SIGKILL)
    return code


def _adopt_orphans() -> None:
    """Collect what children leave behind, where the kernel can (Linux).

    In a container, process 1 often collects nothing, and a group would never become empty.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main())
