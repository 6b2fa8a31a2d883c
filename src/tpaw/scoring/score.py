"""Reference log-probs log π_j(y|x), without gradient, each player and sequence once in a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import send_to_device
from numpy.typing import NDArray

from tpaw.data.columns import KeyArray, key_list
from tpaw.data.token_ids import TokenSequence, write_table
from tpaw.logprobs.packing import Layout, PackedBatch, PromptGroup, group_by_prompt
from tpaw.logprobs.response import LogprobHead, response_logps
from tpaw.models.finite import non_finite
from tpaw.models.sharding import ALONE, Member
from tpaw.runtime.memory import memory_limited_by
from tpaw.runtime.progress import OnDone, ignore
from tpaw.scoring.sequences import DistinctSequences
from tpaw.scoring.store import LogprobStore
from tpaw.storage.artifacts import deliver


class Precision(NamedTuple):
    """The dtype of the computation, by autocast. Weights have the dtype that training uses.

    Scoring and training must round alike. Otherwise the policy would differ from the player that it
    starts as.
    """

    device_type: str
    use_bf16: bool

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16 or float32."""
        return torch.bfloat16 if self.use_bf16 else torch.float32

    def autocast(self) -> torch.autocast:
        """The context in which a model's forward runs."""
        return torch.autocast(self.device_type, dtype=torch.bfloat16, enabled=self.use_bf16)


class ScoringModel(NamedTuple):
    """A loaded player that `prepare_for_logprobs` has prepared.

    Attributes:
        model: a causal language model of transformers.
        layout: what `prepare_for_logprobs` chose for it.
        precision: of the computation.
        member: this process, among those that hold the model together.
    """

    model: Any
    layout: Layout
    precision: Precision
    member: Member = ALONE


def score_sequences(
    scorer: ScoringModel,
    sequences: Sequence[TokenSequence],
    *,
    tokens_per_row: int,
    on_done: OnDone = ignore,
) -> NDArray[np.float64]:
    """log π(y|x) of each sequence under one model.

    Processes that hold a model together call this with the same sequences. Each computes a part of
    the forward passes, which are those of one process.

    Args:
        tokens_per_row: token budget of one forward pass.
        on_done: called with the number of sequences after each forward pass.

    Returns:
        Natural log-probs (nats), summed over response tokens, in the order of `sequences`.

    Raises:
        HeadChangedError: the model changes the output of its head.
        NonFiniteError: a log-prob is NaN or infinite.
        MemoryShortageError: memory has run out.
    """
    with memory_limited_by("score.tokens_per_row", tokens_per_row):
        return _score(scorer, sequences, tokens_per_row, on_done)


def _score(
    scorer: ScoringModel, sequences: Sequence[TokenSequence], tokens_per_row: int, on_done: OnDone
) -> NDArray[np.float64]:
    model, layout, precision, member = scorer
    device = next(model.parameters()).device
    head = LogprobHead.attached_to(model)
    groups: list[list[int]] = []
    for group in group_by_prompt(sequences):
        fits = layout.size(_size(sequences, group)) <= tokens_per_row
        groups += [group] if fits else [[i] for i in group]
    sizes = [_size(sequences, group) for group in groups]
    assigned = layout.assign(sizes, tokens_per_row, 1)
    passes = [[i for g in members for i in groups[g]] for members in assigned]
    turns = [passes[i : i + member.size] for i in range(0, len(passes), member.size)]
    # In the last turn, some processes compute what another one does too, and drop it.
    mine = [turn[min(member.rank, len(turn) - 1)] for turn in turns]
    batches: Iterator[PackedBatch] = (
        layout.collate([sequences[i] for i in members]) for members in mine
    )
    if device.type == "cuda":  # on a CPU the second thread would slow down the first
        batches = _prepared_ahead(batches)
    logps = np.zeros(len(sequences), dtype=np.float64)
    for turn, members, batch in zip(turns, mine, batches, strict=True):
        with torch.inference_mode(), precision.autocast():
            logps_S = response_logps(model, send_to_device(batch, device), head)
        found = logps_S.cpu().numpy()
        if not np.isfinite(found).all():
            if head is not None:
                head.raise_if_changed()  # it marks a changed log-prob with NaN
            raise non_finite(model, "log-probs")
        if member.rank < len(turn):
            logps[members] = found
        on_done(sum(map(len, turn)))
    if head is not None:
        head.raise_if_changed()
    return member.sum(logps, device)


class SequenceShard(NamedTuple):
    """The sequences of one shard: work for one process.

    Attributes:
        name: file name of the shard in the store.
        stage: for whom the sequences are scored, e.g. "iteration-3".
        keys: one for each sequence.
        sequences: what to score.
    """

    name: str
    stage: str
    keys: KeyArray
    sequences: Sequence[TokenSequence]


class ScoredShard(NamedTuple):
    """What became of a `SequenceShard`.

    Attributes:
        name: file name of the shard.
        record: of its delivery; see `storage.artifacts.deliver`.
        logps: float64, in nats, (sequences,).
    """

    name: str
    record: Path
    logps: NDArray[np.float64]


def fill_store(
    store: LogprobStore,
    stage: str,
    wanted: DistinctSequences,
    compute: Callable[[Iterator[SequenceShard]], Iterator[ScoredShard]],
    *,
    shard_size: int,
) -> None:
    """Compute the sequences of `wanted` that the store lacks, and publish them shard by shard.

    Args:
        store: the log-probs of one player.
        stage: names the shards, e.g. "iteration-3".
        wanted: the sequences.
        compute: calls `deliver_logps` for every shard, in any order, and returns what it returned.
            It may raise to stop the work; published shards stay.
        shard_size: number of sequences in a shard.
    """
    store.begin()
    order = wanted.scoring_order(store.missing_before(stage, wanted.keys))
    given_out: dict[str, SequenceShard] = {}

    def missing() -> Iterator[SequenceShard]:
        for number, begin in enumerate(range(0, len(order), shard_size)):
            name = f"{stage}-{number:05d}.parquet"
            if not store.has_shard(name):
                members = order[begin : begin + shard_size]
                sequences = [wanted[i] for i in members]
                shard = SequenceShard(name, stage, wanted.keys[members], sequences)
                given_out[name] = shard
                yield shard

    for scored in compute(missing()):
        store.receive(scored.record, stage, given_out.pop(scored.name).keys, scored.logps)


def deliver_logps(
    folder: Path,
    shard: SequenceShard,
    scorer: ScoringModel,
    *,
    tokens_per_row: int,
    on_done: OnDone,
) -> ScoredShard:
    """Score one shard. Any process may do it.

    Args:
        folder: folder of the store.
        shard: the work.
        scorer: the player that scores.
        tokens_per_row: see `score_sequences`.
        on_done: called with the number of sequences computed since the last call. It may raise.
    """
    started = time.monotonic()
    logps = score_sequences(scorer, shard.sequences, tokens_per_row=tokens_per_row, on_done=on_done)
    columns = {
        "sequence": key_list(shard.keys),
        "logp": logps.tolist(),
        "tokens": [len(response) for _, response in shard.sequences],
    }
    record = deliver(
        folder,
        shard.name,
        lambda path: write_table(path, columns),
        stage=shard.stage,
        sequences=len(shard.sequences),
        seconds=round(time.monotonic() - started, 3),
    )
    return ScoredShard(shard.name, record, logps)


def _size(sequences: Sequence[TokenSequence], group: Sequence[int]) -> PromptGroup:
    prompt, _ = sequences[group[0]]
    return PromptGroup.of(len(prompt), [len(sequences[i][1]) for i in group])


def _prepared_ahead(items: Iterator[PackedBatch]) -> Iterator[PackedBatch]:
    """The same items; each is made while the one before is in use."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(next, items, None)
        while (item := future.result()) is not None:
            future = pool.submit(next, items, None)
            yield item
