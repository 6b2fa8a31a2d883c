"""Load tokenizers, and find the tokens that end a response."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tpaw.config.schema import ModelConfig
from tpaw.errors import InputError, first_line
from tpaw.models.adapter_files import base_of, find_file
from tpaw.models.template_trial import try_template
from tpaw.storage.resources import resolve_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(config: ModelConfig, folder: str | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer and apply `model.eos_token` to it.

    Args:
        config: the section `model` of the configuration.
        folder: a folder that holds the tokenizer. Default: that of `model.path`.

    Raises:
        InputError: there is no tokenizer, its vocabulary is empty, `eos_token` is not in its
            vocabulary, or its chat template does not end.
    """
    from transformers import AutoTokenizer

    home = _home_of(config, "tokenizer_config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder or resolve_path(home.path),
            revision=None if folder else home.revision,
            trust_remote_code=config.trust_remote_code,
        )
        tokenizer("a", add_special_tokens=False)
        ordinary = set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)
    except Exception as error:  # a damaged file makes transformers raise any type
        raise InputError(
            f"model.path: {config.path}: no usable tokenizer ({first_line(error)}); add the "
            "tokenizer's files to the model"
        ) from None
    # For a folder without a tokenizer, transformers returns an empty one.
    if not ordinary:
        raise InputError(
            f"model.path: {config.path}: its tokenizer encodes text to no tokens; add the "
            "tokenizer's files to the model"
        )
    if config.eos_token is not None:
        if config.eos_token not in tokenizer.get_vocab():
            raise InputError(
                f"model.eos_token: {config.eos_token!r}: not in the vocabulary; must be one token "
                "of it"
            )
        tokenizer.eos_token = config.eos_token
    try_template(tokenizer, config.path)
    return tokenizer


def stop_token_ids(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The token ids that end a response.

    Args:
        config: the section `model` of the configuration.
        tokenizer: the tokenizer, with `model.eos_token` applied.

    Returns:
        The tokenizer's end-of-sequence token first, then those of generation_config.json.

    Raises:
        InputError: there is no such token, or generation_config.json cannot be read.
    """
    from transformers import GenerationConfig

    ids = [tokenizer.eos_token_id]
    home = _home_of(config, "generation_config.json")
    path = resolve_path(home.path)
    try:
        published = GenerationConfig.from_pretrained(path, revision=home.revision).eos_token_id
        ids += published if isinstance(published, list) else [published]
        known = tuple(dict.fromkeys(int(i) for i in ids if i is not None))
    except Exception as error:  # a damaged file makes transformers raise any type
        known = tuple(i for i in ids if i is not None)
        if (Path(path) / "generation_config.json").is_file():
            raise InputError(
                f"model.path: {path}: generation_config.json cannot be read: {error}"
            ) from None
    if not known:
        raise InputError(
            f"model.path: {config.path}: the tokenizer has no end-of-sequence token; "
            "set model.eos_token"
        )
    return known


def _home_of(config: ModelConfig, name: str) -> ModelConfig:
    """The model that has a file: an adapter, or its base if the adapter does not have it."""
    base = base_of(config)
    return config if base is None or find_file(config, name) is not None else base
