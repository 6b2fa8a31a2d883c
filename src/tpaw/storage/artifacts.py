"""Artifacts: folders that are published atomically and checked against a manifest.

An artifact is a folder with a `manifest.json`, which lists every file with its size and sha256. A
`ShardedArtifact` publishes one file at a time and rewrites its manifest after each file. Any
process may compute such a file and `deliver` it; the process that holds the lock publishes it.

Every file and folder is written under a temporary name in the same folder, flushed to disk and
renamed. A crash therefore leaves either the old state or the new state, never a mixture. Temporary
names are unique, so several processes may write the same file: the last one wins.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

from tpaw.errors import ArtifactError, InputError, RunLockedError, StorageError
from tpaw.runtime.progress import OnDone, ignore
from tpaw.storage.lock import check_held
from tpaw.storage.seals import SEAL, are_intact, seal_facts

MANIFEST = "manifest.json"
PARTIAL_MANIFEST = "manifest.partial.json"
SETTINGS = "settings.json"
TEMPORARY_PREFIX = ".tmp-"
DELIVERED_PREFIX = "delivered-"
BYTES_READ_AT_ONCE = 1 << 24


def write_file(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file atomically: `path` never holds a partial file.

    Args:
        path: the file to write or replace.
        write: writes the content to the path that it receives.
    """
    check_held(path)
    temporary = temporary_beside(path)
    try:
        write(temporary)
        flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    flush(path.parent)


def temporary_beside(path: Path) -> Path:
    """A new temporary name in the folder of `path`. `remove_temporaries` finds it."""
    unique = f"{os.getpid()}-{secrets.token_hex(4)}"
    return path.with_name(f"{TEMPORARY_PREFIX}{unique}-{path.name[:50]}")


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


class Facts(dict[str, Any]):
    """A JSON mapping that TPAW wrote. A missing key raises an ArtifactError that names the file."""

    def __init__(self, path: Path, content: Mapping[str, Any]) -> None:
        super().__init__(content)
        self.path = path

    def __missing__(self, key: str) -> Any:
        raise ArtifactError(f"{self.path}: damaged: it has no {key!r}; restore it from a backup")


def read_json(path: Path) -> Any:
    """Read a JSON file that TPAW wrote.

    Raises:
        ArtifactError: the file cannot be read or is not valid JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{path}: damaged or unreadable ({error}); restore it from a backup"
        ) from None


def read_facts(path: Path) -> Facts:
    """Read a JSON mapping that TPAW wrote.

    Raises:
        ArtifactError: the file cannot be read or does not hold a mapping.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise ArtifactError(f"{path}: damaged: not a mapping; restore it from a backup")
    return Facts(path, content)


def write_sealed(path: Path, facts: Mapping[str, Any]) -> None:
    """Write a JSON mapping with its checksum inside, for `read_sealed`."""
    write_json(path, seal_facts(facts))


def read_sealed(path: Path) -> Facts:
    """Read a JSON mapping and check it against its checksum, if it has one: format 1 has none.

    Raises:
        ArtifactError: the file cannot be read, holds no mapping, or was changed.
    """
    facts = read_facts(path)
    if are_intact(facts) is False:
        raise ArtifactError(
            f"{path}: damaged or edited: its checksum does not fit; restore it from a backup"
        )
    return facts


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
        RunLockedError: another process has published the same artifact in the meantime.
    """
    refuse_without_manifest(folder)
    check_held(folder)
    temporary = temporary_beside(folder)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        write_manifest(temporary, meta)
        check_held(folder)
        _appear(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    flush(folder.parent)


def _appear(temporary: Path, folder: Path) -> None:
    try:
        os.replace(temporary, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise RunLockedError(
            f"{folder}: another process published it in the meantime; run the same command again"
        ) from None


def write_manifest(folder: Path, meta: Mapping[str, Any]) -> None:
    """Flush every file in `folder` to disk and write the manifest.

    Args:
        folder: the folder to describe, with its subfolders.
        meta: values to store in the manifest beside the list of files.
    """
    entries = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        flush(path)
        entries.append(describe_file(folder, path))
    write_sealed(folder / MANIFEST, {"files": entries, **meta})


def describe_file(folder: Path, path: Path) -> dict[str, Any]:
    """The manifest entry of one file: path relative to `folder`, size in bytes, sha256."""
    return {
        "path": path.relative_to(folder).as_posix(),
        "bytes": path.stat().st_size,
        "sha256": sha256_of(path),
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


def read_manifest(folder: Path) -> Facts:
    """Read the manifest of an artifact. The files are not checked; `verify` checks them.

    Raises:
        ArtifactError: the manifest is damaged. So is a key that is read and not there.
    """
    return _read_manifest(folder / MANIFEST)


def read_files(manifest_path: Path) -> list[Facts]:
    """Read the entries of a manifest.

    Returns:
        One mapping for each file, with `path`, `bytes` and `sha256`. The paths are relative and
        stay inside the folder of the manifest.

    Raises:
        ArtifactError: the manifest is damaged.
    """
    return list(_read_manifest(manifest_path)["files"])


def _read_manifest(manifest_path: Path) -> Facts:
    manifest = read_sealed(manifest_path)
    manifest.pop(SEAL, None)
    try:
        entries = [Facts(manifest_path, entry) for entry in manifest.get("files", ())]
        known = "files" in manifest and all(
            _stays_inside(e["path"]) and e["bytes"] >= 0 and e["sha256"] for e in entries
        )
    except (ArtifactError, TypeError, ValueError):
        known = False
    if not known:
        raise ArtifactError(
            f"{manifest_path}: damaged: it has no valid list of files; restore it from a backup"
        )
    manifest["files"] = entries
    return manifest


def _stays_inside(path: str) -> bool:
    parts = PurePosixPath(path).parts
    return bool(parts) and not path.startswith("/") and ".." not in parts


def verify(manifest_path: Path, on_bytes: OnDone = ignore) -> None:
    """Check every file of an artifact against its manifest.

    Args:
        manifest_path: the manifest of the artifact.
        on_bytes: called with the number of bytes read since the last call. It may raise.

    Raises:
        ArtifactError: naming the file that is missing, truncated or altered.
    """
    for entry in read_files(manifest_path):
        verify_file(manifest_path.parent / entry["path"], entry, on_bytes, manifest_path.name)


def verify_file(
    path: Path, entry: Mapping[str, Any], on_bytes: OnDone = ignore, listed_in: str = MANIFEST
) -> None:
    """Check one file against its manifest entry.

    Args:
        path: the file.
        entry: has `bytes` and `sha256`.
        on_bytes: called with the number of bytes read since the last call. It may raise.
        listed_in: name of the manifest, for messages.

    Raises:
        ArtifactError: the file is missing, truncated or altered.
    """
    size = entry["bytes"]
    if not path.is_file():
        raise ArtifactError(f"{path}: missing, but {listed_in} lists it; restore it from a backup")
    if path.stat().st_size != size:
        raise ArtifactError(
            f"{path}: damaged: {path.stat().st_size} bytes, but published with {size}; restore "
            "it from a backup"
        )
    if sha256_of(path, on_bytes) != entry["sha256"]:
        raise ArtifactError(
            f"{path}: damaged: its content differs from the published one; restore it from a backup"
        )


def read_listed_json(folder: Path, name: str) -> Facts:
    """Read a JSON mapping of an artifact, after checking the file against the manifest.

    Raises:
        ArtifactError: the manifest or the file is damaged.
    """
    entry = next((e for e in read_files(folder / MANIFEST) if e["path"] == name), None)
    if entry is None:
        raise ArtifactError(f"{folder / MANIFEST}: damaged: it does not list {name}")
    verify_file(folder / name, entry)
    return read_facts(folder / name)


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
        refuse_links(folder, folder.iterdir())
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
        p for p in folder.iterdir() if not p.name.startswith(TEMPORARY_PREFIX)
    ):
        raise InputError(
            f"--output {folder}: the folder is not empty and was not created by tpaw; "
            "choose another --output"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, {"settings": dict(settings), **facts})


def deliver(folder: Path, name: str, write: Callable[[Path], None], **facts: Any) -> Path:
    """Write a file of a sharded artifact and flush it to disk, but do not publish it.

    Any process may call it, at any time: the names are unique, so nothing is overwritten, and
    `ShardedArtifact.receive` publishes the first delivery of a name and removes later ones.

    Args:
        folder: the folder of the artifact. It exists.
        name: name of the file inside the folder.
        write: writes the content to the path that it receives.
        facts: values to store in the manifest entry beside size and hash.

    Returns:
        The record of the delivery, for `ShardedArtifact.receive`.
    """
    path = folder / name
    data = path.with_name(f"{DELIVERED_PREFIX}{secrets.token_hex(8)}-{path.name}")
    write_file(data, write)
    record = data.with_name(f"{data.name}.json")
    write_sealed(record, {"entry": describe_file(folder, data) | {"path": name} | facts})
    return record


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
            _read_manifest(self._path) if self._path.exists() else {"files": []}
        )

    @property
    def entries(self) -> list[Facts]:
        """The manifest entries, in the order of their names once the artifact is complete."""
        return list(self._manifest["files"])

    @property
    def names(self) -> set[str]:
        """Names of the published files."""
        return {entry["path"] for entry in self._manifest["files"]}

    def begin(self, meta: Mapping[str, Any] = MappingProxyType({})) -> Facts:
        """Create the folder, so that files can be delivered into it.

        Files that were delivered to a process that died are published. Call it once, before work
        is given out: it removes what was delivered only in part.

        Args:
            meta: values to store in the manifest. Those that it has already stay.

        Returns:
            The manifest.
        """
        self._manifest = dict(meta) | self._manifest
        self._create()
        for record in sorted(self.folder.rglob(f"{DELIVERED_PREFIX}*.json")):
            if not record.is_symlink():
                self.receive(record)
        self._remove_remains()
        return Facts(self._path, self._manifest)

    def receive(self, record: Path) -> None:
        """Publish a delivered file, unless a file of its name is published already.

        Args:
            record: what `deliver` returned.
        """
        check_held(self.folder)
        entry = Facts(record, read_sealed(record)["entry"])
        data, path = record.with_suffix(""), self.folder / entry["path"]
        if entry["path"] not in self.names and _is_of(data, path):
            is_here = data.is_file()
            if is_here:
                os.replace(data, path)
                flush(path.parent)
            # A crash after the renaming leaves the file under its own name.
            if is_here or (
                path.is_file() and describe_file(self.folder, path).items() <= entry.items()
            ):
                self._manifest["files"].append(Facts(self._path, entry))
                write_sealed(self._path, self._manifest)
        for done in (data, record):
            done.unlink(missing_ok=True)

    def publish(self, name: str, write: Callable[[Path], None], **facts: Any) -> None:
        """Publish one file.

        Args:
            name: name of the file inside the folder.
            write: writes the content to the path that it receives.
            facts: values to store in the manifest entry beside size and hash.
        """
        self._create()
        self.receive(deliver(self.folder, name, write, **facts))

    def complete(self, meta: Mapping[str, Any]) -> None:
        """Mark the artifact as complete.

        Args:
            meta: values to store in the manifest.
        """
        self._remove_remains()
        self._manifest["files"].sort(key=lambda entry: entry["path"])
        self._manifest |= meta
        write_sealed(self._path, self._manifest)
        os.replace(self._path, self.folder / MANIFEST)
        flush(self.folder)
        self._path = self.folder / MANIFEST
        self.is_complete = True

    def _remove_remains(self) -> None:
        """Remove what processes that died have written, and nobody will receive."""
        for pattern in (f"{DELIVERED_PREFIX}*", f"{TEMPORARY_PREFIX}*{DELIVERED_PREFIX}*"):
            for path in self.folder.rglob(pattern):
                path.unlink()

    def _create(self) -> None:
        check_held(self.folder)
        if not self._path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_sealed(self._path, self._manifest)


def _is_of(data: Path, path: Path) -> bool:
    """Whether a delivered file belongs at this path, and is no link."""
    return (
        data.parent == path.parent
        and data.name.startswith(DELIVERED_PREFIX)
        and data.name.removeprefix(DELIVERED_PREFIX).partition("-")[2] == path.name
        and not data.is_symlink()
    )


def remove_artifacts(folder: Path) -> None:
    """Remove a folder with every artifact in it, such as the saved steps of an iteration.

    The manifests go first. A crash then leaves files that count as nothing, and never a manifest
    that lists files which are gone.
    """
    manifests = [path for name in (MANIFEST, PARTIAL_MANIFEST) for path in folder.rglob(name)]
    for manifest in manifests:
        manifest.unlink(missing_ok=True)
        flush(manifest.parent)
    shutil.rmtree(folder, ignore_errors=True)


def remove_temporaries(folder: Path, *, below: bool = True) -> None:
    """Remove temporary files and folders that a crash left. Links are left alone.

    Hold the lock of the run, because another process may be writing such a file.

    Args:
        folder: the folder to clean.
        below: whether to search the folders inside it too.
    """
    search = folder.rglob if below else folder.glob
    for path in sorted(search(TEMPORARY_PREFIX + "*")):
        if path.is_symlink():
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def refuse_links(folder: Path, places: Iterable[Path]) -> None:
    """Refuse symbolic links, through which TPAW would write or delete outside of the folder.

    Args:
        folder: the folder, for messages. It may itself be reached through a link.
        places: files and folders inside it. Folders are searched.

    Raises:
        InputError: naming the link.
    """
    for place in places:
        if place.is_symlink():
            raise InputError(
                f"{place}: is a symbolic link; tpaw follows no links inside {folder}; replace it "
                "by what it names"
            )
        if place.is_dir():
            refuse_links(folder, place.iterdir())


def sha256_of(path: Path, on_bytes: OnDone = ignore) -> str:
    """Hash a file.

    Args:
        path: the file.
        on_bytes: called with the number of bytes read since the last call. It may raise.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while content := file.read(BYTES_READ_AT_ONCE):
            digest.update(content)
            on_bytes(len(content))
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk.

    Raises:
        StorageError: the file system cannot do that.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
        raise StorageError(
            f"{path}: the file system cannot flush it to the disk ({error.strerror}), so a crash "
            "could lose work; choose a folder on a local disk, or see "
            "docs/reference/run-directory.md"
        ) from None
    finally:
        os.close(descriptor)
