"""D_t on disk: the responses of a player, one for each prompt. A run samples each one only once."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np

from tpaw.config.schema import GenerateConfig
from tpaw.data.columns import Column, ColumnWriter, IdColumn, TextColumn
from tpaw.data.examples import Example
from tpaw.data.token_ids import TokenIds, read_columns, write_table
from tpaw.generation.generator import (
    Completion,
    FinishReason,
    Generator,
    OpenGenerator,
    SamplingParams,
)
from tpaw.runtime.progress import OnDone, note
from tpaw.storage.artifacts import ShardedArtifact, read_manifest
from tpaw.team import Player

# Columns of a parquet file, in the order of `Response`'s fields.
_COLUMNS: dict[str, type[Column[Any]]] = {
    "example_id": TextColumn,
    "token_ids": IdColumn,
    "text": TextColumn,
    "finish_reason": TextColumn,
}

# A larger share of responses that were cut at the length limit is worth a warning.
TRUNCATED_SHARE = 0.9


class Response(NamedTuple):
    """A player's response to the prompt of an example.

    Attributes:
        example_id: id of the example.
        token_ids: int32, with the stop token if the model emitted one.
        text: the decoded response.
        finish_reason: "stop", or "length" if the response was truncated.
    """

    example_id: str
    token_ids: TokenIds
    text: str
    finish_reason: FinishReason


def generate_responses(
    folder: Path,
    player: Player,
    examples: Sequence[Example],
    open_generator: OpenGenerator,
    config: GenerateConfig,
    decode: Callable[[TokenIds], str],
    params: SamplingParams,
    *,
    seed: int,
    on_done: OnDone,
) -> None:
    """Generate one response for each prompt and publish them in shards. Skip published shards.

    Args:
        folder: where the artifact D_t is published.
        player: the checkpoint that generates.
        examples: their prompts are used, in this order.
        open_generator: called only if a shard is missing.
        config: its `shard_size` is the number of prompts in a shard, if no shard is published yet.
        decode: token ids of a response to text.
        params: sampling settings.
        seed: the run's seed. Each shard has its own seed, derived from this one, so that a shard
            does not depend on the shards before it.
        on_done: called with the number of prompts finished since the last call. It may raise to
            stop the work; published shards stay.
    """
    artifact = ShardedArtifact(folder)
    # The setting may have changed since the first shard. Its size decides which prompts the others
    # hold.
    size = artifact.entries[0]["rows"] if artifact.entries else config.shard_size
    with contextlib.ExitStack() as stack:
        generator: Generator | None = None
        for number, begin in enumerate(range(0, len(examples), size)):
            name = f"shard-{number:05d}.parquet"
            shard = examples[begin : begin + size]
            if name in artifact.names:
                on_done(len(shard))
                continue
            generator = generator or stack.enter_context(open_generator(player, config))
            started = time.monotonic()
            completions = generator.generate(
                [example.prompt_ids for example in shard],
                params,
                _shard_seed(seed, player.index, number),
                on_done,
            )
            seconds = round(time.monotonic() - started, 3)
            _publish(artifact, name, shard, completions, decode, seconds)
    totals = {
        key: round(sum(entry[key] for entry in artifact.entries), 3)
        for key in ("rows", "identical", "truncated", "tokens", "seconds")
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


def _publish(
    artifact: ShardedArtifact,
    name: str,
    examples: Sequence[Example],
    completions: Sequence[Completion],
    decode: Callable[[TokenIds], str],
    seconds: float,
) -> None:
    columns: dict[str, list[Any]] = {
        "example_id": [example.id for example in examples],
        "token_ids": [completion.token_ids for completion in completions],
        "text": [decode(completion.token_ids) for completion in completions],
        "finish_reason": [completion.finish_reason for completion in completions],
    }
    identical = sum(
        np.array_equal(example.target_ids, completion.token_ids)
        for example, completion in zip(examples, completions, strict=True)
    )
    artifact.publish(
        name,
        lambda path: write_table(path, columns),
        rows=len(examples),
        identical=identical,
        truncated=sum(c.finish_reason == "length" for c in completions),
        tokens=sum(len(completion.token_ids) for completion in completions),
        seconds=seconds,
    )


class Responses(Sequence[Response]):
    """Responses as columns on disk. An index gives a `Response`; a slice gives a list.

    Attributes:
        example_ids, token_ids, texts, finish_reasons: columns, named as the fields of `Response`.
    """

    def __init__(
        self,
        example_ids: TextColumn,
        token_ids: IdColumn,
        texts: TextColumn,
        finish_reasons: TextColumn,
    ) -> None:
        self.example_ids = example_ids
        self.token_ids = token_ids
        self.texts = texts
        self.finish_reasons = finish_reasons

    @classmethod
    def of(cls, responses: Iterable[Response]) -> Responses:
        """The same responses as columns."""
        if isinstance(responses, Responses):
            return responses
        writers = [ColumnWriter(kind) for kind in _COLUMNS.values()]
        for response in responses:
            for writer, value in zip(writers, response, strict=True):
                writer.append(value)
        columns: list[Any] = [writer.finish() for writer in writers]
        return cls(*columns)

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
        return Response(self.example_ids[index], self.token_ids[index], self.texts[index], reason)


def read_responses(folder: Path) -> Responses:
    """Read a published D_t. The responses are in the order of the examples."""
    paths = [folder / entry["path"] for entry in ShardedArtifact(folder).entries]
    columns: dict[str, Any] = read_columns(paths, _COLUMNS)
    return Responses(*(columns[name] for name in _COLUMNS))


def response_facts(folder: Path) -> dict[str, Any]:
    """Return totals of a published D_t.

    Returns:
        `rows` (responses), `identical` (responses equal to the target), `truncated` (responses cut
        at the length limit), `tokens` (response tokens) and `seconds` (time of generation).
    """
    manifest = read_manifest(folder)
    return {k: manifest[k] for k in ("rows", "identical", "truncated", "tokens", "seconds")}


def _shard_seed(seed: int, player_index: int, shard: int) -> int:
    return int(np.random.SeedSequence((seed, player_index, shard)).generate_state(1)[0])
