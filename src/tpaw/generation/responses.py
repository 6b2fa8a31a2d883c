"""D_t on disk: one response per prompt and checkpoint, kept for good, never sampled again."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tpaw.data.examples import Example
from tpaw.data.token_ids import TokenIds, read_table, write_table
from tpaw.generation.generator import FinishReason, Generator, OnDone, SamplingParams
from tpaw.storage.artifacts import ShardedArtifact, read_manifest
from tpaw.team import Player


class Response(NamedTuple):
    """What a player answered to an example's prompt."""

    example_id: str
    token_ids: TokenIds
    text: str
    finish_reason: FinishReason


def generate_responses(
    folder: Path,
    player: Player,
    examples: Sequence[Example],
    load_generator: Callable[[], Generator],
    decode: Callable[[TokenIds], str],
    sampling: SamplingParams,
    *,
    shard_size: int,
    seed: int,
    on_done: OnDone,
) -> None:
    """Answer every prompt once, publishing shard by shard; goes on after those already there.

    Args:
        load_generator: called only if a shard is missing.
        seed: of the run; each shard has its own, so a shard does not depend on those before it.
        on_done: called with the number of prompts finished. It may raise to stop the work.
    """
    artifact = ShardedArtifact(folder)
    generator: Generator | None = None
    for number, begin in enumerate(range(0, len(examples), shard_size)):
        name = f"shard-{number:05d}.parquet"
        rows = examples[begin : begin + shard_size]
        if name in artifact.names:
            on_done(len(rows))
            continue
        generator = generator or load_generator()
        started = time.monotonic()
        completions = generator.generate(
            [example.prompt_ids for example in rows],
            sampling,
            _shard_seed(seed, player.index, number),
            on_done,
        )
        columns: dict[str, list[Any]] = {
            "example_id": [example.id for example in rows],
            "token_ids": [completion.token_ids for completion in completions],
            "text": [decode(completion.token_ids) for completion in completions],
            "finish_reason": [completion.finish_reason for completion in completions],
        }
        identical = sum(
            np.array_equal(example.target_ids, completion.token_ids)
            for example, completion in zip(rows, completions, strict=True)
        )
        artifact.publish(
            name,
            lambda path, columns=columns: write_table(path, columns),  # type: ignore[misc]
            rows=len(rows),
            identical=identical,
            truncated=sum(c.finish_reason == "length" for c in completions),
            tokens=sum(len(completion.token_ids) for completion in completions),
            seconds=round(time.monotonic() - started, 3),
        )
    totals = {
        key: round(sum(entry[key] for entry in artifact.entries), 3)
        for key in ("rows", "identical", "truncated", "tokens", "seconds")
    }
    artifact.complete(
        {"player": player.index, "fingerprint": player.fingerprint, **sampling._asdict(), **totals}
    )


def read_responses(folder: Path) -> list[Response]:
    """All responses, in the order of the examples."""
    responses: list[Response] = []
    for entry in ShardedArtifact(folder).entries:
        table = read_table(folder / entry["path"])
        columns = (table[field] for field in Response._fields)
        responses += [Response(*row) for row in zip(*columns, strict=True)]
    return responses


def response_facts(folder: Path) -> dict[str, Any]:
    """Counts of a published D_t: rows, identical, truncated, tokens, seconds."""
    manifest = read_manifest(folder)
    return {k: manifest[k] for k in ("rows", "identical", "truncated", "tokens", "seconds")}


def _shard_seed(seed: int, player_index: int, shard: int) -> int:
    return int(np.random.SeedSequence((seed, player_index, shard)).generate_state(1)[0])
