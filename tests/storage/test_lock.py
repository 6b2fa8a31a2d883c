"""The lock: one process, a lock file that is a file, and a folder that stays where it is."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket

import pytest
from messages import refused

from tpaw.errors import ArtifactError, RunLockedError, StorageError
from tpaw.storage.artifacts import write_text
from tpaw.storage.lock import check_held, locked


def test_a_lock_that_names_another_file_overwrites_nothing(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    (tmp_path / "lock").symlink_to(tmp_path / "thesis.tex")
    with refused(tmp_path / "lock", "symbolic link"), locked(tmp_path / "lock"):
        pass
    assert (tmp_path / "thesis.tex").read_text() == "x"


@pytest.mark.parametrize("kind", ["a dangling link", "a folder", "a pipe"])
def test_a_lock_must_be_a_file(tmp_path, kind):
    lock = tmp_path / "lock"
    if kind == "a folder":
        lock.mkdir()
    elif kind == "a pipe":
        os.mkfifo(lock)
    else:
        lock.symlink_to(tmp_path / "nowhere")
    with refused(lock), locked(lock):
        pass
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, number):
    def flock(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with refused(tmp_path / "lock", os.strerror(number)), locked(tmp_path / "lock"):
        pass


def test_a_lock_is_held_by_one(tmp_path):
    with (
        locked(tmp_path / "lock"),
        pytest.raises(RunLockedError),
        locked(tmp_path / "lock"),
    ):
        pass
    with locked(tmp_path / "lock"):
        pass


def test_the_file_names_the_present_holder_alone(tmp_path):
    for _ in range(2):
        with locked(tmp_path / "lock"):
            holder = json.loads((tmp_path / "lock").read_text())
            assert (holder["pid"], holder["host"]) == (os.getpid(), socket.gethostname())


def test_a_forked_child_does_not_hold_the_lock(tmp_path):
    """As a data loader's worker that outlives a killed process."""
    (running, says_running), (done, says_done) = os.pipe(), os.pipe()
    with locked(tmp_path / "lock"):
        child = os.fork()
        if child == 0:
            os.write(says_running, b"x")
            os.read(done, 1)
            os._exit(0)
        os.read(running, 1)
    try:
        with locked(tmp_path / "lock"):
            pass
    finally:
        os.write(says_done, b"x")
        os.waitpid(child, 0)
        for end in (running, says_running, done, says_done):
            os.close(end)


def gone(folder, how):
    if how == "moved":
        folder.rename(folder.with_name("elsewhere"))
    elif how == "moved and another one made":
        folder.rename(folder.with_name("elsewhere"))
        folder.mkdir()
        (folder / "lock").touch()
    elif how == "the lock removed":
        (folder / "lock").unlink()
    else:
        (folder / "lock").unlink()
        (folder / "lock").touch()  # by a second process, which locks this one


HOW = ["moved", "moved and another one made", "the lock removed", "the lock replaced"]


@pytest.mark.parametrize("how", HOW)
def test_nothing_is_written_once_the_lock_is_gone(tmp_path, how):
    folder = tmp_path / "run"
    folder.mkdir()
    write_text(folder / "a.txt", "before")
    with refused(folder, error=StorageError), locked(folder / "lock"):
        write_text(folder / "a.txt", "held")
        write_text(tmp_path / "b.txt", "elsewhere")
        gone(folder, how)
        write_text(tmp_path / "b.txt", "still")  # not below the lock
        before = sorted(tmp_path.rglob("*"))
        try:
            write_text(folder / "a.txt", "after")
        finally:
            assert sorted(tmp_path.rglob("*")) == before
    assert [p.read_text() for p in tmp_path.rglob("a.txt")] == ["held"]
    assert (tmp_path / "b.txt").read_text() == "still"
    check_held(folder / "a.txt")  # nothing is held any more


def test_whatever_fails_in_a_folder_that_is_gone_fails_because_it_is_gone(tmp_path):
    (tmp_path / "run").mkdir()
    with refused(tmp_path / "run", error=StorageError), locked(tmp_path / "run" / "lock"):
        gone(tmp_path / "run", "moved")
        list(zip([1], [], strict=True))
    (tmp_path / "again").mkdir()
    with refused(tmp_path / "again", error=StorageError), locked(tmp_path / "again" / "lock"):
        gone(tmp_path / "again", "the lock removed")
        raise ArtifactError("missing; restore it from a backup")
    with pytest.raises(ValueError, match="shorter"), locked(tmp_path / "lock"):
        list(zip([1], [], strict=True))


def test_a_lock_file_that_changes_all_the_time_is_no_endless_loop(tmp_path, monkeypatch):
    original = fcntl.flock

    def flock(*arguments):
        (tmp_path / "lock").unlink()
        (tmp_path / "lock").touch()
        original(*arguments)

    monkeypatch.setattr(fcntl, "flock", flock)
    with refused(tmp_path / "lock"), locked(tmp_path / "lock"):
        pass
