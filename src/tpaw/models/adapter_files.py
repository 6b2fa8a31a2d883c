"""Adapters on disk: folders in PEFT's layout, and the base that each belongs to. No torch."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tpaw.config.schema import AdapterConfig, ModelConfig
from tpaw.errors import ArtifactError, InputError, brief, first_line
from tpaw.models.fingerprint import ADAPTER_CONFIG, fingerprint, safetensors_header
from tpaw.storage.artifacts import is_published, read_manifest
from tpaw.storage.resources import resolve_path

ADAPTER_WEIGHTS = "adapter_model.safetensors"

# Values of adapter_config.json that make an adapter more, or something else, than W + s·BA.
_MORE_THAN_LORA = (
    "alora_invocation_tokens",
    "alpha_pattern",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "modules_to_save",
    "monteclora_config",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "use_rslora",
    "velora_config",
)
_MATRIX = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<kind>[AB])\.weight")


class LoraWeights(NamedTuple):
    """What the header of adapter_model.safetensors says of a plain LoRA adapter.

    Attributes:
        rank: of every layer.
        scaling: the factor of BA.
        modules: names of the layers.
    """

    rank: int
    scaling: float
    modules: frozenset[str]


def find_file(model: ModelConfig, name: str) -> Path | None:
    """A file of a model or adapter; None if it does not have it or the Hub cannot be reached.

    Args:
        model: the section `model` of the configuration.
        name: path of the file, relative to the model's folder.
    """
    folder = Path(resolve_path(model.path))
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    return _find_on_hub(model.path, model.revision, name)


@functools.lru_cache(maxsize=64)
def _find_on_hub(repository: str, revision: str | None, name: str) -> Path | None:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, name, revision=revision))
    except (OSError, ValueError):  # whoever loads the model says what is wrong
        return None


def read_adapter_config(model: ModelConfig) -> Mapping[str, Any] | None:
    """The content of adapter_config.json; None if `model.path` is a whole model.

    Args:
        model: the section `model` of the configuration.

    Raises:
        InputError: the file is damaged.
    """
    path = find_file(model, ADAPTER_CONFIG)
    if path is None:
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"model.path: {model.path}: its {ADAPTER_CONFIG} cannot be read "
            f"({first_line(error)}); restore the adapter's own file"
        ) from None
    if not isinstance(found, dict):
        raise InputError(
            f"model.path: {model.path}: its {ADAPTER_CONFIG} is not a mapping; restore the "
            "adapter's own file"
        )
    return found


def base_of(model: ModelConfig) -> ModelConfig | None:
    """The base of an adapter, as the section `model` of a configuration; None for a whole model.

    A relative folder is looked for in the working directory, as PEFT does, then beside the
    adapter's files.

    Args:
        model: the section `model`; its `path` may be an adapter.

    Raises:
        InputError: adapter_config.json is damaged, or names no base, or one that does not exist or
            is an adapter.
    """
    found = read_adapter_config(model)
    if found is None:
        return None
    name, key = found.get("base_model_name_or_path"), f"model.path: {model.path}"
    if not isinstance(name, str) or not name:
        raise InputError(
            f"{key}: its {ADAPTER_CONFIG} does not say which model the adapter belongs to; set "
            "base_model_name_or_path there to a folder or a Hub id"
        )
    beside = Path(resolve_path(model.path)) / name
    if not Path(name).is_dir() and beside.is_dir():
        name = str(beside.resolve())
    if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise InputError(
            f"{key}: the base of this adapter, {name}, does not exist; set "
            f"base_model_name_or_path in its {ADAPTER_CONFIG} to the folder or Hub id of its base"
        )
    revision = found.get("revision")
    base = model.model_copy(
        update={"path": name, "revision": revision if isinstance(revision, str) else None}
    )
    if find_file(base, ADAPTER_CONFIG) is not None:
        raise InputError(
            f"{key}: the base of this adapter, {name}, is an adapter too; merge that one into its "
            "base first"
        )
    return base


def read_lora(folder: Path, found: Mapping[str, Any]) -> LoraWeights:
    """Rank, scaling and layers of a plain LoRA adapter. Only the headers of files are read.

    Args:
        folder: the adapter's folder.
        found: the content of its adapter_config.json.

    Raises:
        InputError: the adapter has no weights, they are damaged, or it is not a plain LoRA adapter.
    """
    reason = _why_not_plain(found)
    shapes = adapter_shapes(folder)
    ranks: set[int] = set()
    modules: set[str] = set()
    for name, shape in shapes.items():
        matched = _MATRIX.fullmatch(name)
        if matched is None:
            reason = reason or f"it holds {name}"
            continue
        modules.add(matched["module"])
        ranks.add(shape[0] if matched["kind"] == "A" else shape[-1])
    if reason is None and ranks != {found.get("r")}:
        reason = f"its weights have the ranks {sorted(ranks)}"
    if reason is not None:
        raise InputError(
            f"model.path: {folder}: only a plain LoRA adapter can be trained further, and "
            f"{reason}; remove model.adapter, so that it is merged into its base, or merge it first"
        )
    return LoraWeights(
        int(found["r"]), float(found["lora_alpha"]) / int(found["r"]), frozenset(modules)
    )


def adapter_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of an adapter, by its name.

    Raises:
        InputError: the adapter has no safetensors file, or it is damaged.
    """
    file = folder / ADAPTER_WEIGHTS
    if not file.is_file():
        raise InputError(
            f"model.path: {folder}: the adapter has no {ADAPTER_WEIGHTS}; give a complete adapter"
        )
    return {name: tuple(facts["shape"]) for name, facts in safetensors_header(file).items()}


def settings_of(folder: Path, found: Mapping[str, Any]) -> AdapterConfig | None:
    """The section `model.adapter` that trains an adapter further; None if none can.

    Args:
        folder: the adapter's folder.
        found: the content of its adapter_config.json.
    """
    try:
        lora = read_lora(folder, found)
    except InputError:
        return None
    targets = found.get("target_modules")
    names = (targets,) if isinstance(targets, str) else tuple(targets or ())
    return AdapterConfig(rank=lora.rank, alpha=lora.scaling * lora.rank, target_modules=names)


def refuse_another_base(folder: Path, base: str, name: str) -> None:
    """Refuse an adapter whose manifest says that it was trained on another model.

    An adapter that TPAW did not make has no manifest; then only the shapes can be compared.

    Args:
        folder: the adapter's folder.
        base: fingerprint of the base that it is to go on.
        name: the base, for the error.

    Raises:
        InputError: the fingerprints differ.
    """
    recorded = recorded_facts(folder).get("base")
    if recorded is not None and recorded != base:
        raise InputError(
            f"model.path: {folder}: this adapter was trained on another model than {name} "
            f"(fingerprint {brief(recorded)[1:13]}, found {base[:12]}); set "
            f"base_model_name_or_path in its {ADAPTER_CONFIG} to its own base"
        )


def recorded_facts(folder: Path) -> Mapping[str, Any]:
    """What the manifest of a checkpoint says; empty for an adapter that TPAW did not make."""
    try:
        return read_manifest(folder) if is_published(folder) else {}
    except ArtifactError:  # a manifest of something else
        return {}


def base_fingerprint(model: ModelConfig) -> str | None:
    """The fingerprint of a base in a local folder; None if it must be downloaded first."""
    folder = Path(resolve_path(model.path))
    return fingerprint(folder) if folder.is_dir() else None


def _why_not_plain(found: Mapping[str, Any]) -> str | None:
    if found.get("peft_type") != "LORA":
        return f"its peft_type is {brief(found.get('peft_type'))}"
    for key in _MORE_THAN_LORA:
        if found.get(key):
            return f"it has {key}"
    if found.get("bias", "none") != "none":
        return f"its bias is {brief(found['bias'])}"
    if not isinstance(found.get("init_lora_weights", True), bool | None) and (
        found["init_lora_weights"] not in ("gaussian", "orthogonal", "eva")
    ):
        return f"its initialisation, {brief(found['init_lora_weights'])}, changes the base"
    if not isinstance(found.get("r"), int) or not isinstance(found.get("lora_alpha"), int | float):
        return "it has no r or lora_alpha"
    return None
