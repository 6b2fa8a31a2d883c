"""The critic as a model: a sequence classifier of transformers with one output, its score."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    PreTrainedModel,
)

from tpaw.config.schema import CriticConfig
from tpaw.critic.encoding import Reader, encode_ids, encode_text
from tpaw.data.token_ids import TokenIds
from tpaw.errors import InputError, first_line, printable
from tpaw.models.adapters import require_peft
from tpaw.runtime.progress import OnDone, ignore

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

TOKENS_IN_BATCH = 16_384
# Models round the size of their vocabulary up; none is known to have so many tokens too many.
UNUSED_TOKENS = 1024
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "spiece.model")


def small_critic(config: CriticConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """An untrained bidirectional encoder that reads the run's token ids, with mean pooling.

    Its weights come from torch's random numbers, as always.
    """
    return ModernBertForSequenceClassification(
        ModernBertConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.width,
            intermediate_size=2 * config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=max(config.width // 32, 1),
            layer_types=["full_attention"] * config.layers,
            classifier_pooling="mean",
            num_labels=1,
            initializer_range=0.06,
            pad_token_id=_padding_of(tokenizer),
            bos_token_id=None,
            eos_token_id=None,
            cls_token_id=None,
            sep_token_id=None,
        )
    )


def with_lora(model: PreTrainedModel, rank: int) -> PreTrainedModel:
    """The classifier with a new LoRA adapter on its linear layers; its head is trained too."""
    require_peft()
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="SEQ_CLS", r=rank, lora_alpha=2 * rank, target_modules="all-linear"
    )
    return cast(PreTrainedModel, get_peft_model(model, config))


def with_stored_lora(model: PreTrainedModel, folder: str) -> PreTrainedModel:
    """The classifier with an adapter and a head that were saved; it can be trained further."""
    require_peft()
    from peft import PeftModel

    return cast(PreTrainedModel, PeftModel.from_pretrained(model, folder, is_trainable=True))


def load_critic(folder: str) -> PreTrainedModel:
    """A classifier with one output, from a folder or the Hub.

    An encoder, or a classifier with several outputs, gets a new head.

    Raises:
        InputError: it cannot be loaded.
    """
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            folder,
            num_labels=1,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:  # transformers raises many types
        reason = printable(first_line(error))
        raise InputError(
            f"critic.path: {folder}: cannot be loaded ({reason}); it must be a model that "
            "AutoModelForSequenceClassification of transformers loads"
        ) from None
    encoder = f"{model.base_model_prefix}."
    others = [name for name, *_ in report["mismatched_keys"] if name.startswith(encoder)]
    if others:
        raise InputError(
            f"critic.path: {folder}: {others[0]} has another shape than config.json says; save the "
            "model again, with the config.json that belongs to it"
        )
    return cast(PreTrainedModel, model)


def reader_of(
    config: CriticConfig,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Sequence[int],
    max_length: int,
) -> Reader:
    """How the critic of a configuration reads prompts and responses.

    Raises:
        InputError: the critic has another vocabulary than its tokenizer, or than the run's if it
            has no tokenizer of its own; or it cannot be read.
    """
    if config.path is None:
        return Reader(encode_ids(stop_ids, max_length), tokenizer)
    try:
        found = AutoConfig.from_pretrained(config.path)
        own = _own_tokenizer(config.path)
    except Exception as error:  # transformers raises many types
        reason = printable(first_line(error))
        raise InputError(f"critic.path: {config.path}: cannot be read ({reason})") from None
    text = found.get_text_config()
    longest = min(max_length, getattr(text, "max_position_embeddings", None) or max_length)
    needed = _ordinary_tokens(own or tokenizer)
    if text.vocab_size < needed:
        whose = "its tokenizer" if own else "the run's tokenizer, and it has none of its own"
        raise InputError(
            f"critic.path: {config.path}: its vocabulary of {text.vocab_size} tokens is smaller "
            f"than the {needed} of {whose}; save the right tokenizer beside it, or leave "
            "critic.path out"
        )
    if own is None and text.vocab_size > needed + UNUSED_TOKENS:
        raise InputError(
            f"critic.path: {config.path}: its vocabulary of {text.vocab_size} tokens is not the "
            f"run's, {needed}, and it has no tokenizer of its own; save the right one beside it, "
            "or leave critic.path out"
        )
    if own is None or own.get_vocab() == tokenizer.get_vocab():
        return Reader(encode_ids(stop_ids, longest), tokenizer)
    return Reader(encode_text(tokenizer, own, stop_ids, longest), own)


def _ordinary_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens up to the last ordinary one. Tokenizers add special ones that no model has."""
    special = set(tokenizer.all_special_ids)
    return 1 + max((i for i in tokenizer.get_vocab().values() if i not in special), default=0)


def _own_tokenizer(path: str) -> PreTrainedTokenizerBase | None:
    folder = Path(path)
    if folder.is_dir() and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    return cast("PreTrainedTokenizerBase", AutoTokenizer.from_pretrained(path))


def set_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a model without a padding token the tokenizer's.

    A decoder finds the last token of a sequence by it.
    """
    config = model.config.get_text_config()
    if config.pad_token_id is None:
        config.pad_token_id = _padding_of(tokenizer)


def _padding_of(tokenizer: PreTrainedTokenizerBase) -> int:
    found = tokenizer.pad_token_id
    return int(tokenizer.eos_token_id if found is None else found)


@torch.inference_mode()
def scores_of(
    model: PreTrainedModel,
    sequences: Sequence[TokenIds],
    on_done: OnDone = ignore,
) -> NDArray[np.float64]:
    """The score of each sequence, in their order.

    Sequences of similar length are padded together, so a score can differ from that of the sequence
    alone by rounding.
    """
    model.eval()
    pad = int(model.config.get_text_config().pad_token_id or 0)
    order = np.argsort([len(ids) for ids in sequences], kind="stable")
    found = np.empty(len(sequences))
    begin = 0
    while begin < len(order):
        end = begin + 1
        while (
            end < len(order) and (end + 1 - begin) * len(sequences[order[end]]) <= TOKENS_IN_BATCH
        ):
            end += 1
        rows = [torch.from_numpy(np.array(sequences[i], dtype=np.int64)) for i in order[begin:end]]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(ids.shape[1])[None, :] < lengths[:, None]
        logits = model(
            input_ids=ids.to(model.device), attention_mask=mask.long().to(model.device)
        ).logits
        found[order[begin:end]] = logits.squeeze(-1).double().cpu().numpy()
        on_done(end - begin)
        begin = end
    return found
