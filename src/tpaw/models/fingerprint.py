"""A player is its weights: the hash of their content, and the files that hold them."""

from __future__ import annotations

import hashlib
import json
import mmap
from pathlib import Path
from typing import Any

from tpaw.errors import InputError


def fingerprint(folder: Path) -> str:
    """sha256 of the weights' names, types, shapes and bytes; however they are sharded."""
    tensors: dict[str, tuple[str, Path, int, int]] = {}
    files = weight_files(folder)
    digest = hashlib.sha256()
    for file in files:
        if file.suffix == ".bin":
            with file.open("rb") as handle:
                digest.update(hashlib.file_digest(handle, "sha256").digest())
            continue
        for name, facts in _safetensors_header(file).items():
            begin, end = facts["data_offsets"]
            tensors[name] = (f"{facts['dtype']}{facts['shape']}", file, begin, end)
    opened: dict[Path, mmap.mmap] = {}
    for name, (kind, file, begin, end) in sorted(tensors.items()):
        digest.update(f"{name} {kind}\n".encode())
        if file not in opened:
            with file.open("rb") as handle:
                opened[file] = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        with memoryview(opened[file]) as view:
            digest.update(view[begin:end])
    return digest.hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The model's safetensors files, or the pickled ones of an older model.

    Raises:
        InputError: there are none, or one is damaged.
    """
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        _safetensors_header(file)
    files = files or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise InputError(f"model.path: {folder}: holds no weights (*.safetensors)")
    return files


def _safetensors_header(file: Path) -> dict[str, Any]:
    with file.open("rb") as handle:
        size = int.from_bytes(handle.read(8), "little")
        try:
            header = json.loads(handle.read(min(size, file.stat().st_size)))
        except ValueError:
            raise InputError(f"{file}: damaged: not a safetensors file") from None
    header.pop("__metadata__", None)
    # Offsets count from the end of the header.
    for facts in header.values():
        facts["data_offsets"] = [offset + 8 + size for offset in facts["data_offsets"]]
    end = max((facts["data_offsets"][1] for facts in header.values()), default=8 + size)
    if end != file.stat().st_size:
        raise InputError(f"{file}: damaged: {file.stat().st_size} bytes; its header says {end}")
    return dict(header)
