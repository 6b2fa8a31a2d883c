"""Examples: records that are templated and tokenised once.

Generation, scoring and training use the token ids of the examples without any change.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from tpaw.config.schema import DataConfig
from tpaw.data.chat_template import ChatFormat, Encoded
from tpaw.data.columns import Column, ColumnWriter, IdColumn, KeyArray, TextColumn, row_keys
from tpaw.data.formats import (
    SAME_ANSWERS,
    Dialogue,
    Unusable,
    columns_to_read,
    message_text,
    prompt_as_text,
    shape_of,
)
from tpaw.data.readers import Record, open_records
from tpaw.data.token_ids import TokenIds, TokenSequence, read_columns, token_ids, write_table
from tpaw.errors import InputError
from tpaw.runtime.copies import copies_to_use, map_in_copies
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
    def target(self) -> TokenSequence:
        """The prompt and the target as one sequence."""
        return TokenSequence(self.prompt_ids, self.target_ids)


# Enough to keep the tokenizer's threads busy, and few enough to hear a stop soon.
_RECORDS_AT_A_TIME = 256
# So many batches are worth the start of other processes.
_BATCHES_FOR_COPIES = 16

# Names of the parquet columns, in the order of `Example`'s fields.
_COLUMNS: dict[str, type[Column[Any]]] = {
    "id": TextColumn,
    "prompt_ids": IdColumn,
    "target_ids": IdColumn,
    "prompt": TextColumn,
    "target": TextColumn,
    "rejected_ids": IdColumn,
}


class Examples(Sequence[Example]):
    """Examples as columns on disk. An index gives an `Example`; a slice gives a list.

    Attributes:
        ids, prompt_ids, target_ids, prompt_texts, target_texts: columns, named as the fields of
            `Example`.
        rejected_ids: a column; None unless the examples have rejected responses.
    """

    def __init__(
        self,
        ids: TextColumn,
        prompt_ids: IdColumn,
        target_ids: IdColumn,
        prompt_texts: TextColumn,
        target_texts: TextColumn,
        rejected_ids: IdColumn | None = None,
    ) -> None:
        self.ids = ids
        self.prompt_ids = prompt_ids
        self.target_ids = target_ids
        self.prompt_texts = prompt_texts
        self.target_texts = target_texts
        self.rejected_ids = rejected_ids

    @classmethod
    def of(cls, examples: Iterable[Example]) -> Examples:
        """The same examples as columns."""
        if isinstance(examples, Examples):
            return examples
        writer = ExampleWriter()
        for example in examples:
            writer.append(example)
        return writer.finish()

    def columns(self) -> dict[str, Any]:
        """The columns by their names in parquet files."""
        columns = (self.ids, self.prompt_ids, self.target_ids, self.prompt_texts, self.target_texts)
        named = dict(zip(_COLUMNS, columns, strict=False))
        return named if self.rejected_ids is None else {**named, "rejected_ids": self.rejected_ids}

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return Example(
            self.ids[index],
            self.prompt_ids[index],
            self.target_ids[index],
            self.prompt_texts[index],
            self.target_texts[index],
            None if self.rejected_ids is None else self.rejected_ids[index],
        )

    @cached_property
    def prompt_keys(self) -> KeyArray:
        """A hash of each prompt's ids."""
        return row_keys(self.prompt_ids)

    @cached_property
    def content_keys(self) -> KeyArray:
        """A hash of each example's prompt, target and rejected response."""
        rejected = () if self.rejected_ids is None else (self.rejected_ids,)
        return row_keys(self.prompt_ids, self.target_ids, *rejected)

    @cached_property
    def prompt_numbers(self) -> NDArray[np.int64]:
        """A number for each prompt. Equal prompts have equal numbers."""
        return np.unique(self.prompt_keys, return_inverse=True)[1].astype(np.int64, copy=False)

    @property
    def largest_id(self) -> int:
        """The largest token id; -1 if there is none."""
        columns = (self.prompt_ids, self.target_ids, self.rejected_ids)
        return max(int(c.flat.max()) if c is not None and len(c.flat) else -1 for c in columns)


class ExampleWriter:
    """Writes `Examples` one by one."""

    def __init__(self) -> None:
        self._writers: list[ColumnWriter[Any]] = [ColumnWriter(kind) for kind in _COLUMNS.values()]

    def append(self, example: Example) -> None:
        """Add one. All examples have a rejected response, or none has."""
        for writer, value in zip(self._writers, example, strict=True):
            if value is not None:
                writer.append(value)

    def finish(self) -> Examples:
        """The examples. None can be added afterwards."""
        columns = [writer.finish() for writer in self._writers]
        return Examples(*(columns if len(columns[-1]) else columns[:-1]))


class Prepared(NamedTuple):
    """The result of `prepare_examples`.

    Attributes:
        examples: the usable records, in the order of the source.
        skipped: reason to number of records that were skipped for it.
        instructions: for each example, the prompt without the chat template.
    """

    examples: Examples
    skipped: dict[str, int]
    instructions: Sequence[str]


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
    records = open_records(config, key, columns_to_read(config))
    convert = shape_of(records.head, config, key, preferences=preferences)
    chat = ChatFormat(tokenizer, stop_ids, config.template, f"{key}.template", max_length)
    prepare = _Preparation(convert, chat, preferences=preferences)
    examples, instructions = ExampleWriter(), ColumnWriter(TextColumn)
    skipped: Counter[Unusable] = Counter()
    first_skipped: dict[Unusable, int] = {}
    read = 0
    for batch in _prepared(prepare, _batches(records)):
        for number, result in enumerate(batch, start=read + 1):
            if isinstance(result, Unusable):
                skipped[result] += 1
                first_skipped.setdefault(result, number)
            else:
                examples.append(result[0])
                instructions.append(result[1])
        read += len(batch)
        on_done(len(batch))
    found = examples.finish()
    share = skipped.total() / read
    if not found or share > config.max_skipped:
        reasons = "; ".join(
            f"{unusable.reason}: {count} (first: record {first_skipped[unusable]})"
            for unusable, count in skipped.most_common()
        )
        reasons += "".join(f"; {unusable.advice}" for unusable in skipped if unusable.advice)
        allowed = (
            f"{key}.max_skipped allows {config.max_skipped:.1%}" if found else "no record is left"
        )
        raise InputError(
            f"{key}.path: {config.path}: {skipped.total()} of {read} records ({share:.1%}) "
            f"are unusable, {allowed}: {reasons}"
        )
    counts = {unusable.reason: count for unusable, count in skipped.items()}
    return Prepared(found, counts, instructions.finish())


def described_skips(skipped: Mapping[str, int]) -> str:
    """How many records were skipped, each number with its reason; `none` without any."""
    return ", ".join(f"{count:,} ({reason})" for reason, count in skipped.items()) or "none"


def write_examples(path: Path, examples: Iterable[Example]) -> None:
    """Write examples to a parquet file."""
    write_table(path, Examples.of(examples).columns())


def read_examples(path: Path) -> Examples:
    """Read examples from a file that `write_examples` wrote."""
    columns: dict[str, Any] = read_columns([path], _COLUMNS)
    return Examples(*(columns[name] for name in _COLUMNS if name in columns))


# Records with the number of the first one.
_Batch = tuple[int, list[Record]]
# An example and its prompt without the chat template, or why there is none.
_Result = tuple[Example, str] | Unusable


def _batches(records: Iterable[Record]) -> Iterator[_Batch]:
    remaining, start = iter(records), 0
    while batch := list(islice(remaining, _RECORDS_AT_A_TIME)):
        yield start, batch
        start += len(batch)


def _prepared(prepare: _Preparation, batches: Iterator[_Batch]) -> Iterator[list[_Result]]:
    """The results of each batch, from several processes if there are many batches."""
    first = list(islice(batches, _BATCHES_FOR_COPIES))
    every = chain(first, batches)
    if len(first) < _BATCHES_FOR_COPIES or copies_to_use() == 1:
        return map(prepare, every)
    return map_in_copies(prepare, every, copies_to_use())


class _Preparation:
    """Turns a batch of records into examples.

    Args:
        convert: what `shape_of` returns.
        chat: applies the chat template and tokenises.
        preferences: whether to keep rejected responses.
    """

    def __init__(
        self,
        convert: Callable[[Record], Dialogue | Unusable],
        chat: ChatFormat,
        *,
        preferences: bool,
    ) -> None:
        self.convert = convert
        self.chat = chat
        self.preferences = preferences

    def __call__(self, batch: _Batch) -> list[_Result]:
        start, records = batch
        dialogues = [self.convert(record) for record in records]
        usable = [dialogue for dialogue in dialogues if isinstance(dialogue, Dialogue)]
        targets = iter(self.chat.encode(usable))
        others = [d._replace(target=d.rejected) for d in usable if self.preferences and d.rejected]
        rejected = iter(self.chat.encode(others))
        results: list[_Result] = []
        for number, dialogue in enumerate(dialogues, start=start):
            if isinstance(dialogue, Unusable):
                results.append(dialogue)
                continue
            example = _example(number, dialogue, next(targets))
            if self.preferences and dialogue.rejected:
                example = _with_rejected(example, next(rejected))
            if isinstance(example, Unusable):
                results.append(example)
            else:
                results.append((example, prompt_as_text(dialogue.prompt)))
        return results


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
