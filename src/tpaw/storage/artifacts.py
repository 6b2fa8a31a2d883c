"""Artifacts: folders that are published atomically and checked against a manifest.

An artifact is a folder with a `manifest.json`, which lists every file with its size and sha256. A
`ShardedArtifact` publishes one file at a time and rewrites its manifest after each file.

Every file and folder is written under a temporary name in the same folder, flushed to disk and
renamed. A crash therefore leaves either the old state or the new state, never a mixture.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tpaw.errors import ArtifactError, InputError
from tpaw.runtime.progress import OnDone, ignore

MANIFEST = "manifest.json"
PARTIAL_MANIFEST = "manifest.partial.json"
SETTINGS = "settings.json"
TEMPORARY_PREFIX = ".tmp-"


def write_file(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file atomically: `path` never holds a partial file.

    Args:
        path: the file to write or replace.
        write: writes the content to the path that it receives.
    """
    temporary = path.with_name(TEMPORARY_PREFIX + path.name)
    write(temporary)
    _flush(temporary)
    os.replace(temporary, path)
    _flush(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically.

    Raises:
        ValueError: `value` contains NaN or infinity, which JSON does not allow.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_file(path, write)


def read_json(path: Path) -> Any:
    """Read a JSON file that TPAW wrote.

    Raises:
        ArtifactError: the file cannot be read or is not valid JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{path}: damaged or unreadable ({error}); restore it from a backup"
        ) from None


@contextlib.contextmanager
def publishing(folder: Path, meta: dict[str, Any]) -> Iterator[Path]:
    """Publish a folder as an artifact when the context ends without an error.

    Args:
        folder: the artifact to publish.
        meta: values to store in the manifest. The caller may add values inside the context.

    Yields:
        A temporary folder. Write the files of the artifact into it.

    Raises:
        ArtifactError: `folder` has files but no manifest.
    """
    refuse_without_manifest(folder)
    temporary = folder.with_name(TEMPORARY_PREFIX + folder.name)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    write_manifest(temporary, meta)
    os.replace(temporary, folder)
    _flush(folder.parent)


def write_manifest(folder: Path, meta: Mapping[str, Any]) -> None:
    """Flush every file in `folder` to disk and write the manifest.

    Args:
        folder: the folder to describe, with its subfolders.
        meta: values to store in the manifest beside the list of files.
    """
    entries = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        _flush(path)
        entries.append(describe_file(folder, path))
    write_json(folder / MANIFEST, {"files": entries, **meta})


def describe_file(folder: Path, path: Path) -> dict[str, Any]:
    """The manifest entry of one file: path relative to `folder`, size in bytes, sha256."""
    return {
        "path": path.relative_to(folder).as_posix(),
        "bytes": path.stat().st_size,
        "sha256": _sha256(path),
    }


def refuse_without_manifest(folder: Path) -> None:
    """Refuse a folder that has files but no manifest. Somebody deleted the manifest.

    Raises:
        ArtifactError: naming the folder.
    """
    manifests = (folder / MANIFEST, folder / PARTIAL_MANIFEST)
    if folder.exists() and any(folder.iterdir()) and not any(m.exists() for m in manifests):
        raise ArtifactError(f"{folder}: its {MANIFEST} is missing; restore it from a backup")


def is_published(folder: Path) -> bool:
    """Whether `folder` is a complete artifact."""
    return (folder / MANIFEST).exists()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of an artifact. The files are not checked; `verify` checks them."""
    return dict(read_json(folder / MANIFEST))


def read_files(manifest_path: Path) -> list[dict[str, Any]]:
    """Read the entries of a manifest.

    Returns:
        One mapping for each file, with `path`, `bytes` and `sha256`.

    Raises:
        ArtifactError: the manifest is damaged.
    """
    try:
        entries = [dict(entry) for entry in read_json(manifest_path)["files"]]
        known = all(isinstance(e["path"], str) and e["bytes"] >= 0 and e["sha256"] for e in entries)
    except (KeyError, TypeError, ValueError):
        known = False
    if not known:
        raise ArtifactError(
            f"{manifest_path}: damaged: it has no valid list of files; restore it from a backup"
        )
    return entries


def verify(manifest_path: Path, on_bytes: OnDone = ignore) -> None:
    """Check every file of an artifact against its manifest.

    Args:
        manifest_path: the manifest of the artifact.
        on_bytes: called after each file with the file's size in bytes.

    Raises:
        ArtifactError: naming the file that is missing, truncated or altered.
    """
    for entry in read_files(manifest_path):
        name, size, sha256 = entry["path"], entry["bytes"], entry["sha256"]
        path = manifest_path.parent / name
        if not path.is_file():
            raise ArtifactError(
                f"{path}: missing, but {manifest_path.name} lists it; restore it from a backup"
            )
        if path.stat().st_size != size:
            raise ArtifactError(
                f"{path}: damaged: {path.stat().st_size} bytes, but published with {size}; restore "
                "it from a backup"
            )
        if _sha256(path) != sha256:
            raise ArtifactError(
                f"{path}: damaged: its content differs from the published one; restore it from a "
                "backup"
            )
        on_bytes(size)


def own_folder(folder: Path, settings: Mapping[str, Any], **facts: Any) -> None:
    """Reserve an output folder for results with the given settings.

    The first call creates the folder and writes `settings.json`. A later call with the same
    settings succeeds, so that the work can be resumed.

    Args:
        folder: the output folder.
        settings: every setting that decides the results, as JSON values.
        facts: further values to store in settings.json. They may differ in a later call.

    Raises:
        InputError: the folder holds results with other settings (the message names them), or
            files that tpaw did not write.
        ArtifactError: settings.json is damaged.
    """
    path = folder / SETTINGS
    if path.is_file():
        kept = read_json(path)
        if not isinstance(kept, dict) or not isinstance(found := kept.get("settings"), dict):
            raise ArtifactError(f"{path}: damaged: it has no settings; restore it from a backup")
        keys = [key for key in {**settings, **found} if settings.get(key) != found.get(key)]
        if keys:
            differing = "".join(f"\n  {k}: {found.get(k)} → {settings.get(k)}" for k in keys)
            raise InputError(
                f"--output {folder}: already holds results of a different configuration:"
                f"{differing}\nChoose another --output."
            )
        return
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output {folder}: is a file; give a folder")
    if folder.is_dir() and any(
        p for p in folder.iterdir() if p.name != TEMPORARY_PREFIX + SETTINGS
    ):
        raise InputError(
            f"--output {folder}: the folder is not empty and was not created by tpaw; "
            "choose another --output"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, {"settings": dict(settings), **facts})


class ShardedArtifact:
    """An artifact whose files are published one at a time.

    A crash can leave a file that the manifest does not list. The file does not count as published
    and is written again.

    Args:
        folder: the folder of the artifact.
        always_growing: the artifact never becomes complete, and its manifest is `manifest.json`
            from the first file on. Otherwise the manifest is `manifest.partial.json` until
            `complete` is called.
    """

    def __init__(self, folder: Path, *, always_growing: bool = False) -> None:
        self.folder = folder
        self.is_complete = is_published(folder)
        growing_name = MANIFEST if always_growing else PARTIAL_MANIFEST
        self._path = folder / (MANIFEST if self.is_complete else growing_name)
        self._manifest: dict[str, Any] = (
            read_json(self._path) if self._path.exists() else {"files": []}
        )

    @property
    def entries(self) -> list[dict[str, Any]]:
        """The manifest entries, in the order of publication."""
        return list(self._manifest["files"])

    @property
    def names(self) -> set[str]:
        """Names of the published files."""
        return {entry["path"] for entry in self._manifest["files"]}

    def publish(self, name: str, write: Callable[[Path], None], **facts: Any) -> None:
        """Publish one file.

        Args:
            name: name of the file inside the folder.
            write: writes the content to the path that it receives.
            facts: values to store in the manifest entry beside size and hash.
        """
        if not self._path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self._path, self._manifest)
        write_file(self.folder / name, write)
        entry = describe_file(self.folder, self.folder / name) | facts
        self._manifest["files"].append(entry)
        write_json(self._path, self._manifest)

    def complete(self, meta: Mapping[str, Any]) -> None:
        """Mark the artifact as complete.

        Args:
            meta: values to store in the manifest.
        """
        self._manifest |= meta
        write_json(self._path, self._manifest)
        os.replace(self._path, self.folder / MANIFEST)
        _flush(self.folder)
        self._path = self.folder / MANIFEST
        self.is_complete = True


def remove_temporaries(folder: Path) -> None:
    """Remove temporary files and folders that a crash left.

    Hold the lock of the run, because another process may be writing such a file.
    """
    for path in sorted(folder.rglob(TEMPORARY_PREFIX + "*")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
