"""A command and everything that it starts end with this process, however it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from messages import refused

import tpaw.runtime.process_group
from tpaw.runtime.process_group import ProcessGroup

pytestmark = pytest.mark.process


def is_alive(pid):
    """Whether a process runs. One that has ended and is not collected does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def family(folder, *, stubborn=False):
    """A shell that starts a child and writes both process ids to a file."""
    trap = "trap '' TERM INT HUP;" if stubborn else ""
    return ["sh", "-c", f"{trap} sleep 600 & echo $$ $! > {folder}/pids; wait; sleep 600"]


def pids(folder):
    def read():
        with contextlib.suppress(FileNotFoundError):
            return [int(word) for word in (folder / "pids").read_text().split()]

    return wait_for(read)


@pytest.mark.parametrize("stubborn", [False, True])
def test_stop_ends_the_command_and_its_children(tmp_path, monkeypatch, stubborn):
    monkeypatch.setattr(tpaw.runtime.process_group, "GRACE", 0.3)
    group = ProcessGroup(family(tmp_path, stubborn=stubborn), tmp_path / "log", "key")
    found = pids(tmp_path)
    assert len(found) == 2
    assert all(map(is_alive, found))
    assert group.exit_code is None
    began = time.monotonic()
    group.stop()
    assert not any(map(is_alive, found))
    assert group.exit_code is not None
    # A command that ends when it is asked to is not waited for.
    assert (time.monotonic() - began > 0.25) == stubborn
    group.stop()  # twice is harmless


def test_what_a_command_leaves_behind_ends_with_it(tmp_path):
    script = f"sleep 600 & echo $! > {tmp_path}/pids; echo out; echo err >&2; exit 7"
    group = ProcessGroup(["sh", "-c", script], tmp_path / "log", "key")
    [child] = pids(tmp_path)
    assert wait_for(lambda: group.exit_code) == 7
    assert not is_alive(child)
    assert (tmp_path / "log").read_text() == "out\nerr\n"
    group.stop()


def test_a_command_that_was_killed_says_by_which_signal(tmp_path):
    group = ProcessGroup(["sh", "-c", "kill -9 $$"], tmp_path / "log", "key")
    assert wait_for(lambda: group.exit_code) == 128 + 9


def test_a_program_that_is_not_there_is_named(tmp_path):
    with refused("generate.server.command", "no-such-program"):
        ProcessGroup(["no-such-program", "x"], tmp_path / "log", "generate.server.command")


STARTER = """
    import sys, time
    from pathlib import Path
    from tpaw.runtime.process_group import ProcessGroup
    folder = Path(sys.argv[1])
    group = ProcessGroup(sys.argv[2:], folder / "log", "key")
    (folder / "watchdog").write_text(str(group._watchdog.pid))
    time.sleep(600)
"""


@pytest.mark.parametrize("whole_group", [False, True])
def test_nothing_is_left_after_kill_9(tmp_path, whole_group):
    starter = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(STARTER), tmp_path, *family(tmp_path)],
        start_new_session=True,
    )
    found = pids(tmp_path)
    watchdog = int(wait_for(lambda: (tmp_path / "watchdog").exists() and read(tmp_path)))
    assert all(map(is_alive, [*found, watchdog]))
    if whole_group:  # as a terminal or a scheduler does
        os.killpg(starter.pid, signal.SIGKILL)
    else:
        starter.kill()
    starter.wait()
    wait_for(lambda: not any(map(is_alive, [*found, watchdog])))


def read(folder):
    return (folder / "watchdog").read_text()


def test_a_fork_of_this_process_does_not_keep_the_command_alive(tmp_path):
    fork = "import os\nif os.fork() == 0:\n    import time; time.sleep(20); os._exit(0)\n"
    code = textwrap.dedent(STARTER).replace("time.sleep(600)", fork + "time.sleep(600)")
    starter = subprocess.Popen([sys.executable, "-c", code, tmp_path, *family(tmp_path)])
    found = pids(tmp_path)
    wait_for(lambda: (tmp_path / "watchdog").exists() and read(tmp_path))
    starter.kill()
    starter.wait()
    wait_for(lambda: not any(map(is_alive, found)), 10)


def test_a_watchdog_that_is_killed_leaves_nothing_after_stop(tmp_path):
    group = ProcessGroup(family(tmp_path), tmp_path / "log", "key")
    found = pids(tmp_path)
    group._watchdog.kill()
    wait_for(lambda: group.exit_code is not None)
    group.stop()
    wait_for(lambda: not any(map(is_alive, found)))


def test_nothing_is_left_if_only_the_child_is_killed_as_ray_does_it(tmp_path):
    group = ProcessGroup(family(tmp_path), tmp_path / "log", "key")
    found = pids(tmp_path)
    group._watchdog.kill()
    wait_for(lambda: not any(map(is_alive, found)))  # nobody has called `stop`
    group.stop()
