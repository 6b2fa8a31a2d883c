"""Models and tokenizers: what can be played with, how it is loaded, how it is told apart.

Everything but `load_model` works without reading a weight into memory, so that a model that
cannot be used is refused before anything expensive starts.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpaw.config.files import resolve_package_path
from tpaw.config.schema import ModelConfig, RunConfig
from tpaw.errors import ArtifactError, InputError
from tpaw.storage.artifacts import read_json, write_json
from tpaw.team import Player

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_HUB_FILES = ["*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja", "*.py"]


def check_model(config: RunConfig) -> PreTrainedConfig:
    """Refuse a model that self-play cannot use; reads its configuration only.

    Raises:
        InputError: naming the setting, for a model that is not there, an adapter, an
            encoder-decoder, a model without a language-modelling head, or too few positions.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = f"model.path: {config.model.path}"
    path = Path(resolve_package_path(config.model.path))
    if (path / "adapter_config.json").is_file():
        raise InputError(f"{name}: an adapter, not a model; merge it into its base model first")
    if path.is_dir() and not (path / "config.json").is_file():
        raise InputError(f"{name}: a folder without config.json, so not a model")
    try:
        found = AutoConfig.from_pretrained(
            str(path) if path.is_dir() else config.model.path,
            revision=config.model.revision,
            trust_remote_code=config.model.trust_remote_code,
        )
    except (OSError, ValueError, KeyError) as error:
        first_line = str(error).partition("\n")[0]
        raise InputError(
            f"{name}: neither a model folder here nor a model that the hub gives ({first_line})"
        ) from None
    if found.is_encoder_decoder:
        raise InputError(f"{name}: {found.model_type} is an encoder-decoder; it must be a decoder")
    heads = {n for v in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for n in _names(v)}
    remote = "AutoModelForCausalLM" in (getattr(found, "auto_map", None) or {})
    architectures = found.architectures or []
    if not remote and (
        found.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        or (architectures and not heads.intersection(architectures))
    ):
        what = ", ".join(architectures) or found.model_type
        raise InputError(f"{name}: {what} is not a causal language model")
    positions = getattr(found.get_text_config(), "max_position_embeddings", None)
    if positions is not None and config.max_length > positions:
        raise InputError(
            f"max_length: {config.max_length} is beyond the {positions} positions of "
            f"{config.model.path}"
        )
    _check_rope(found, config.max_length)
    _check_attention(found, config.model)
    if path.is_dir():
        weight_files(path)
    return found


def load_tokenizer(config: ModelConfig, folder: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of θ_0, or the one saved in `folder`.

    Raises:
        InputError: there is none, it is empty, or it knows no such `eos_token`.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder or resolve_package_path(config.path),
            revision=None if folder else config.revision,
            trust_remote_code=config.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        first_line = str(error).partition("\n")[0]
        raise InputError(f"model.path: {config.path}: no usable tokenizer ({first_line})") from None
    # transformers makes an empty tokenizer for a folder that holds none.
    if not tokenizer("a", add_special_tokens=False).input_ids:
        raise InputError(f"model.path: {config.path}: its tokenizer knows no text")
    if config.eos_token is not None:
        if config.eos_token not in tokenizer.get_vocab():
            raise InputError(f"model.eos_token: {config.eos_token!r} is not in the vocabulary")
        tokenizer.eos_token = config.eos_token
    return tokenizer


def stop_token_ids(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that end a response: the tokenizer's first, then those of the generation config.

    Raises:
        InputError: there are none.
    """
    from transformers import GenerationConfig

    ids = [tokenizer.eos_token_id]
    path = resolve_package_path(config.path)
    try:
        published = GenerationConfig.from_pretrained(path, revision=config.revision).eos_token_id
        ids += published if isinstance(published, list) else [published]
    except OSError as error:
        if (Path(path) / "generation_config.json").is_file():
            raise InputError(f"model.path: {path}: generation_config.json: {error}") from None
    known = tuple(dict.fromkeys(int(i) for i in ids if i is not None))
    if not known:
        raise InputError(
            f"model.path: {config.path}: the tokenizer has no end-of-sequence token; "
            "set model.eos_token"
        )
    return known


def initial_player(config: ModelConfig, record: Path) -> Player:
    """θ_0: found (downloaded from the hub if need be), fingerprinted, and recorded once.

    Raises:
        InputError: the weights differ from those that the run began with.
    """
    recorded = read_json(record) if record.exists() else None
    if recorded is not None and not {"fingerprint", "path", "revision"} <= set(recorded):
        raise ArtifactError(f"{record}: damaged: it names no fingerprint and revision")
    path = resolve_package_path(config.path)
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
    path = Path(resolve_package_path(config.path))
    if path.is_dir():
        return path, None
    from huggingface_hub import snapshot_download

    # The snapshot's folder is named after the commit, which is the revision for good.
    folder = Path(snapshot_download(config.path, revision=revision, allow_patterns=_HUB_FILES))
    return folder, folder.name


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


def load_model(
    player: Player, config: ModelConfig, *, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """Load a player, without dropout, in evaluation mode.

    Raises:
        InputError: the folder is not there.
        ArtifactError: the folder lacks some of the model's weights.
    """
    from transformers import AutoModelForCausalLM

    if not Path(player.path).is_dir():
        raise InputError(f"{player.path}: not there, but θ_{player.index} is needed")
    model, report = AutoModelForCausalLM.from_pretrained(
        player.path,
        dtype=dtype,
        attn_implementation=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
        output_loading_info=True,
    )
    # transformers fills absent weights with random ones, and says so in a warning only.
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise ArtifactError(f"{player.path}: lacks weights of the model: {missing}")
    disable_dropout(model)
    model.to(device)
    model.eval()
    return model


def disable_dropout(model: torch.nn.Module) -> None:
    """Set every dropout to 0: a log-ratio compares two forward passes, which must agree.

    Some models drop by way of a float that a function reads, and mixtures of experts may jitter
    their router; names are all that these have in common.
    """
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for holder in (*model.modules(), getattr(model, "config", None)):
        for name, value in list(vars(holder).items() if holder is not None else ()):
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(holder, name, 0.0)


def pick_device(setting: str) -> torch.device:
    """The device that `device:` asks for.

    Raises:
        InputError: cuda is asked for and not there.
    """
    import torch

    if setting == "cuda" and not torch.cuda.is_available():
        raise InputError("device: 'cuda' is not there; torch sees no CUDA device")
    use_cuda = setting == "cuda" or (setting == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if use_cuda else "cpu")


def _check_rope(found: PreTrainedConfig, max_length: int) -> None:
    text = found.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or {}
    for rope in (parameters, *parameters.values()):
        if not isinstance(rope, dict) or rope.get("rope_type") not in ("dynamic", "longrope"):
            continue
        limit = rope.get("original_max_position_embeddings") or getattr(
            text, "original_max_position_embeddings", text.max_position_embeddings
        )
        if max_length > limit:
            raise InputError(
                f"max_length: {max_length}: beyond {limit} tokens this model's {rope['rope_type']} "
                "RoPE depends on the longest row of a batch, and so would a log-prob"
            )


def _check_attention(found: PreTrainedConfig, config: ModelConfig) -> None:
    if config.attn_implementation is None:
        return
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):  # the model's shapes without its weights
            AutoModelForCausalLM.from_config(
                found,
                attn_implementation=config.attn_implementation,
                trust_remote_code=config.trust_remote_code,
            )
    except (ImportError, ValueError) as error:
        raise InputError(
            f"model.attn_implementation: {config.attn_implementation!r} cannot be used: {error}"
        ) from None


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


def _names(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)
