"""SFT by TRL's trainer, on the same token ids that self-play trains on.

Nothing is templated, tokenised, padded with end-of-sequence tokens or truncated again. trl is
imported only when `method: sft` is asked for.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.utils.versions import require_version

from tpaw.config.schema import RunConfig
from tpaw.data.columns import ColumnWriter, IdColumn
from tpaw.data.examples import Example
from tpaw.errors import InputError
from tpaw.runtime.processes import process_count

if TYPE_CHECKING:
    from peft import PeftModel

_IGNORED_LABEL = -100


def sft_arguments(config: RunConfig) -> tuple[type[TrainingArguments], dict[str, Any]]:
    """TRL's class of training arguments, and those of its values that a run decides.

    Raises:
        InputError: trl is missing or too old.
    """
    try:
        require_version("trl>=1.16")
        from trl import SFTConfig
    except ImportError as error:
        raise InputError(
            f"method: sft needs TRL: pip install 'tpaw[baselines]' ({error})"
        ) from None
    own = {
        "max_length": None,
        "logging_nan_inf_filter": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
    return SFTConfig, own | _micro_batches(config)


def sft_trainer(
    policy: PreTrainedModel | PeftModel,
    arguments: TrainingArguments,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
) -> Trainer:
    """Cross-entropy of the target's tokens, averaged over those of the whole batch."""
    from datasets import Dataset
    from trl import SFTTrainer

    ids, labels = ColumnWriter(IdColumn), ColumnWriter(IdColumn)
    for example in examples:
        prompt, target = example.target
        ids.append(np.concatenate([prompt, target]))
        labels.append(np.concatenate([np.full_like(prompt, _IGNORED_LABEL), target]))
    table = {"input_ids": ids.finish().to_arrow(), "labels": labels.finish().to_arrow()}
    weights = [(p, p.data) for p in policy.parameters() if p.requires_grad]
    trainer = SFTTrainer(
        model=policy,
        args=arguments,
        train_dataset=Dataset(pa.table(table)),
        processing_class=copy.deepcopy(tokenizer),  # TRL gives it a padding token
    )
    # TRL rounds the adapter of a quantised base to bf16, in which small updates vanish.
    for parameter, data in weights:
        parameter.data = data
    return trainer


def _micro_batches(config: RunConfig) -> dict[str, int]:
    """The largest micro-batch that fits the token budget and divides the batch."""
    batch = config.train.batch_size // process_count()
    fitting = config.train.tokens_per_row // config.max_length
    size = max(n for n in range(1, batch + 1) if batch % n == 0 and n <= max(fitting, 1))
    return {"per_device_train_batch_size": size, "gradient_accumulation_steps": batch // size}
