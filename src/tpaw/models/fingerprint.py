"""The fingerprint of a model: a hash of every file that decides results. It names a player."""

from __future__ import annotations

import hashlib
import json
import mmap
from pathlib import Path
from typing import Any

from tpaw.errors import InputError
from tpaw.storage.removal import removed_by

ADAPTER_CONFIG = "adapter_config.json"
# Besides the weights: configuration, stop tokens, tokenizer, chat template and code of the model.
_DECISIVE = (
    "config.json",
    ADAPTER_CONFIG,
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates/*",
    "*.py",
)
# Fields of config files that say where and how a model was saved. The weights hold their own dtype.
_NOTES = {"_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype"}
# The same in adapter_config.json. The base has a fingerprint of its own.
_NOTES_OF_ADAPTERS = {"base_model_name_or_path", "revision", "inference_mode", "peft_version"}


def fingerprint(folder: Path, weights: str | None = None) -> str:
    """Hash everything in a model's folder that decides what it computes and how text is encoded.

    The hash covers the weights (see `weights_hash`), the configuration, the generation
    configuration, the tokenizer, the chat template and the model's Python code. The
    format of config files, and notes in them such as the version of transformers, do not count.

    Args:
        folder: the model's folder.
        weights: the `weights_hash` of the folder, if it is known.

    Returns:
        The sha256 as 64 hexadecimal digits.

    Raises:
        InputError: the folder has no weights, or a file of weights is damaged.
    """
    digest = hashlib.sha256((weights or weights_hash(folder)).encode())
    files = {path for pattern in _DECISIVE for path in folder.glob(pattern) if path.is_file()}
    for path in sorted(files):
        content = hashlib.sha256(_decisive_content(path)).hexdigest()
        digest.update(f"\n{path.relative_to(folder).as_posix()} {content}".encode())
    return digest.hexdigest()


def adapter_fingerprint(base: str, folder: Path) -> str:
    """Hash a player that is an adapter over a base.

    Args:
        base: the `fingerprint` of the base.
        folder: the adapter's folder.

    Returns:
        The sha256 as 64 hexadecimal digits.

    Raises:
        InputError: the folder has no weights, or a file of weights is damaged.
    """
    return hashlib.sha256(f"{base}\n{fingerprint(folder)}".encode()).hexdigest()


def weights_hash(folder: Path) -> str:
    """Hash the weights of a model.

    For safetensors files the hash covers the name, type, shape and bytes of each tensor, so it does
    not depend on how the weights are split into files. For .bin files it covers the files.

    Args:
        folder: the model's folder.

    Returns:
        The sha256 as 64 hexadecimal digits.

    Raises:
        InputError: the folder has no weights, or a file is damaged.
    """
    tensors: dict[str, tuple[str, Path, int, int]] = {}
    files = weight_files(folder)
    digest = hashlib.sha256()
    for file in files:
        if file.suffix == ".bin":
            with file.open("rb") as handle:
                digest.update(hashlib.file_digest(handle, "sha256").digest())
            continue
        for name, facts in safetensors_header(file).items():
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
    """The files that hold a model's weights, sorted by name.

    Args:
        folder: the model's folder.

    Returns:
        The safetensors files, or the pytorch_model*.bin files if there are none.

    Raises:
        InputError: the folder has no weights, or a safetensors file is damaged.
    """
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        safetensors_header(file)
    files = files or sorted(folder.glob("pytorch_model*.bin"))
    if not files and (by := removed_by(folder)) is not None:
        raise InputError(
            f"{folder}: the weights of this checkpoint were removed by {by}; use a later checkpoint"
        )
    if not files:
        raise InputError(
            f"model.path: {folder}: the folder has no weights (*.safetensors); give a complete "
            "model"
        )
    return files


def _decisive_content(path: Path) -> bytes:
    content = path.read_bytes()
    if not path.name.endswith("config.json"):
        return content
    try:
        tree = json.loads(content)
        if path.name == ADAPTER_CONFIG and isinstance(tree, dict):
            tree = {key: value for key, value in tree.items() if key not in _NOTES_OF_ADAPTERS}
        return json.dumps(_without_notes(tree), sort_keys=True).encode()
    except (ValueError, RecursionError):
        return content  # whoever reads it says what is wrong


def _without_notes(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _without_notes(value) for key, value in tree.items() if key not in _NOTES}
    return [_without_notes(value) for value in tree] if isinstance(tree, list) else tree


def safetensors_header(file: Path) -> dict[str, Any]:
    """Read the header of a safetensors file.

    Returns:
        By name of a tensor: `dtype`, `shape`, and `data_offsets` from the start of the file.

    Raises:
        InputError: the file is damaged.
    """
    with file.open("rb") as handle:
        size = int.from_bytes(handle.read(8), "little")
        try:
            header = json.loads(handle.read(min(size, file.stat().st_size)))
            header.pop("__metadata__", None)
            # The file counts offsets from the end of the header. Readers need them from its start.
            for facts in header.values():
                begin, end = facts["data_offsets"]
                facts["data_offsets"] = [begin + 8 + size, end + 8 + size]
            ends = [facts["data_offsets"][1] for facts in header.values()]
        except (ValueError, TypeError, KeyError, AttributeError):
            # Not JSON, or JSON of another form.
            raise InputError(
                f"{file}: damaged: not a safetensors file; download or copy it again"
            ) from None
    end = max(ends, default=8 + size)
    if end != file.stat().st_size:
        raise InputError(
            f"{file}: damaged: {file.stat().st_size} bytes, but its header says {end}; download or "
            "copy it again"
        )
    return dict(header)
