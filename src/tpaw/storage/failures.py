"""Failures of the file system in one line: which path, and what failed. Space is checked first.

Libraries report a full disk in their own ways: torch by a RuntimeError without the reason,
safetensors and tokenizers by exceptions whose text ends with the number of the system's error.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from tpaw.errors import StorageError

_OF_RUST = re.compile(r"\(os error (\d+)\)")
_OF_TORCH = ("unexpected pos", "PytorchStreamWriter")
_NO_FOLDER = re.compile(r"Parent directory (.*) does not exist\.")
# OSErrors that do not come from a file system.
_OTHERS = (ConnectionError, TimeoutError, ChildProcessError, InterruptedError, socket.gaierror)


def storage_failure(error: BaseException, folder: str | Path) -> str | None:
    """Say how the file system failed.

    Args:
        error: any error.
        folder: the folder to name if the error names no path.

    Returns:
        One line with the path and the reason, or None if the file system did not fail.
    """
    for cause in _causes(error):
        if isinstance(cause, _OTHERS):
            continue
        number, path = _number_and_path(cause)
        if number is None or number == errno.ENOMEM:
            continue
        where = path or str(folder)
        space = (
            f" ({readable_size(shutil.disk_usage(nearest_folder(Path(where))).free)} free now)"
            if number == errno.ENOSPC
            else ""
        )
        return f"{where}: {os.strerror(number)}{space}"
    return None


def require_space(folder: Path, needed: float, work: str, advice: str = "") -> None:
    """Refuse work that would fill the disk.

    Args:
        folder: a folder on the disk. It need not exist yet.
        needed: upper bound of what the work writes, in bytes.
        work: the work, as the subject of a sentence.
        advice: one more sentence, which says how to need less.

    Raises:
        StorageError: naming needed and free space.
    """
    free = shutil.disk_usage(nearest_folder(folder)).free
    if needed > free:
        raise StorageError(
            f"{folder}: {work} needs up to {readable_size(needed)} of disk space, and "
            f"{readable_size(free)} are free. Published files and saved steps are kept. Free some "
            f"space, then run the same command again.{' ' * bool(advice)}{advice}"
        )


def readable_size(count: float) -> str:
    """A number of bytes for people: 1.5 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _number_and_path(error: BaseException) -> tuple[int | None, str | None]:
    if isinstance(error, OSError):
        name = error.filename
        return error.errno, os.fsdecode(name) if isinstance(name, str | bytes) else None
    text = str(error)
    if isinstance(error, RuntimeError):
        if any(sign in text for sign in _OF_TORCH):
            return errno.ENOSPC, None
        if found := _NO_FOLDER.fullmatch(text):
            return errno.ENOENT, found[1]
    found = _OF_RUST.search(text)
    return (int(found[1]), None) if found else (None, None)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def nearest_folder(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
