"""Scoring: log π_j(y|x) of the main players, without gradient, each pair once in a whole run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from tpaw.config import ScoreConfig
from tpaw.layout import PromptAndResponse, batches_by_tokens, pad_rows
from tpaw.logprob_store import Key, LogprobStore
from tpaw.logprobs import response_logps

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
    sequences: Sequence[PromptAndResponse],
    *,
    tokens_per_batch: int,
    precision: Precision,
    on_done: OnDone = lambda count: None,
) -> NDArray[np.float64]:
    """log π(y|x) of each sequence under one model, float64, in the order given.

    Args:
        on_done: called with the number of sequences after each forward pass.
    """
    device = next(model.parameters()).device
    lengths = [len(prompt) + len(response) for prompt, response in sequences]
    order = sorted(range(len(sequences)), key=lambda i: -lengths[i])
    logps = np.empty(len(sequences), dtype=np.float64)
    for batch in batches_by_tokens([lengths[i] for i in order], tokens_per_batch):
        chosen = [order[i] for i in batch]
        rows = pad_rows([sequences[i] for i in chosen])
        with torch.inference_mode(), precision.autocast():
            logps_B = response_logps(
                model, rows["input_ids_BL"].to(device), rows["response_mask_BL"].to(device)
            )
        logps[chosen] = logps_B.cpu().numpy()
        on_done(len(chosen))
    return logps


def fill_store(
    store: LogprobStore,
    stage: str,
    wanted: Mapping[Key, PromptAndResponse],
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
    # Sorted across the shards too, so that a shard holds rows of similar length.
    todo = store.missing_before(stage, wanted)
    todo.sort(key=lambda key: -sum(map(len, wanted[key])))
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
            tokens_per_batch=config.tokens_per_batch,
            precision=precision,
            on_done=on_done,
        )
        token_counts = [len(wanted[key][1]) for key in keys]
        seconds = time.monotonic() - started
        store.publish(name, stage, keys, logps, token_counts, seconds)
