"""D_t on disk: the responses of a player, one for each prompt. A run samples each one only once."""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tpaw.data.columns import Column, ColumnWriter, IdColumn, TextColumn
from tpaw.data.examples import Example
from tpaw.data.token_ids import TokenIds, read_columns, write_table
from tpaw.generation.generator import (
    FinishReason,
    Generator,
    SamplingParams,
)
from tpaw.runtime.progress import OnDone, note
from tpaw.storage.artifacts import ShardedArtifact, deliver, read_manifest
from tpaw.team import Player

# Columns of a parquet file, in the order of `Response`'s fields.
_COLUMNS: dict[str, type[Column[Any]]] = {
    "example_id": TextColumn,
    "token_ids": IdColumn,
    "text": TextColumn,
    "finish_reason": TextColumn,
}

_SERVER_LOGP = "server_logp"
_COUNTS = ("rows", "identical", "truncated", "repeating", "repeating_targets", "tokens")
NGRAM = 4
"""Tokens of the sequences whose repetition is counted."""

# A larger share of responses that were cut at the length limit is worth a warning.
TRUNCATED_SHARE = 0.9


class Response(NamedTuple):
    """A player's response to the prompt of an example.

    Attributes:
        example_id: id of the example.
        token_ids: int32, with the stop token if the model emitted one.
        text: the decoded response.
        finish_reason: "stop", or "length" if the response was truncated.
        server_logp: see `Completion`.
    """

    example_id: str
    token_ids: TokenIds
    text: str
    finish_reason: FinishReason
    server_logp: float | None = None


class Repeated(Sequence[Example]):
    """The examples, then the same again, `times` times. A slice gives a list."""

    def __init__(self, examples: Sequence[Example], times: int) -> None:
        self.examples = examples
        self.times = times

    def __len__(self) -> int:
        return self.times * len(self.examples)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        return self.examples[index % len(self.examples)]


class PromptShard(NamedTuple):
    """The prompts of one shard: work for one process.

    Attributes:
        name: file name of the shard.
        examples: their prompts are answered, in this order.
        seed: of the shard alone, so that a shard does not depend on the shards before it.
    """

    name: str
    examples: Sequence[Example]
    seed: int


def generate_responses(
    folder: Path,
    player: Player,
    examples: Sequence[Example],
    compute: Callable[[Iterator[PromptShard]], Iterator[Path]],
    params: SamplingParams,
    *,
    shard_size: int,
    seed: int,
    on_done: OnDone,
) -> None:
    """Generate one response for each prompt and publish them in shards. Skip published shards.

    Args:
        folder: where the artifact D_t is published.
        player: the checkpoint that generates.
        examples: their prompts are used, in this order.
        compute: calls `deliver_responses` for every shard, in any order, and returns what it
            returned. It may raise to stop the work; published shards stay.
        params: sampling settings, for the manifest.
        shard_size: number of prompts in a shard. If generation has begun, its size applies.
        seed: the run's seed. Each shard has its own seed, derived from this one.
        on_done: called with the number of prompts that were published before.
    """
    artifact = ShardedArtifact(folder)
    # The size decides which prompts a shard holds, so it must stay.
    begun = artifact.entries[0]["rows"] if artifact.entries else shard_size
    size = artifact.begin({"shard_size": begun})["shard_size"]

    def missing() -> Iterator[PromptShard]:
        for number, begin in enumerate(range(0, len(examples), size)):
            shard = PromptShard(
                f"shard-{number:05d}.parquet",
                examples[begin : begin + size],
                _shard_seed(seed, player.index, number),
            )
            if shard.name in artifact.names:
                on_done(len(shard.examples))
            else:
                yield shard

    for record in compute(missing()):
        artifact.receive(record)
    totals = {
        key: round(sum(entry[key] for entry in artifact.entries), 3)
        for key in (*_COUNTS, "seconds")
        if all(key in entry for entry in artifact.entries)  # an older version counted less
    }
    if totals["truncated"] > TRUNCATED_SHARE * totals["rows"]:
        note(
            f"Warning: {totals['truncated']} of {totals['rows']} responses of θ_{player.index} "
            "were cut before they ended. Raise generate.max_new_tokens, which is "
            f"{params.max_new_tokens}, or check that the model learned to emit its "
            "end-of-sequence token (model.eos_token)."
        )
    artifact.complete(
        {"player": player.index, "fingerprint": player.fingerprint, **params._asdict(), **totals}
    )


def deliver_responses(
    folder: Path,
    shard: PromptShard,
    generator: Generator,
    params: SamplingParams,
    decode: Callable[[TokenIds], str],
    on_done: OnDone,
) -> Path:
    """Generate the responses of one shard. Any process may do it.

    Args:
        folder: folder of the artifact D_t.
        shard: the work.
        generator: of the player that generates.
        params: sampling settings.
        decode: token ids of a response to text.
        on_done: called with the number of prompts finished since the last call. It may raise.

    Returns:
        The record of the delivery; see `storage.artifacts.deliver`.
    """
    started = time.monotonic()
    prompts = [example.prompt_ids for example in shard.examples]
    completions = generator.generate(prompts, params, shard.seed, on_done)
    seconds = round(time.monotonic() - started, 3)
    columns: dict[str, list[Any]] = {
        "example_id": [example.id for example in shard.examples],
        "token_ids": [completion.token_ids for completion in completions],
        "text": [decode(completion.token_ids) for completion in completions],
        "finish_reason": [completion.finish_reason for completion in completions],
    }
    if any(completion.server_logp is not None for completion in completions):
        columns[_SERVER_LOGP] = [completion.server_logp for completion in completions]
    identical = sum(
        np.array_equal(example.target_ids, completion.token_ids)
        for example, completion in zip(shard.examples, completions, strict=True)
    )
    return deliver(
        folder,
        shard.name,
        lambda path: write_table(path, columns),
        rows=len(shard.examples),
        identical=identical,
        truncated=sum(c.finish_reason == "length" for c in completions),
        repeating=sum(repeats_itself(c.token_ids) for c in completions),
        repeating_targets=sum(repeats_itself(example.target_ids) for example in shard.examples),
        tokens=sum(len(completion.token_ids) for completion in completions),
        seconds=seconds,
    )


class Responses(Sequence[Response]):
    """Responses as columns on disk. An index gives a `Response`; a slice gives a list.

    Attributes:
        example_ids, token_ids, texts, finish_reasons: columns, named as the fields of `Response`.
        server_logps: float64, of shape (responses,), NaN where the server gave none; None if no
            server generated the responses.
    """

    def __init__(
        self,
        example_ids: TextColumn,
        token_ids: IdColumn,
        texts: TextColumn,
        finish_reasons: TextColumn,
        server_logps: NDArray[np.float64] | None = None,
    ) -> None:
        self.example_ids = example_ids
        self.token_ids = token_ids
        self.texts = texts
        self.finish_reasons = finish_reasons
        self.server_logps = server_logps

    @classmethod
    def of(cls, responses: Iterable[Response]) -> Responses:
        """The same responses as columns."""
        if isinstance(responses, Responses):
            return responses
        writers = [ColumnWriter(kind) for kind in _COLUMNS.values()]
        server_logps = array("d")
        for response in responses:
            *values, server_logp = response
            for writer, value in zip(writers, values, strict=True):
                writer.append(value)
            server_logps.append(math.nan if server_logp is None else server_logp)
        columns: list[Any] = [writer.finish() for writer in writers]
        columns.append(_unless_all_nan(np.array(server_logps)))
        return cls(*columns)

    def in_parts_of(self, count: int) -> list[Responses]:
        """The same responses in parts: the first one to each of `count` prompts, the second, …"""
        if len(self) <= count:
            return [self]
        logps = self.server_logps
        return [
            Responses(
                self.example_ids.part(i, i + count),
                self.token_ids.part(i, i + count),
                self.texts.part(i, i + count),
                self.finish_reasons.part(i, i + count),
                None if logps is None else logps[i : i + count],
            )
            for i in range(0, len(self), count)
        ]

    def __len__(self) -> int:
        return len(self.example_ids)

    @overload
    def __getitem__(self, index: int) -> Response: ...
    @overload
    def __getitem__(self, index: slice) -> list[Response]: ...
    def __getitem__(self, index: int | slice) -> Response | list[Response]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        reason: Any = self.finish_reasons[index]
        server_logp = math.nan if self.server_logps is None else float(self.server_logps[index])
        return Response(
            self.example_ids[index],
            self.token_ids[index],
            self.texts[index],
            reason,
            None if math.isnan(server_logp) else server_logp,
        )


def read_responses(folder: Path) -> Responses:
    """Read a published D_t. The responses are in the order of the examples."""
    paths = [folder / entry["path"] for entry in ShardedArtifact(folder).entries]
    read = read_columns(paths, _COLUMNS)
    columns: list[Any] = [read[name] for name in _COLUMNS]
    columns.append(_server_logps(paths))
    return Responses(*columns)


def response_facts(folder: Path) -> dict[str, Any]:
    """Return totals of a published D_t.

    Returns:
        `rows` (responses), `identical` (responses equal to the target), `truncated` (responses cut
        at the length limit), `repeating` and `repeating_targets` (see `repeats_itself`; absent if
        an older version generated), `tokens` (response tokens) and `seconds` (time of generation).
    """
    manifest = read_manifest(folder)
    return {key: manifest[key] for key in (*_COUNTS, "seconds") if key in manifest}


def repeats_itself(token_ids: TokenIds) -> bool:
    """Whether more than half of the sequences of `NGRAM` tokens occurred before in the same text.

    Args:
        token_ids: integers, of shape (tokens,).
    """
    if len(token_ids) < NGRAM:
        return False
    ids = token_ids.tolist()
    ngrams = list(zip(*(ids[k:] for k in range(NGRAM)), strict=False))
    return len(set(ngrams)) < len(ngrams) / 2


def _server_logps(paths: Sequence[Path]) -> NDArray[np.float64] | None:
    parts = []
    for path in paths:
        with pq.ParquetFile(path) as file:
            if _SERVER_LOGP in file.schema_arrow.names:
                column = file.read([_SERVER_LOGP])[_SERVER_LOGP]
                parts.append(column.to_numpy().astype(np.float64))  # null becomes NaN
            else:
                parts.append(np.full(file.metadata.num_rows, np.nan))
    return _unless_all_nan(np.concatenate([np.empty(0), *parts]))


def _unless_all_nan(logps: NDArray[np.float64]) -> NDArray[np.float64] | None:
    return None if np.isnan(logps).all() else logps


def _shard_seed(seed: int, player_index: int, shard: int) -> int:
    return int(np.random.SeedSequence((seed, player_index, shard)).generate_state(1)[0])
