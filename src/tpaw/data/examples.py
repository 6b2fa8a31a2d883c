"""Rows become examples: templated once, tokenised once, the ids kept for good.

Generation gets exactly the ids that training sees, because both read them from here.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tpaw.config.schema import DataConfig
from tpaw.data.chat_template import ChatFormat
from tpaw.data.formats import SAME_ANSWERS, Dialogue, Unusable, shape_of
from tpaw.data.readers import read_records
from tpaw.data.token_ids import TokenIds, read_table, token_ids, write_table
from tpaw.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OnDone = Callable[[int], None]


class Example(NamedTuple):
    """A prompt and its target.

    Attributes:
        id: row number in the source and a hash of the ids; the same when the run is made again.
        prompt_ids, target_ids: int32, final; the target ends with its end-of-sequence token.
        prompt, target: the same as text, for people and for exact match.
        rejected_ids: as target_ids, of preference data where a method wants both answers.
    """

    id: str
    prompt_ids: TokenIds
    target_ids: TokenIds
    prompt: str
    target: str
    rejected_ids: TokenIds | None = None


class Prepared(NamedTuple):
    """Examples, and how many rows were skipped for which reason."""

    examples: list[Example]
    skipped: dict[str, int]


def prepare_examples(
    config: DataConfig,
    key: str,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Sequence[int],
    max_length: int,
    on_done: OnDone = lambda count: None,
    *,
    preferences: bool = False,
) -> Prepared:
    """Read, template and tokenise; count what cannot be used.

    Args:
        key: `data` or `evaluate.data`, for errors.
        preferences: keep the rejected answers, and refuse data that has none.
        on_done: called with the number of rows read since the last call.

    Raises:
        InputError: no usable row, or more unusable ones than `max_skipped`.
    """
    rows = read_records(config, key)
    convert = shape_of(rows, config, key, preferences=preferences)
    chat = ChatFormat(tokenizer, stop_ids, config.template, f"{key}.template")
    examples: list[Example] = []
    skipped: Counter[str] = Counter()
    first_skipped: dict[str, int] = {}
    for number, row in enumerate(rows):
        dialogue = convert(row)
        if not isinstance(dialogue, Unusable):
            if not preferences:
                dialogue = dialogue._replace(rejected=None)
            dialogue = _tokenised(dialogue, number, chat, max_length)
        if isinstance(dialogue, Unusable):
            skipped[dialogue.reason] += 1
            first_skipped.setdefault(dialogue.reason, number + 1)
        else:
            examples.append(dialogue)
        on_done(1)
    share = skipped.total() / len(rows)
    if not examples or share > config.max_skipped:
        reasons = "; ".join(
            f"{reason}: {count} (first: row {first_skipped[reason]})"
            for reason, count in skipped.most_common()
        )
        allowed = (
            f"{key}.max_skipped allows {config.max_skipped:.1%}" if examples else "none is left"
        )
        raise InputError(
            f"{key}.path: {config.path}: {skipped.total()} of {len(rows)} rows ({share:.1%}) "
            f"cannot be used, {allowed}: {reasons}"
        )
    return Prepared(examples, dict(skipped))


def write_examples(path: Path, examples: Sequence[Example]) -> None:
    """Write examples as parquet."""
    fields = [name for name in Example._fields if name != "rejected_ids"]
    if examples and examples[0].rejected_ids is not None:
        fields.append("rejected_ids")
    write_table(path, {name: [getattr(example, name) for example in examples] for name in fields})


def read_examples(path: Path) -> list[Example]:
    """Read what `write_examples` wrote."""
    table = read_table(path)
    columns = [table[name] for name in Example._fields if name in table]
    return [Example(*row) for row in zip(*columns, strict=True)]


def _tokenised(
    dialogue: Dialogue, number: int, chat: ChatFormat, max_length: int
) -> Example | Unusable:
    encoded = chat.encode(dialogue)
    if isinstance(encoded, Unusable):
        return encoded
    prompt_ids, target_ids, prompt = encoded
    if not prompt_ids or not target_ids:
        return Unusable("no tokens")
    if len(prompt_ids) + len(target_ids) > max_length:
        return Unusable(f"longer than max_length {max_length}")
    ids = token_ids(prompt_ids), token_ids(target_ids)
    digest = hashlib.sha256(ids[0].tobytes() + b"|" + ids[1].tobytes()).hexdigest()
    example = Example(f"{number}-{digest[:12]}", *ids, prompt, dialogue.target)
    if dialogue.rejected is None:
        return example
    other = dialogue._replace(target=dialogue.rejected, rejected=None)
    rejected = _tokenised(other, number, chat, max_length)
    if isinstance(rejected, Unusable):
        return Unusable(f"rejected: {rejected.reason}")
    if rejected.target_ids.tolist() == example.target_ids.tolist():
        return SAME_ANSWERS
    return example._replace(rejected_ids=rejected.target_ids)
