"""Remove the weights of a checkpoint that no later stage needs; its manifest stays as a record.

The manifest names the fingerprint, by which log-probs and results are stored, and the training log.
So everything but loading the checkpoint works as before.
"""

from __future__ import annotations

from pathlib import Path

from tpaw.errors import ArtifactError
from tpaw.storage.artifacts import MANIFEST, flush, read_json, read_manifest, write_sealed

REMOVED = "removed"
"""Key of a manifest: `by`, the setting, and `files`, the entries of the removed files."""
_SUFFIXES = (".safetensors", ".safetensors.index.json")


def remove_weights(checkpoint: Path, by: str) -> None:
    """Remove the weights of a published checkpoint. Do nothing if they are removed already.

    The manifest is replaced first, in one rename. A crash before leaves a whole checkpoint. A crash
    after leaves files that count as nothing; `finish_removal` removes them.

    Args:
        checkpoint: the artifact.
        by: the setting that asks for it, such as `keep: last`, for messages.

    Raises:
        ArtifactError: the manifest is damaged.
    """
    manifest = read_manifest(checkpoint)
    if REMOVED in manifest:
        return
    files = manifest.pop("files")
    weights = [entry for entry in files if entry["path"].endswith(_SUFFIXES)]
    others = [entry for entry in files if entry not in weights]
    facts = {"files": others, **manifest, REMOVED: {"by": by, "files": weights}}
    write_sealed(checkpoint / MANIFEST, facts)
    finish_removal(checkpoint)


def finish_removal(checkpoint: Path) -> None:
    """Remove what a crash during `remove_weights` left. Do nothing if there is nothing to do.

    Raises:
        ArtifactError: the manifest is damaged.
    """
    if not (checkpoint / MANIFEST).exists():
        return
    manifest = read_manifest(checkpoint)
    if REMOVED not in manifest:
        return
    try:
        gone = {entry["path"] for entry in manifest[REMOVED]["files"]}
    except (KeyError, TypeError):
        raise ArtifactError(
            f"{checkpoint / MANIFEST}: damaged: it has no valid list of removed files; restore it "
            "from a backup"
        ) from None
    # Files of this folder alone, so that no manifest leads out of it.
    left = [p for p in sorted(checkpoint.iterdir()) if p.is_file() and p.name in gone]
    for path in left:
        path.unlink()
    if left:
        flush(checkpoint)


def removed_by(folder: Path) -> str | None:
    """The setting by which the weights of a checkpoint were removed; None if they were not.

    Args:
        folder: any folder. One that is no checkpoint of a run, or has a damaged manifest, gives
            None.
    """
    try:
        return str(read_json(folder / MANIFEST)[REMOVED]["by"])
    except (ArtifactError, KeyError, TypeError, IndexError):
        return None
