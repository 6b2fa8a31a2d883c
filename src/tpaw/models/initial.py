"""Find θ_0 (the SFT model), download it if necessary, and record its fingerprint in the run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tpaw.config.schema import ModelConfig
from tpaw.errors import ArtifactError, InputError
from tpaw.models.adapter_files import base_of, refuse_another_base
from tpaw.models.fingerprint import adapter_fingerprint, fingerprint, weights_hash
from tpaw.storage.artifacts import Facts, read_sealed, write_sealed
from tpaw.storage.resources import resolve_path
from tpaw.team import Base, Player

_HUB_FILES = ["*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja", "*.py"]


def initial_player(config: ModelConfig, record: Path, *, may_record: bool = True) -> Player:
    """Find θ_0 and record it in the run. A Hub model is downloaded if it is not cached.

    Args:
        config: the section `model` of the configuration.
        record: the JSON file that records θ_0. It is written if it does not exist.
        may_record: whether the record may be written. Without it, nobody could tell whether the
            model is still the one that the run began with.

    Returns:
        θ_0. If its local folder no longer exists but the run has recorded it, `path` names a
        folder that does not exist; loading it raises an error.

    Raises:
        InputError: the model differs from the recorded one, the folder has no weights, or it is an
            adapter that was trained on another model.
        ArtifactError: the record is damaged or edited, or missing although it may not be written.
    """
    recorded = read_sealed(record) if record.exists() else None
    if recorded is None and not may_record:
        raise ArtifactError(
            f"{record}: missing, although the run has used θ_0; restore it from a backup, or begin "
            "a run in another folder"
        )
    path = resolve_path(config.path)
    if recorded is not None and recorded["revision"] is None and not Path(path).is_dir():
        # Later iterations do not need θ_0. `load_model` reports an iteration that does.
        return Player(0, path, recorded["fingerprint"], _recorded_base(config, path, recorded))
    # A branch may have moved since the run began, so resume with the recorded commit.
    commit = config.revision
    if recorded is not None and recorded["path"] == config.path:
        commit = recorded["revision"]
    folder, revision = locate(config, commit)
    pinned = None if recorded is None else recorded.get("base")
    base = find_base(config, commit, pinned["revision"] if pinned else None)
    weights = weights_hash(folder)
    if base is not None:
        refuse_another_base(folder, base.fingerprint, base.name)
        player = Player(0, str(folder), adapter_fingerprint(base.fingerprint, folder), base)
    else:
        player = Player(0, str(folder), fingerprint(folder, weights))
        if config.adapter is not None:  # the base alone, whose adapter is 0
            name = config.path if revision else str(folder.absolute())
            itself = Base(str(folder), player.fingerprint, name, revision)
            player = replace(player, base=itself)
    if recorded is not None:
        # Earlier versions recorded the hash of the weights alone.
        if recorded["fingerprint"] not in (player.fingerprint, weights):
            raise InputError(
                f"model.path: {config.path}: it differs from θ_0 of this run in its weights, "
                "configuration, tokenizer or chat template "
                f"(fingerprint {player.fingerprint[:12]}, recorded "
                f"{recorded['fingerprint'][:12]}); give the model that the run began with, or "
                "choose another --output"
            )
        player = replace(player, fingerprint=recorded["fingerprint"])
    else:
        record.parent.mkdir(exist_ok=True)
        facts: dict[str, object] = {"index": 0, "path": config.path, "revision": revision}
        if base is not None:
            facts["base"] = {key: getattr(base, key) for key in ("name", "revision", "fingerprint")}
        write_sealed(record, facts | {"fingerprint": player.fingerprint})
    return player


def find_base(config: ModelConfig, commit: str | None, base_commit: str | None) -> Base | None:
    """Find the base of an adapter; None for a whole model. A Hub model is downloaded.

    Args:
        config: the section `model` of the configuration.
        commit: of the adapter, if it is on the Hub.
        base_commit: of the base, if it is on the Hub; None for what the adapter says.

    Raises:
        InputError: the adapter names no base that exists.
        OSError, ValueError: the Hub's client cannot provide the base.
    """
    over = base_of(config.model_copy(update={"revision": commit}))
    if over is None:
        return None
    folder, revision = locate(over, base_commit or over.revision)
    name = over.path if revision else str(folder.absolute())
    return Base(str(folder), fingerprint(folder), name, revision)


def _recorded_base(config: ModelConfig, path: str, recorded: Facts) -> Base | None:
    base = recorded.get("base")
    if base is not None:
        if base["revision"] is None:  # a folder; whoever loads it says whether it is there
            return Base(base["name"], base["fingerprint"], base["name"])
        over = config.model_copy(update={"path": base["name"], "revision": base["revision"]})
        folder, _ = locate(over, base["revision"])
        return Base(str(folder), base["fingerprint"], base["name"], base["revision"])
    return None if config.adapter is None else Base(path, recorded["fingerprint"], path)


def locate(config: ModelConfig, revision: str | None) -> tuple[Path, str | None]:
    """Find a model's folder. A Hub model is downloaded if it is not cached.

    Args:
        config: the section `model` of the configuration.
        revision: branch, tag or commit of a Hub model; None for its main branch.

    Returns:
        The folder, and the commit of a Hub model or None for a local folder.

    Raises:
        OSError, ValueError: the Hub's client cannot provide the model.
    """
    path = Path(resolve_path(config.path))
    if path.is_dir():
        return path, None
    from huggingface_hub import snapshot_download

    # The Hub's client names the folder after the commit.
    folder = Path(snapshot_download(config.path, revision=revision, allow_patterns=_HUB_FILES))
    return folder, folder.name
