"""What the file system does wrong, said in one line."""

from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from messages import refused
from safetensors.torch import save_file

from tpaw.errors import StorageError
from tpaw.storage.failures import readable_size, require_space, storage_failure

FULL = Path("/dev/full")


def failure(call):
    with pytest.raises(Exception) as caught:  # noqa: PT011
        call()
    return storage_failure(caught.value, "FOLDER")


@pytest.mark.skipif(not FULL.is_char_device(), reason="no device that is always full")
def test_a_full_disk_as_torch_says_it():
    # torch opens the file itself and does not say why writing failed.
    found = failure(lambda: torch.save(torch.zeros(10_000), FULL))
    assert found.startswith(f"FOLDER: {os.strerror(errno.ENOSPC)} (")


def test_a_folder_that_is_not_there_as_each_library_says_it(tmp_path):
    missing, text = tmp_path / "missing", os.strerror(errno.ENOENT)
    assert failure(lambda: torch.save(1, missing / "a")) == f"{missing}: {text}"
    assert failure(lambda: (missing / "a").write_text("x")) == f"{missing / 'a'}: {text}"
    assert failure(lambda: os.stat(os.fsencode(missing))) == f"{missing}: {text}"
    found = failure(lambda: save_file({"a": torch.zeros(1)}, missing / "a"))
    assert found == f"FOLDER: {text}"


def test_a_name_that_is_too_long_and_a_place_that_takes_no_folder(tmp_path):
    assert failure((tmp_path / ("x" * 300)).stat).endswith(os.strerror(errno.ENAMETOOLONG))
    assert failure(Path("/proc/tpaw/y").mkdir).startswith("/proc/tpaw/y: ")


def test_the_cause_is_found_behind_other_errors():
    def call():
        try:
            raise OSError(errno.EROFS, "read-only", "/a")
        except OSError:
            raise RuntimeError from None

    assert failure(call) == f"/a: {os.strerror(errno.EROFS)}"


def test_an_error_that_is_its_own_cause():
    error = RuntimeError("x")
    error.__cause__ = error
    assert storage_failure(error, "FOLDER") is None


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x"),
        OSError("We couldn't connect to the hub"),  # libraries raise it without a number
        ConnectionRefusedError(errno.ECONNREFUSED, "refused"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("PytorchStreamReader failed finding central directory"),  # a damaged file
    ],
    ids=lambda error: type(error).__name__ + str(error)[:3],
)
def test_what_is_not_the_file_systems_failure(error):
    assert storage_failure(error, "FOLDER") is None


def test_space_is_refused_with_what_is_needed_and_what_is_free(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 2_500_000))
    with refused(tmp_path / "a", "3.0 GB", "2.5 MB", "training θ_1", error=StorageError):
        require_space(tmp_path / "a" / "b", 3e9, "training θ_1")
    require_space(tmp_path / "a" / "b", 2_500_000, "training θ_1")
    with pytest.raises(StorageError):
        require_space(tmp_path / "a" / "b", 2_500_001, "training θ_1")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (3.21e9, "3.2 GB"), (5e15, "5000.0 TB")],
)
def test_sizes_are_decimal(count, text):
    assert readable_size(count) == text
