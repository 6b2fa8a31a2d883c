"""The lock of a folder: one process works on it, and stops if the folder moves away under it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import stat
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from tpaw.errors import InputError, RunLockedError, StorageError

TRIES = 10

# Lock files that this process holds, with device and inode.
_held: dict[Path, tuple[int, int]] = {}


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock inside the context.

    Args:
        path: the lock file. It is created if it does not exist and is never removed.

    Raises:
        RunLockedError: another process holds the lock.
        InputError: the lock cannot be a file, or the file system has no locks.
        StorageError: inside the context, the work failed because the folder or the lock file was
            moved or removed.
    """
    with _acquired(path) as file:
        file.truncate(0)
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": now()}
        file.write(json.dumps(holder))
        file.flush()
        os.fsync(file.fileno())  # the workers of a cluster read it
        # Otherwise a forked child, such as a data loader worker, would hold the lock after this
        # process has ended.
        os.register_at_fork(after_in_child=file.close)
        _held[path] = _identity(os.fstat(file.fileno()))
        try:
            yield
        except Exception:
            check_held(path)  # without its folder, work fails in many ways
            raise
        finally:
            del _held[path]


def check_held(path: Path) -> None:
    """Check, before a write, that the folder is still there and still locked by this process.

    Args:
        path: the file or folder to write. Only locks of the folders that contain it matter.

    Raises:
        StorageError: the folder or its lock file was moved, removed or replaced.
    """
    for lock, identity in list(_held.items()):
        if not path.is_relative_to(lock.parent):
            continue
        try:
            same = _identity(lock.lstat()) == identity
        except OSError:
            same = False
        if not same:
            raise StorageError(
                f"{lock.parent}: while tpaw worked on it, the folder or its file {lock.name} was "
                "moved, removed or replaced. What was published is kept, wherever the folder is "
                "now. Run the same command again with its present path."
            )


def now() -> str:
    """The time in UTC, to the second, in ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@contextlib.contextmanager
def _acquired(path: Path) -> Iterator[IO[str]]:
    for _ in range(TRIES):
        with os.fdopen(_open(path), "a+", encoding="utf-8") as file:
            try:
                # The kernel releases this lock when the process ends, even if it is killed.
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise RunLockedError(
                    f"{path.parent}: in use by {_holder(file.read())}; wait for it or stop it"
                ) from None
            except OSError as error:
                raise InputError(
                    f"{path}: the file system cannot lock files ({error.strerror}); choose a "
                    "folder on a local disk, or see docs/reference/run-directory.md"
                ) from None
            # Somebody may have removed the file between the opening and the locking.
            if path.exists() and _identity(path.lstat()) == _identity(os.fstat(file.fileno())):
                yield file
                return
    raise InputError(
        f"{path}: the file is replaced again and again, so it cannot be locked; choose a folder on "
        "a local disk, or see docs/reference/run-directory.md"
    )


def _open(path: Path) -> int:
    """Open a lock file. Links are not followed: the file that they name would be overwritten."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR):
            raise
    else:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
    kind = (
        "a symbolic link"
        if path.is_symlink()
        else "a folder"
        if path.is_dir()
        else "not a regular file"
    )
    raise InputError(f"{path}: is {kind}; the lock must be a file; remove it")


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _holder(text: str) -> str:
    try:
        holder = json.loads(text)
        return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
