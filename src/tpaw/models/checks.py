"""Check that a model can be used, before anything expensive starts. No weights are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpaw.config.schema import ModelConfig
from tpaw.errors import InputError, brief, first_line, printable
from tpaw.models.adapter_files import (
    base_fingerprint,
    base_of,
    read_adapter_config,
    recorded_facts,
    refuse_another_base,
)
from tpaw.models.adapters import check_continues, check_fits, check_targets, require_peft
from tpaw.models.fingerprint import weight_files
from tpaw.models.initial import locate
from tpaw.storage.resources import resolve_path

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


# What transformers' classes raise if a configuration does not fit them.
BUILD_ERRORS = (
    ValueError,
    RuntimeError,
    ArithmeticError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
)


def check_model(
    model: ModelConfig, max_length: int | None = None, *, is_trained: bool = False
) -> PreTrainedConfig:
    """Refuse a model that cannot be used. Its weights are compared with its configuration by shape.

    Args:
        model: the section `model` of the configuration; `path` is the model to check.
        max_length: longest prompt plus response in tokens; None if it is not known.
        is_trained: whether the model is trained; quantised weights are then refused.

    Returns:
        The configuration of the model.

    Raises:
        InputError: the model cannot be found or read, is an encoder-decoder, has no
            language-modelling head, is quantised, is pickled, or has too few positions; its
            attention cannot be used; its weights do not fit its configuration; or it is an adapter
            that does not fit its base or the section `adapter`.
    """
    if (base := base_of(model)) is not None:
        return _check_adapter(model, base, max_length, is_trained=is_trained)
    name = f"model.path: {model.path}"
    path = Path(resolve_path(model.path))
    if path.is_dir() and not (path / "config.json").is_file():
        raise InputError(f"{name}: the folder has no config.json; give a model folder")
    found = read_config(model)
    _check_kind(name, found)
    quantization = getattr(found, "quantization_config", None)
    if quantization is not None and is_trained:
        raise InputError(
            f"{name}: its weights are quantised ({_method_of(quantization)}), and quantised "
            "weights cannot be trained; give the model before quantisation"
        )
    if max_length is not None:
        _check_length(model, found, max_length)
    _check_attention(found, model)
    if path.is_dir():
        check_weights(model, path, is_quantised=quantization is not None)
    if model.adapter is not None and is_trained:
        require_peft()
        check_targets(found, model.adapter, model.trust_remote_code)
    return found


def _check_adapter(
    model: ModelConfig, base: ModelConfig, max_length: int | None, *, is_trained: bool
) -> PreTrainedConfig:
    require_peft()
    kind = (read_adapter_config(model) or {}).get("peft_type")
    if kind != "LORA":
        raise InputError(
            f"model.path: {model.path}: its peft_type is {brief(kind)}; the adapter must be LORA, "
            "or an ordinary model"
        )
    found = check_model(base, max_length, is_trained=is_trained)
    folder, _ = locate(model, model.revision)
    check_fits(folder, found, base.path, model.trust_remote_code)
    facts = recorded_facts(folder)
    if facts.get("base") and (actual := base_fingerprint(base)) is not None:
        refuse_another_base(folder, actual, base.path)
    if is_trained and facts.get("quantization") and model.quantization is None:
        raise InputError(
            f"model.path: {model.path}: this adapter was trained over a base in "
            f"{facts['quantization']}; set model.quantization to it, or write an ordinary model by "
            "`tpaw export --merge` and give that"
        )
    if model.adapter is not None and is_trained:
        saved = read_adapter_config(model)
        check_continues(folder, saved, found, model.adapter, model.trust_remote_code)
    return found


def read_config(model: ModelConfig) -> PreTrainedConfig:
    """The configuration of a model, or of the base of an adapter.

    Args:
        model: the section `model` of the configuration.

    Raises:
        InputError: it cannot be found or read.
    """
    model = base_of(model) or model
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    name, path = f"model.path: {model.path}", Path(resolve_path(model.path))
    try:
        return AutoConfig.from_pretrained(
            str(path) if path.is_dir() else model.path,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
        )
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        StrictDataclassError,
    ) as error:
        if path.is_dir():
            raise InputError(
                f"{name}: transformers cannot read its config.json "
                f"({first_line(error)}); give the folder of a model"
            ) from None
        raise InputError(
            f"{name}: neither a local model folder nor a model that the Hub provides "
            f"({first_line(error)}); check the path, the Hub id and your access rights"
        ) from None


def check_weights(model: ModelConfig, folder: Path, *, is_quantised: bool = False) -> None:
    """Refuse weights that are damaged, pickled, incomplete or of other shapes than the model.

    transformers loads the model without memory for the weights, so that its own rules decide
    which tensor of the files becomes which weight.

    Args:
        model: the section `model` of the configuration.
        folder: the model's folder.
        is_quantised: whether config.json says that the weights are quantised.

    Raises:
        InputError: naming the weights, or the setting that allows them.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    name = f"model.path: {model.path}"
    if weight_files(folder)[0].suffix == ".bin":
        if not model.allow_pickle:
            raise InputError(
                f"{name}: its weights are pickled (.bin), and a pickled file can run code when it "
                "is read; convert it to safetensors, or set model.allow_pickle to true if you "
                "trust its authors"
            )
        return  # reading a pickled file takes as long as loading it
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)  # its report of what differs; ours is one line
    logging.disable_progress_bar()
    try:
        _, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto",
            device_map="meta",
            trust_remote_code=model.trust_remote_code,
            ignore_mismatched_sizes=True,  # reported, not raised
            output_loading_info=True,
        )
    except ImportError as error:
        what = "its weights are quantised, and reading them needs a library" if is_quantised else ""
        raise InputError(
            f"{name}: {what or 'it needs a library'} ({first_line(error)}); install it, or give "
            "another model"
        ) from None
    except BUILD_ERRORS as error:
        if is_quantised:  # some methods cannot load without memory; loading will tell
            return
        raise cannot_build(model, error) from None
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    if is_quantised:
        return
    if report["mismatched_keys"]:
        key, in_file, in_model = sorted(report["mismatched_keys"])[0]
        raise InputError(
            f"{name}: the weights do not fit config.json: {key} has the shape {tuple(in_file)}, "
            f"config.json says {tuple(in_model)}; restore the model's own files"
        )
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise InputError(f"{name}: weights are missing: {missing}; restore the complete model")


def cannot_build(model: ModelConfig, error: Exception) -> InputError:
    """The error for a configuration that does not fit transformers' class of the model."""
    return InputError(
        f"model.path: {model.path}: transformers cannot build this model "
        f"({type(error).__name__}: {first_line(error)}); check its config.json"
    )


def check_vocabulary(model: ModelConfig, found: PreTrainedConfig, largest_id: int) -> None:
    """Refuse a tokenizer that gives token ids which the model does not have.

    Args:
        model: the section `model` of the configuration.
        found: the configuration of the model.
        largest_id: the largest token id that is used.
    """
    if largest_id >= (vocab_size := found.get_text_config().vocab_size):
        raise InputError(
            f"model.path: {model.path}: the tokenizer gives token id {largest_id}, the model has "
            f"{vocab_size} tokens; they do not belong together"
        )


def why_length_matters(found: PreTrainedConfig, longest: int) -> str | None:
    """Say why log-probs would depend on the longest sequence of a batch.

    Args:
        found: the configuration of the model.
        longest: tokens of the longest sequence.

    Returns:
        The reason, which ends with the limit; None if they do not.
    """
    text = found.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or {}
    for rope in (parameters, *parameters.values()):
        if not isinstance(rope, dict) or rope.get("rope_type") not in ("dynamic", "longrope"):
            continue
        limit = rope.get("original_max_position_embeddings") or getattr(
            text, "original_max_position_embeddings", text.max_position_embeddings
        )
        if longest > limit:
            return (
                f"beyond {limit} tokens, the {rope['rope_type']} RoPE of this model depends on the "
                "longest sequence of a batch, so log-probs would depend on the batch; must be at "
                f"most {limit}"
            )
    return None


def _check_kind(name: str, found: PreTrainedConfig) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

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


def _check_length(model: ModelConfig, found: PreTrainedConfig, max_length: int) -> None:
    positions = getattr(found.get_text_config(), "max_position_embeddings", None)
    # XLNet and others write -1 for "no limit".
    if positions is not None and 0 <= positions < max_length:
        raise InputError(
            f"max_length: {max_length}: {model.path} has only {positions} positions; "
            f"must be at most {positions}"
        )
    if (reason := why_length_matters(found, max_length)) is not None:
        raise InputError(f"max_length: {max_length}: {reason}")


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


def _method_of(quantization: Any) -> str:
    as_dict = quantization if isinstance(quantization, dict) else vars(quantization)
    return printable(str(as_dict.get("quant_method", "unknown method")))


def _names(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)
