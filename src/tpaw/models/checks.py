"""Check that a model can be used. The checks read its configuration, not its weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpaw.config.schema import ModelConfig, RunConfig
from tpaw.errors import InputError
from tpaw.models.fingerprint import weight_files
from tpaw.storage.resources import resolve_path

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def check_model(config: RunConfig) -> PreTrainedConfig:
    """Refuse a model that TPAW cannot train.

    Args:
        config: the configuration of the run; `model` and `max_length` are checked.

    Returns:
        The configuration of the model.

    Raises:
        InputError: the model cannot be found, is an adapter, is an encoder-decoder, has no
            language-modelling head or has too few positions; or its attention or weights cannot
            be used.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = f"model.path: {config.model.path}"
    path = Path(resolve_path(config.model.path))
    if (path / "adapter_config.json").is_file():
        raise InputError(f"{name}: this is an adapter; merge it into its base model first")
    if path.is_dir() and not (path / "config.json").is_file():
        raise InputError(f"{name}: the folder has no config.json; give a model folder")
    try:
        found = AutoConfig.from_pretrained(
            str(path) if path.is_dir() else config.model.path,
            revision=config.model.revision,
            trust_remote_code=config.model.trust_remote_code,
        )
    except (OSError, ValueError, KeyError) as error:
        first_line = str(error).partition("\n")[0]
        raise InputError(
            f"{name}: neither a local model folder nor a model that the Hub provides "
            f"({first_line}); check the path, the Hub id and your access rights"
        ) from None
    if found.is_encoder_decoder:
        raise InputError(
            f"{name}: {found.model_type} is an encoder-decoder; must be a decoder-only model"
        )
    heads = {n for v in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for n in _names(v)}
    remote = "AutoModelForCausalLM" in (getattr(found, "auto_map", None) or {})
    architectures = found.architectures or []
    if not remote and (
        found.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        or (architectures and not heads.intersection(architectures))
    ):
        what = ", ".join(architectures) or found.model_type
        raise InputError(
            f"{name}: {what} is not a causal language model; must be one that "
            "AutoModelForCausalLM of transformers can load"
        )
    positions = getattr(found.get_text_config(), "max_position_embeddings", None)
    if positions is not None and config.max_length > positions:
        raise InputError(
            f"max_length: {config.max_length}: {config.model.path} has only {positions} positions; "
            f"must be at most {positions}"
        )
    _check_rope(found, config.max_length)
    _check_attention(found, config.model)
    if path.is_dir():
        weight_files(path)
    return found


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
                f"max_length: {max_length}: beyond {limit} tokens, the {rope['rope_type']} RoPE of "
                "this model depends on the longest sequence of a batch, so log-probs would depend "
                f"on the batch; must be at most {limit}"
            )


def _check_attention(found: PreTrainedConfig, config: ModelConfig) -> None:
    if config.attn_implementation is None:
        return
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):  # allocates no memory for the weights
            AutoModelForCausalLM.from_config(
                found,
                attn_implementation=config.attn_implementation,
                trust_remote_code=config.trust_remote_code,
            )
    except (ImportError, ValueError) as error:
        raise InputError(
            f"model.attn_implementation: {config.attn_implementation!r}: cannot be used with this "
            f"model ({error}); remove the setting or choose another value"
        ) from None


def _names(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)
