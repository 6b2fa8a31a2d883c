"""Examples: records that are templated and tokenised once.

Generation, scoring and training use the token ids of the examples without any change.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tpaw.config.schema import DataConfig
from tpaw.data.chat_template import ChatFormat, Encoded
from tpaw.data.formats import (
    SAME_ANSWERS,
    Dialogue,
    Unusable,
    columns_to_read,
    message_text,
    prompt_as_text,
    shape_of,
)
from tpaw.data.readers import read_records
from tpaw.data.token_ids import TokenIds, TokenSequence, read_table, token_ids, write_table
from tpaw.errors import InputError
from tpaw.runtime.progress import OnDone, ignore

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Example(NamedTuple):
    """A prompt and its target.

    Attributes:
        id: the number of the record in the source (from 0) and a hash of the token ids.
        prompt_ids: int32, of shape (prompt tokens,).
        target_ids: int32, of shape (target tokens,); ends with an end-of-sequence token.
        prompt_text: the templated prompt as text.
        target_text: the target as text, as it is in the record.
        rejected_ids: the rejected response of preference data, in the form of `target_ids`; None
            for other data.
    """

    id: str
    prompt_ids: TokenIds
    target_ids: TokenIds
    prompt_text: str
    target_text: str
    rejected_ids: TokenIds | None = None

    @property
    def prompt_key(self) -> bytes:
        """A key that is equal for examples with the same prompt ids."""
        return self.prompt_ids.tobytes()

    @property
    def content_key(self) -> tuple[bytes, ...]:
        """A key that is equal for examples with the same prompt, target and rejected response."""
        ids = (self.prompt_ids, self.target_ids, self.rejected_ids)
        return tuple(part.tobytes() for part in ids if part is not None)

    @property
    def target(self) -> TokenSequence:
        """The prompt and the target as one sequence."""
        return TokenSequence(self.prompt_ids, self.target_ids)


# Enough to keep the tokenizer's threads busy, and few enough to hear a stop soon.
_RECORDS_AT_A_TIME = 256

# Names of the parquet columns, in the order of `Example`'s fields.
_COLUMNS = ("id", "prompt_ids", "target_ids", "prompt", "target", "rejected_ids")


class Prepared(NamedTuple):
    """The result of `prepare_examples`.

    Attributes:
        examples: the usable records, in the order of the source.
        skipped: reason to number of records that were skipped for it.
        instructions: for each example, the prompt without the chat template.
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
    """Read records, apply the chat template and tokenise. Unusable records are skipped.

    Args:
        config: where the records are and how to read them.
        key: key path of `config` for error messages: `data` or `evaluate.data`.
        tokenizer: the tokenizer, with `model.eos_token` applied.
        stop_ids: the token ids that end a response.
        max_length: longest prompt plus response, in tokens. A longer record is unusable.
        on_done: called with the number of records processed since the last call.
        preferences: whether to require and keep rejected responses.

    Raises:
        InputError: the records cannot be read, no record is usable, or more records are unusable
            than `max_skipped` allows.
    """
    records = read_records(config, key, columns_to_read(config))
    convert = shape_of(records, config, key, preferences=preferences)
    chat = ChatFormat(tokenizer, stop_ids, config.template, f"{key}.template", max_length)
    examples: list[Example] = []
    instructions: list[str] = []
    skipped: Counter[Unusable] = Counter()
    first_skipped: dict[Unusable, int] = {}
    for start in range(0, len(records), _RECORDS_AT_A_TIME):
        dialogues = [convert(record) for record in records[start : start + _RECORDS_AT_A_TIME]]
        for number, (dialogue, example) in enumerate(
            _tokenised(dialogues, start, chat, preferences=preferences), start=start + 1
        ):
            if isinstance(example, Unusable):
                skipped[example] += 1
                first_skipped.setdefault(example, number)
            else:
                examples.append(example)
                instructions.append(prompt_as_text(dialogue.prompt))
        on_done(len(dialogues))
    share = skipped.total() / len(records)
    if not examples or share > config.max_skipped:
        reasons = "; ".join(
            f"{unusable.reason}: {count} (first: record {first_skipped[unusable]})"
            for unusable, count in skipped.most_common()
        )
        reasons += "".join(f"; {unusable.advice}" for unusable in skipped if unusable.advice)
        allowed = (
            f"{key}.max_skipped allows {config.max_skipped:.1%}"
            if examples
            else "no record is left"
        )
        raise InputError(
            f"{key}.path: {config.path}: {skipped.total()} of {len(records)} records ({share:.1%}) "
            f"are unusable, {allowed}: {reasons}"
        )
    counts = {unusable.reason: count for unusable, count in skipped.items()}
    return Prepared(examples, counts, instructions)


def write_examples(path: Path, examples: Sequence[Example]) -> None:
    """Write examples to a parquet file."""
    has_rejected = bool(examples) and examples[0].rejected_ids is not None
    names = _COLUMNS if has_rejected else _COLUMNS[:-1]
    columns = {name: [example[i] for example in examples] for i, name in enumerate(names)}
    write_table(path, columns)


def read_examples(path: Path) -> list[Example]:
    """Read examples from a file that `write_examples` wrote."""
    table = read_table(path)
    columns = [table[name] for name in _COLUMNS if name in table]
    return [Example(*fields) for fields in zip(*columns, strict=True)]


def _tokenised(
    dialogues: Sequence[Dialogue | Unusable], start: int, chat: ChatFormat, *, preferences: bool
) -> Iterator[tuple[Any, Example | Unusable]]:
    """Tokenise dialogues and yield each with its result; `start` numbers the first record."""
    usable = [dialogue for dialogue in dialogues if isinstance(dialogue, Dialogue)]
    targets = iter(chat.encode(usable))
    others = [d._replace(target=d.rejected) for d in usable if preferences and d.rejected]
    rejected = iter(chat.encode(others))
    for number, dialogue in enumerate(dialogues, start=start):
        if isinstance(dialogue, Unusable):
            yield dialogue, dialogue
            continue
        example = _example(number, dialogue, next(targets))
        if preferences and dialogue.rejected:
            example = _with_rejected(example, next(rejected))
        yield dialogue, example


def _example(number: int, dialogue: Dialogue, encoded: Encoded | Unusable) -> Example | Unusable:
    if isinstance(encoded, Unusable):
        return encoded
    ids = token_ids(encoded.prompt_ids), token_ids(encoded.target_ids)
    digest = hashlib.sha256(ids[0].tobytes() + b"|" + ids[1].tobytes()).hexdigest()
    text = message_text(dialogue.target)
    return Example(f"{number}-{digest[:12]}", *ids, encoded.prompt, text)


def _with_rejected(example: Example | Unusable, rejected: Encoded | Unusable) -> Example | Unusable:
    if isinstance(example, Unusable):
        return example
    if isinstance(rejected, Unusable):
        return Unusable(f"rejected: {rejected.reason}", rejected.advice)
    if rejected.target_ids == example.target_ids.tolist():
        return SAME_ANSWERS
    return example._replace(rejected_ids=token_ids(rejected.target_ids))
