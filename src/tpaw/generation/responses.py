"""D_t on disk: the responses of a player, one for each prompt. A run samples each one only once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tpaw.data.examples import Example
from tpaw.data.token_ids import TokenIds, read_table, write_table
from tpaw.generation.generator import (
    FinishReason,
    Generator,
    SamplingParams,
)
from tpaw.runtime.progress import OnDone, note
from tpaw.storage.artifacts import ShardedArtifact, deliver, read_manifest
from tpaw.team import Player

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
        columns["server_logp"] = [completion.server_logp for completion in completions]
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
        tokens=sum(len(completion.token_ids) for completion in completions),
        seconds=seconds,
    )


def read_responses(folder: Path) -> list[Response]:
    """Read a published D_t. The responses are in the order of the examples."""
    responses: list[Response] = []
    for entry in ShardedArtifact(folder).entries:
        table = read_table(folder / entry["path"])
        columns = (table[field] for field in Response._fields if field in table)
        responses += [Response(*row) for row in zip(*columns, strict=True)]
    return responses


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
