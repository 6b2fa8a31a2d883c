"""The baselines' trainers: TRL's, on the very token ids that self-play trains on.

Nothing is tokenised, templated, padded with end-of-sequence tokens or truncated again. trl is
imported when a baseline is asked for, and not before.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.utils.versions import require_version

from tpaw.config.schema import RunConfig, at_iteration
from tpaw.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

    from tpaw.data.examples import Example
    from tpaw.training.triples import TripleDataset

_IGNORED_LABEL = -100


def trl_arguments(config: RunConfig, t: int) -> tuple[type[TrainingArguments], dict[str, Any]]:
    """TRL's class of training arguments for a baseline, and those of its values that are ours.

    Raises:
        InputError: trl is missing or too old.
    """
    try:
        require_version("trl>=1.16")
        from trl import DPOConfig, SFTConfig
    except ImportError as error:
        raise InputError(
            f"method: {config.method} is trained by TRL: pip install 'tpaw[baselines]' ({error})"
        ) from None
    shared = {"max_length": None, "logging_nan_inf_filter": False}
    if config.method == "sft":
        batches = _micro_batches(config, sequences_per_example=1)
        return SFTConfig, shared | batches | {"dataset_kwargs": {"skip_prepare_dataset": True}}
    beta = at_iteration(config.objective.lambda_, t)
    own = {"beta": beta, "precompute_ref_log_probs": True}
    return DPOConfig, shared | _micro_batches(config, sequences_per_example=2) | own


def sft_trainer(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    config: RunConfig,
    t: int,
    arguments: TrainingArguments,
) -> Trainer:
    """Cross-entropy of the target's tokens, averaged over those of the whole batch."""
    from datasets import Dataset
    from trl import SFTTrainer

    ids = [np.concatenate([e.prompt_ids, e.target_ids]) for e in examples]
    labels = [
        np.concatenate([np.full_like(e.prompt_ids, _IGNORED_LABEL), e.target_ids]) for e in examples
    ]
    return SFTTrainer(
        model=policy,
        args=arguments,
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": labels}),
        processing_class=copy.deepcopy(tokenizer),  # TRL gives it a padding token
    )


def dpo_trainer(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: TripleDataset,
    config: RunConfig,
    t: int,
    arguments: TrainingArguments,
) -> Trainer:
    """DPO's loss, averaged over the pairs; chosen is the target and rejected the other answer.

    Args:
        rows: with the log-probs under one player, the reference.
    """
    from datasets import Dataset
    from trl import DPOTrainer

    class Prepared(DPOTrainer):
        """Takes a dataset that has token ids and reference log-probs already."""

        def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
            return dataset

        def _precompute_ref_logps(self, dataset: Dataset, *args: Any) -> Dataset:
            return dataset

    columns = {
        "prompt_ids": [triple.example.prompt_ids for triple in rows.triples],
        "chosen_ids": [triple.example.target_ids for triple in rows.triples],
        "rejected_ids": [triple.response.token_ids for triple in rows.triples],
        "ref_chosen_logps": rows.target_logps_NK[:, 0],
        "ref_rejected_logps": rows.generated_logps_NK[:, 0],
    }
    return Prepared(
        model=policy,
        args=arguments,
        train_dataset=Dataset.from_dict(columns),
        processing_class=copy.deepcopy(tokenizer),
    )


def _micro_batches(config: RunConfig, sequences_per_example: int) -> dict[str, int]:
    """As many examples in a forward as tokens fit if all are longest; they divide the batch."""
    batch = config.train.batch_size
    fitting = config.train.tokens_per_row // (sequences_per_example * config.max_length)
    size = max(n for n in range(1, batch + 1) if batch % n == 0 and n <= max(fitting, 1))
    return {"per_device_train_batch_size": size, "gradient_accumulation_steps": batch // size}
