"""Scoring: log π_j(y|x) of the main players, without gradient, each pair once in a whole run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from accelerate.utils import send_to_device
from numpy.typing import NDArray
from torch import nn

from tpaw.config.schema import ScoreConfig
from tpaw.logprobs.packing import PackedBatch, PromptGroup, TokenSequence
from tpaw.logprobs.prepare import prepare_for_logprobs
from tpaw.logprobs.response import response_logps
from tpaw.scoring.store import Key, LogprobStore

OnDone = Callable[[int], None]


class Precision(NamedTuple):
    """The type of the computation, by autocast; weights are those that training computes with.

    Scoring and training must round alike, or a policy would differ from the player that it is.
    """

    device_type: str
    use_bf16: bool

    def autocast(self) -> torch.autocast:
        """The context in which a model's forward runs."""
        return torch.autocast(self.device_type, dtype=torch.bfloat16, enabled=self.use_bf16)


def score_sequences(
    model: nn.Module,
    sequences: Sequence[TokenSequence],
    *,
    tokens_per_row: int,
    precision: Precision,
    on_done: OnDone = lambda count: None,
) -> NDArray[np.float64]:
    """log π(y|x) of each sequence under one model, float64, in the order given.

    Args:
        on_done: called with the number of sequences after each forward pass.
    """
    device = next(model.parameters()).device
    longest = max((len(prompt) + len(response) for prompt, response in sequences), default=0)
    layout = prepare_for_logprobs(model, longest).layout
    units: list[list[int]] = []
    for unit in _same_prompt(sequences):
        fits = layout.size(_size(sequences, unit)) <= tokens_per_row
        units += [unit] if fits else [[i] for i in unit]
    sizes = [_size(sequences, unit) for unit in units]
    batches = [[i for u in row for i in units[u]] for row in layout.cut(sizes, tokens_per_row, 1)]
    rows_of: Iterator[PackedBatch] = (
        layout.rows([sequences[i] for i in batch]) for batch in batches
    )
    if device.type == "cuda":  # on a CPU a second thread of torch's takes more than it gives
        rows_of = _prepared_ahead(rows_of)
    logps = np.empty(len(sequences), dtype=np.float64)
    for batch, rows in zip(batches, rows_of, strict=True):
        with torch.inference_mode(), precision.autocast():
            logps_S = response_logps(model, send_to_device(rows, device))
        logps[batch] = logps_S.cpu().numpy()
        on_done(len(batch))
    return logps


def fill_store(
    store: LogprobStore,
    stage: str,
    wanted: Mapping[Key, TokenSequence],
    load_model: Callable[[], nn.Module],
    *,
    config: ScoreConfig,
    precision: Precision,
    on_done: OnDone = lambda count: None,
) -> None:
    """Compute what the store lacks of `wanted`, and publish it shard by shard.

    Args:
        stage: names the shards, e.g. "iteration-3".
        load_model: called only if something is missing.
        on_done: called with the number of sequences forwarded.
    """
    todo = store.missing_before(stage, wanted)
    sequences = [wanted[key] for key in todo]
    # Prompts stay together and lengths similar across the shards too.
    units = _same_prompt(sequences)
    units.sort(key=lambda unit: -max(len(sequences[i][1]) for i in unit))
    todo = [todo[i] for unit in units for i in unit]
    model: nn.Module | None = None
    for number, begin in enumerate(range(0, len(todo), config.shard_size)):
        name = f"{stage}-{number:05d}.parquet"
        if store.has_shard(name):
            continue
        model = model or load_model()
        keys = todo[begin : begin + config.shard_size]
        started = time.monotonic()
        logps = score_sequences(
            model,
            [wanted[key] for key in keys],
            tokens_per_row=config.tokens_per_row,
            precision=precision,
            on_done=on_done,
        )
        token_counts = [len(wanted[key][1]) for key in keys]
        seconds = time.monotonic() - started
        store.publish(name, stage, keys, logps, token_counts, seconds)


def _same_prompt(sequences: Sequence[TokenSequence]) -> list[list[int]]:
    """Indices of the sequences of each prompt."""
    by_prompt: dict[bytes, list[int]] = {}
    for i, (prompt, _) in enumerate(sequences):
        by_prompt.setdefault(prompt.tobytes(), []).append(i)
    return list(by_prompt.values())


def _size(sequences: Sequence[TokenSequence], unit: Sequence[int]) -> PromptGroup:
    prompt, _ = sequences[unit[0]]
    return PromptGroup.of(len(prompt), [len(sequences[i][1]) for i in unit])


def _prepared_ahead(items: Iterator[PackedBatch]) -> Iterator[PackedBatch]:
    """The same items, each made while the one before is in use."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(next, items, None)
        while (item := future.result()) is not None:
            future = pool.submit(next, items, None)
            yield item
