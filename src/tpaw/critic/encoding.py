"""Prompts and responses as the critic reads them.

Token ids if the critic has no tokenizer of its own: it then reads the run's. Otherwise text. The
token that ends a response is left out: a truncated response has none, and a critic that looks for
it would learn nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tpaw.data.token_ids import TokenIds, token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Turns the ids of a prompt and of a response into what the critic reads.
Encode = Callable[[TokenIds, TokenIds], TokenIds]


class Reader(NamedTuple):
    """How a critic reads.

    Attributes:
        encode: turns the ids of a prompt and of a response into the critic's.
        tokenizer: the tokenizer of the critic's ids: its own, or the run's.
    """

    encode: Encode
    tokenizer: PreTrainedTokenizerBase


def encode_ids(stop_ids: Collection[int], longest: int) -> Encode:
    """For a critic of the run's own vocabulary.

    Args:
        stop_ids: tokens that end a response.
        longest: what is longer loses the beginning of its prompt.
    """

    def encode(prompt: TokenIds, response: TokenIds) -> TokenIds:
        return np.concatenate([prompt, _without_end(response, stop_ids)])[-longest:]

    return encode


def encode_text(
    tokenizer: PreTrainedTokenizerBase,
    own: PreTrainedTokenizerBase,
    stop_ids: Collection[int],
    longest: int,
) -> Encode:
    """For a critic with a tokenizer of its own.

    Args:
        tokenizer: the run's.
        own: the critic's. It joins the two texts as pairs are joined in its model.
        stop_ids: tokens that end a response.
        longest: what is longer loses the beginning of its prompt.
    """
    own.truncation_side = "left"

    def encode(prompt: TokenIds, response: TokenIds) -> TokenIds:
        texts = [
            str(tokenizer.decode(ids.tolist(), skip_special_tokens=True))
            for ids in (prompt, _without_end(response, stop_ids))
        ]
        found = own(*texts, truncation="only_first", max_length=longest)
        return token_ids(found["input_ids"])

    return encode


def _without_end(response: TokenIds, stop_ids: Collection[int]) -> TokenIds:
    return response[:-1] if len(response) and int(response[-1]) in stop_ids else response
