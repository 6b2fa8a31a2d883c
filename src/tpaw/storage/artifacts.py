"""Published files: whole or absent at every moment, and never trusted without a look.

An artifact is a folder with a `manifest.json`, which is written last. A `ShardedArtifact` grows a
file at a time and rewrites its manifest after each. Everything is written to a temporary sibling,
flushed to the disk and renamed, so that a crash at any moment leaves the old state or the new.
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
    """Write a file by way of a temporary sibling, so that `path` is never half written."""
    temporary = path.with_name(TEMPORARY_PREFIX + path.name)
    write(temporary)
    _flush(temporary)
    os.replace(temporary, path)
    _flush(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write JSON with `write_file`. NaN is refused: no reader of ours should meet it."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text with `write_file`."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_file(path, write)


def read_json(path: Path) -> Any:
    """Read JSON of ours.

    Raises:
        ArtifactError: the file is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: damaged or unreadable: {error}") from None


@contextlib.contextmanager
def publishing(folder: Path, meta: dict[str, Any]) -> Iterator[Path]:
    """Give a temporary folder to fill; on success publish it as `folder` with a manifest.

    `meta` is stored in the manifest; it may be filled while the folder is.

    Raises:
        ArtifactError: the folder is there already, so its manifest was lost.
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
    """Describe every file in `folder` (relative path, bytes, sha256) and flush it to the disk."""
    entries = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        _flush(path)
        entries.append(describe_file(folder, path))
    write_json(folder / MANIFEST, {"files": entries, **meta})


def describe_file(folder: Path, path: Path) -> dict[str, Any]:
    """The manifest's line on one file."""
    return {
        "path": path.relative_to(folder).as_posix(),
        "bytes": path.stat().st_size,
        "sha256": _sha256(path),
    }


def refuse_without_manifest(folder: Path) -> None:
    """Refuse a folder that was published once and has lost its manifest.

    Raises:
        ArtifactError: naming the folder.
    """
    manifests = (folder / MANIFEST, folder / PARTIAL_MANIFEST)
    if folder.exists() and any(folder.iterdir()) and not any(m.exists() for m in manifests):
        raise ArtifactError(f"{folder}: its {MANIFEST} is missing; nothing is redone over it")


def is_published(folder: Path) -> bool:
    """Whether the artifact exists."""
    return (folder / MANIFEST).exists()


def read_manifest(folder: Path) -> dict[str, Any]:
    """What the manifest says, unchecked; see `verify`."""
    return dict(read_json(folder / MANIFEST))


def read_files(manifest_path: Path) -> list[dict[str, Any]]:
    """The lines of a manifest, each with path, bytes and sha256.

    Raises:
        ArtifactError: the manifest is damaged.
    """
    try:
        entries = [dict(entry) for entry in read_json(manifest_path)["files"]]
        known = all(isinstance(e["path"], str) and e["bytes"] >= 0 and e["sha256"] for e in entries)
    except (KeyError, TypeError, ValueError):
        known = False
    if not known:
        raise ArtifactError(f"{manifest_path}: damaged: it lists no files")
    return entries


def verify(manifest_path: Path, on_bytes: OnDone = ignore) -> None:
    """Check every file of an artifact against its manifest.

    Args:
        on_bytes: called with the size of each file once it is checked.

    Raises:
        ArtifactError: naming the file that is missing, truncated or altered.
    """
    for entry in read_files(manifest_path):
        name, size, sha256 = entry["path"], entry["bytes"], entry["sha256"]
        path = manifest_path.parent / name
        if not path.is_file():
            raise ArtifactError(f"{path}: missing, though {manifest_path.name} lists it")
        if path.stat().st_size != size:
            raise ArtifactError(f"{path}: {path.stat().st_size} bytes; published with {size}")
        if _sha256(path) != sha256:
            raise ArtifactError(f"{path}: damaged: its content differs from what was published")
        on_bytes(size)


def own_folder(folder: Path, settings: Mapping[str, Any], **facts: Any) -> None:
    """Make a folder the place of one piece of work: settings.json says which, once for all.

    Args:
        settings: everything that decides what the folder will hold; JSON values.
        facts: kept beside them, and free to differ when the work goes on.

    Raises:
        InputError: the folder holds other work; the settings that differ are named.
        ArtifactError: settings.json is damaged.
    """
    path = folder / SETTINGS
    if path.is_file():
        kept = read_json(path)
        if not isinstance(kept, dict) or not isinstance(found := kept.get("settings"), dict):
            raise ArtifactError(f"{path}: damaged: it holds no settings")
        keys = [key for key in {**settings, **found} if settings.get(key) != found.get(key)]
        if keys:
            differing = "".join(f"\n  {k}: {found.get(k)} → {settings.get(k)}" for k in keys)
            raise InputError(
                f"--output {folder}: already holds results of a different configuration:"
                f"{differing}\nChoose another --output."
            )
        return
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output {folder}: is a file")
    if folder.is_dir() and any(
        p for p in folder.iterdir() if p.name != TEMPORARY_PREFIX + SETTINGS
    ):
        raise InputError(f"--output {folder}: the folder is not empty and was not created by tpaw")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, {"settings": dict(settings), **facts})


class ShardedArtifact:
    """A folder of files that are published one at a time.

    With `always_growing` it exists from its first file on; otherwise the manifest is called
    manifest.partial.json until `complete()`. A file that the manifest does not list, because a
    crash came between the two, is written again by whoever knows its content.
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
        """The manifest's lines, in the order of publication."""
        return list(self._manifest["files"])

    @property
    def names(self) -> set[str]:
        """Names of the files that are published."""
        return {entry["path"] for entry in self._manifest["files"]}

    def publish(self, name: str, write: Callable[[Path], None], **facts: Any) -> None:
        """Write one file and list it with `facts` beside its size and hash."""
        if not self._path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self._path, self._manifest)
        write_file(self.folder / name, write)
        entry = describe_file(self.folder, self.folder / name) | facts
        self._manifest["files"].append(entry)
        write_json(self._path, self._manifest)

    def complete(self, meta: Mapping[str, Any]) -> None:
        """Publish the whole: from now on the artifact exists."""
        self._manifest |= meta
        write_json(self._path, self._manifest)
        os.replace(self._path, self.folder / MANIFEST)
        _flush(self.folder)
        self._path = self.folder / MANIFEST
        self.is_complete = True


def remove_temporaries(folder: Path) -> None:
    """Remove what a crash left half written. Call it only while holding the run's lock."""
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
