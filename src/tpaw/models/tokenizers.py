"""Tokenizers, and the tokens that end a response."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tpaw.config.schema import ModelConfig
from tpaw.errors import InputError
from tpaw.storage.resources import resolve_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(config: ModelConfig, folder: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of θ_0, or the one saved in `folder`.

    Raises:
        InputError: there is none, it is empty, or it knows no such `eos_token`.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder or resolve_path(config.path),
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
    path = resolve_path(config.path)
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
