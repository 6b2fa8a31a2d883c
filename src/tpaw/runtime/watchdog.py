"""Run a command in a process group, and end the group when whoever started it is gone.

    python -I watchdog.py PARENT SECONDS COMMAND...

It runs as a script of its own, with the standard library alone. `process_group.py` starts it. A
process that is killed with SIGKILL cannot end its children, so this process does it: it is in a
session of its own, which Ctrl-C and a kill of the parent's process group do not reach.

- Standard input is a pipe from the parent. It is closed when the parent ends or asks for the end.
- Standard output gets one line: the id of the process group, or why the command cannot start.
- Standard error gets what the command prints.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time

SECONDS_BETWEEN_LOOKS = 0.2


class _AskedToEnd(Exception):
    """SIGTERM, SIGINT or SIGHUP has arrived."""


def main() -> int:
    """Run the command until it ends, or until the parent is gone. Return its exit code."""
    parent, grace, *command = sys.argv[1:]
    try:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=sys.stderr, process_group=0
        )
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", flush=True)
        return 127
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _raise)
    try:
        print(child.pid, flush=True)
        while child.poll() is None and os.getppid() == int(parent):
            # A fork of the parent may hold the pipe open, so its end alone does not suffice.
            if select.select([sys.stdin], [], [], SECONDS_BETWEEN_LOOKS)[0]:
                break
    except (_AskedToEnd, OSError):
        pass
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    code = child.poll()
    _end(child, float(grace))
    return 0 if code is None else code if code >= 0 else 128 - code


def _raise(number: int, frame: object) -> None:
    raise _AskedToEnd


def _end(child: subprocess.Popen[bytes], grace: float) -> None:
    """End every process of the group: by SIGTERM, and after `grace` seconds by SIGKILL."""
    deadline = time.monotonic() + grace
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        while _is_there(child) and (number == signal.SIGKILL or time.monotonic() < deadline):
            time.sleep(0.02)


def _is_there(child: subprocess.Popen[bytes]) -> bool:
    child.poll()  # otherwise its remains would stay in the group
    try:
        os.killpg(child.pid, 0)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
