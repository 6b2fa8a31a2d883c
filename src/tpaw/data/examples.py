"""Records become examples: templated once, tokenised once. The ids are final.

Generation and training read the same ids from here.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tpaw.config.schema import DataConfig
from tpaw.data.chat_template import ChatFormat
from tpaw.data.formats import SAME_ANSWERS, Dialogue, Unusable, prompt_as_text, shape_of
from tpaw.data.readers import read_records
from tpaw.data.token_ids import TokenIds, TokenSequence, read_table, token_ids, write_table
from tpaw.errors import InputError
from tpaw.runtime.progress import OnDone, ignore

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Example(NamedTuple):
    """A prompt and its target.

    Attributes:
        id: record number in the source and a hash of the ids; the same when the run is repeated.
        prompt_ids: int32, final.
        target_ids: int32, final; ends with its end-of-sequence token.
        prompt_text, target_text: the same as text, for people and for exact match.
        rejected_ids: the other answer of preference data, like `target_ids`.
    """

    id: str
    prompt_ids: TokenIds
    target_ids: TokenIds
    prompt_text: str
    target_text: str
    rejected_ids: TokenIds | None = None

    @property
    def prompt_key(self) -> bytes:
        """Equal for examples with the same prompt ids."""
        return self.prompt_ids.tobytes()

    @property
    def target(self) -> TokenSequence:
        """The prompt and the target as the model reads them."""
        return TokenSequence(self.prompt_ids, self.target_ids)


# Columns of the parquet files, in the order of `Example`'s fields.
_COLUMNS = ("id", "prompt_ids", "target_ids", "prompt", "target", "rejected_ids")


class Prepared(NamedTuple):
    """What `prepare_examples` made of the records.

    Attributes:
        skipped: how many records were skipped, by reason.
        instructions: for each example, the prompt before the chat template was applied.
    """

    examples: list[Example]
    skipped: dict[str, int]
    instructions: list[str]


def prepare_examples(
    config: DataConfig,
    key: str,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Sequence[int],
    max_length: int,
    on_done: OnDone = ignore,
    *,
    preferences: bool = False,
) -> Prepared:
    """Read, template and tokenise; count the records that cannot be used.

    Args:
        key: `data` or `evaluate.data`, for errors.
        preferences: keep the rejected answers, and refuse data that has none.
        on_done: called with the number of records read since the last call.

    Raises:
        InputError: no record is usable, or more are unusable than `max_skipped` allows.
    """
    records = read_records(config, key)
    convert = shape_of(records, config, key, preferences=preferences)
    chat = ChatFormat(tokenizer, stop_ids, config.template, f"{key}.template")
    examples: list[Example] = []
    instructions: list[str] = []
    skipped: Counter[str] = Counter()
    first_skipped: dict[str, int] = {}
    for number, record in enumerate(records):
        example = dialogue = convert(record)
        if not isinstance(dialogue, Unusable):
            if not preferences:
                dialogue = dialogue._replace(rejected=None)
            example = _tokenised(dialogue, number, chat, max_length)
        if isinstance(example, Unusable):
            skipped[example.reason] += 1
            first_skipped.setdefault(example.reason, number + 1)
        else:
            examples.append(example)
            instructions.append(prompt_as_text(dialogue.prompt))
        on_done(1)
    share = skipped.total() / len(records)
    if not examples or share > config.max_skipped:
        reasons = "; ".join(
            f"{reason}: {count} (first: row {first_skipped[reason]})"
            for reason, count in skipped.most_common()
        )
        allowed = (
            f"{key}.max_skipped allows {config.max_skipped:.1%}" if examples else "none is left"
        )
        raise InputError(
            f"{key}.path: {config.path}: {skipped.total()} of {len(records)} rows ({share:.1%}) "
            f"cannot be used, {allowed}: {reasons}"
        )
    return Prepared(examples, dict(skipped), instructions)


def write_examples(path: Path, examples: Sequence[Example]) -> None:
    """Write examples as parquet."""
    has_rejected = bool(examples) and examples[0].rejected_ids is not None
    names = _COLUMNS if has_rejected else _COLUMNS[:-1]
    columns = {name: [example[i] for example in examples] for i, name in enumerate(names)}
    write_table(path, columns)


def read_examples(path: Path) -> list[Example]:
    """Read what `write_examples` wrote."""
    table = read_table(path)
    columns = [table[name] for name in _COLUMNS if name in table]
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
