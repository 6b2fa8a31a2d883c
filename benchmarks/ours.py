"""TPAW as a contender. Everything the benchmarks know about the package's fast path is here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from contender import Settings, StepClock, Training
from flops import Row, shared_rows
from numpy.typing import NDArray
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from workload import LogpsPair, Triple

from tpaw.config.schema import ScoreConfig
from tpaw.data.token_ids import TokenSequence
from tpaw.logprobs.prepare import prepare_for_logprobs
from tpaw.objectives.tpaw import TeamObjective
from tpaw.scoring.score import (
    Precision,
    ScoredShard,
    ScoringModel,
    SequenceShard,
    deliver_logps,
    fill_store,
    score_sequences,
)
from tpaw.scoring.sequences import DistinctSequences
from tpaw.scoring.store import LogprobStore, sequence_key
from tpaw.training.split_weights import SplitRMSprop
from tpaw.training.trainer import TeamTrainer

# How work may be cut: the rows of the tables. The first is what is used where there is no sweep.
VARIANTS: Mapping[str, Mapping[str, int]] = {
    "rows of 2048 tokens": {"tokens_per_row": 2048},
    "rows of 8192 tokens": {"tokens_per_row": 8192},
}
DEFAULT_VARIANT = next(iter(VARIANTS.values()))


def scored_rows(sequences: Sequence[TokenSequence]) -> list[Row]:
    """What scoring computes, for counting FLOPs: the responses of a prompt share it.

    The last token of a response, which goes through no layer, is counted all the same.
    """
    lengths: dict[bytes, list[int]] = {}
    for prompt, response in sequences:
        lengths.setdefault(prompt.tobytes(), [len(prompt)]).append(len(response))
    return [(prompt, responses) for prompt, *responses in lengths.values()]


def trained_rows(triples: Sequence[Triple]) -> list[Row]:
    """What training computes, for counting FLOPs: the prompt once with both responses."""
    return shared_rows(triples)


def sequences_of(triples: Sequence[Triple]) -> list[TokenSequence]:
    """The distinct sequences of the triples, in order."""
    pairs = [TokenSequence(t.prompt, y) for t in triples for y in (t.target, t.generated)]
    return list({sequence_key(pair): pair for pair in pairs}.values())


def by_triple(
    triples: Sequence[Triple],
    sequences: Sequence[TokenSequence],
    columns: Sequence[NDArray[np.float64]],
) -> LogpsPair:
    """Log-probs of distinct sequences, one column a player, laid out by triple."""
    place = {sequence_key(sequence): i for i, sequence in enumerate(sequences)}
    all_SK = np.stack(columns, axis=1)
    target = [place[sequence_key(TokenSequence(t.prompt, t.target))] for t in triples]
    generated = [place[sequence_key(TokenSequence(t.prompt, t.generated))] for t in triples]
    return LogpsPair(all_SK[target], all_SK[generated])


def score(
    model: PreTrainedModel | ScoringModel,
    sequences: Sequence[TokenSequence],
    *,
    bf16: bool = False,
    tokens_per_row: int = DEFAULT_VARIANT["tokens_per_row"],
) -> NDArray[np.float64]:
    """log π(y|x) of each sequence, in order."""
    scorer = model if isinstance(model, ScoringModel) else prepared(model, bf16)
    return score_sequences(scorer, sequences, tokens_per_row=tokens_per_row)


def prepared(model: PreTrainedModel, bf16: bool) -> ScoringModel:
    """The model, ready to score; a run does this once for each model that it loads."""
    layout, _ = prepare_for_logprobs(model, model.config.max_position_embeddings)
    return ScoringModel(model, layout, Precision(next(model.parameters()).device.type, bf16))


def score_into(
    store: LogprobStore,
    stage: str,
    model: PreTrainedModel,
    sequences: Sequence[TokenSequence],
    *,
    bf16: bool = False,
) -> int:
    """Add to the store what it lacks, and publish it on disk.

    Returns:
        How many sequences went through the model.
    """
    counted: list[int] = []
    config = ScoreConfig.model_validate(DEFAULT_VARIANT)

    def compute(shards: Iterator[SequenceShard]) -> Iterator[ScoredShard]:
        scorer = None
        for shard in shards:
            scorer = scorer or prepared(model, bf16)
            yield deliver_logps(
                store.folder,
                shard,
                scorer,
                tokens_per_row=config.tokens_per_row,
                on_done=counted.append,
            )

    wanted = DistinctSequences.of(sequences)
    fill_store(store, stage, wanted, compute, shard_size=config.shard_size)
    return sum(counted)


def open_store(folder: Path) -> LogprobStore:
    """A log-prob store of one player."""
    return LogprobStore(folder)


def stored_logps(store: LogprobStore, sequences: Sequence[TokenSequence]) -> NDArray[np.float64]:
    """The log-probs of sequences that are all in the store; float64."""
    return store.logps(map(sequence_key, sequences))


def train(
    model: PreTrainedModel,
    triples: Sequence[Triple],
    logps: LogpsPair,
    settings: Settings,
    *,
    tokens_per_row: int = DEFAULT_VARIANT["tokens_per_row"],
) -> Training:
    """Train the model in place on the triples."""
    rows = [
        {
            "prompt_ids": triple.prompt,
            "target_ids": triple.target,
            "generated_ids": triple.generated,
            "player_target_logps": logps.target_NK[i],
            "player_generated_logps": logps.generated_NK[i],
        }
        for i, triple in enumerate(triples)
    ]
    device = next(model.parameters()).device
    clock = StepClock(device, settings.watch)
    optimizer: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None
    if settings.split_weights:
        optimizer = (SplitRMSprop, {"lr": settings.learning_rate})
    elif settings.lean_optimizer:
        optimizer = (torch.optim.RMSprop, {"lr": settings.learning_rate, "foreach": False})
    with TemporaryDirectory() as folder:
        trainer = TeamTrainer(
            model=model,
            args=TrainingArguments(
                per_device_train_batch_size=settings.batch,
                activation_checkpointing=settings.checkpointing,
                **trainer_arguments(folder, device, settings),
            ),
            train_dataset=rows,
            processing_class=None,
            objective=TeamObjective(**settings.objective),
            tokens_per_row=tokens_per_row,
            callbacks=[clock],
            optimizer_cls_and_kwargs=optimizer,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return clock.training(model, trainer.state.log_history)


def trainer_arguments(folder: str, device: torch.device, settings: Settings) -> dict[str, Any]:
    """What our TrainingArguments and TRL's have in common."""
    return {
        "output_dir": folder,
        "num_train_epochs": settings.epochs,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "constant",
        "optim": "rmsprop",
        "bf16": settings.bf16,
        "use_cpu": device.type == "cpu",
        "logging_strategy": "steps" if settings.watch else "no",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }
