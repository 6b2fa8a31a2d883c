"""What `checks/fuzz.py` and `checks/faults` share: commands in forked processes, and their ends."""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import re
import resource
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from fork_server import PRELOADED, QUIET

# The libraries read these at import, so this module is imported before them.
os.environ |= QUIET | {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
}

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
MESSAGE = re.compile(r"^(tpaw: |Usage: |stopped; to resume, run: )", re.MULTILINE)
# Nine lists, `a` to `i`. Each holds the one before nine times, so `*i` stands for 9^9 values.
YAML_BOMB = "".join(
    f"{here}: &{here} [{', '.join([f'*{before}' if before else 'x'] * 9)}]\n"
    for before, here in zip(["", *"abcdefgh"], "abcdefghi", strict=True)
)


def preload(*more):
    """Import once what each command would import."""
    for name in (*PRELOADED, "pyarrow.parquet", "datasets", "jinja2", "lm_eval.tasks", *more):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def run_tpaw(*arguments):
    """Run a command in this process."""
    sys.argv = ["tpaw", *map(str, arguments)]
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from tpaw.cli.main import main

    main()


def limit_memory(size):
    """Let this process have this many bytes more than it has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size += pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def fault(code, text):
    """What is wrong with the end of a command: its exit code and all that it printed."""
    if "Traceback (most recent call last)" in text or "this is a bug" in text:
        return "traceback"
    if CONTROL.search(text):
        return "escape"
    if code > 0 and not MESSAGE.search(text):
        return "no message"
    return None


def forked(cases, jobs, start, limit=math.inf):
    """Start a process for each case, `jobs` at a time.

    Args:
        start: called in the new process with the case; it never returns.
        limit: seconds after which a process is killed.

    Yields:
        The case, the exit code, the seconds it took, and the CPU seconds, as each process ends.
    """
    waiting, running = list(reversed(cases)), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            case = waiting.pop()
            pid = os.fork()
            if pid == 0:
                start(case)
            running[pid] = case, time.monotonic()
        for pid, (case, began) in list(running.items()):
            done, status, usage = os.wait4(pid, os.WNOHANG)
            seconds = time.monotonic() - began
            if done:
                del running[pid]
                code = os.waitstatus_to_exitcode(status)
                yield case, code, seconds, usage.ru_utime + usage.ru_stime
            elif seconds > limit:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
