"""θ_0, the SFT model: found, fingerprinted, and recorded once in the run."""

from __future__ import annotations

from pathlib import Path

from tpaw.config.schema import ModelConfig
from tpaw.errors import ArtifactError, InputError
from tpaw.models.fingerprint import fingerprint
from tpaw.storage.artifacts import read_json, write_json
from tpaw.storage.resources import resolve_path
from tpaw.team import Player

_HUB_FILES = ["*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja", "*.py"]


def initial_player(config: ModelConfig, record: Path) -> Player:
    """θ_0: found (downloaded from the hub if need be), fingerprinted, and recorded once.

    Raises:
        InputError: the weights differ from those that the run began with.
    """
    recorded = read_json(record) if record.exists() else None
    if recorded is not None and not {"fingerprint", "path", "revision"} <= set(recorded):
        raise ArtifactError(f"{record}: damaged: it names no fingerprint and revision")
    path = resolve_path(config.path)
    if recorded and recorded["revision"] is None and not Path(path).is_dir():
        # Iterations far from θ_0 do without it; those that need it say that it is not there.
        return Player(0, path, recorded["fingerprint"])
    # A branch may have moved since the run began; the commit that it was has not.
    commit = config.revision
    if recorded and recorded["path"] == config.path:
        commit = recorded["revision"]
    folder, revision = locate(config, commit)
    player = Player(0, str(folder), fingerprint(folder))
    if recorded:
        if recorded["fingerprint"] != player.fingerprint:
            raise InputError(
                f"model.path: {config.path}: its weights are not those that this run began with "
                f"({player.fingerprint[:12]} instead of {recorded['fingerprint'][:12]})"
            )
    else:
        record.parent.mkdir(exist_ok=True)
        facts = {"index": 0, "path": config.path, "revision": revision}
        write_json(record, facts | {"fingerprint": player.fingerprint})
    return player


def locate(config: ModelConfig, revision: str | None) -> tuple[Path, str | None]:
    """The folder of θ_0, downloaded from the hub if need be, and its commit there."""
    path = Path(resolve_path(config.path))
    if path.is_dir():
        return path, None
    from huggingface_hub import snapshot_download

    # The snapshot's folder is named after the commit, which is the revision for good.
    folder = Path(snapshot_download(config.path, revision=revision, allow_patterns=_HUB_FILES))
    return folder, folder.name
