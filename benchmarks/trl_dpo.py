"""TRL's DPOTrainer as a contender, at settings that are good for it.

Against its defaults: no gradient checkpointing (it costs a forward), the precision of the
comparison (its default is bf16, on a CPU too), no logging. `padding_free` is switched off in TRL
1.16, with a warning, so rows are padded. Its fused head makes no logits; on a GPU with Triton it
computes response positions alone, elsewhere every position. Entropy, mean logits and top-1 accuracy
are part of every training step and cannot be switched off.

Reference log-probs are computed in the dataset's order, in batches of as many pairs as training has
in a micro-batch (the default of `precompute_ref_batch_size`); writing them to the dataset's cache,
milliseconds, is part of that. Training keeps the dataset's order: grouping by length would spare it
padding, and would be another training.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import datasets
from contender import Settings, StepClock, Training, synchronize
from datasets import Dataset
from ours import trainer_arguments
from tokenizers import Tokenizer, models
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig, DPOTrainer
from workload import Triple

os.environ["TQDM_DISABLE"] = "1"  # the one switch for the bar over the reference log-probs
logging.getLogger("transformers").setLevel(logging.ERROR)


class TrlRun(NamedTuple):
    """Seconds of computing the reference log-probs, and the training."""

    score_seconds: float
    training: Training


class _TokenIdTrainer(DPOTrainer):
    """Takes token ids instead of texts, and times the reference log-probs."""

    score_seconds = 0.0
    pairs_scored = 0

    def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
        # Texts would have to be tokenised to the very same ids; that is set-up and not timed.
        return dataset

    def _precompute_ref_logps(self, *args: Any) -> Dataset:
        synchronize(self.accelerator.device)
        began = time.perf_counter()
        dataset = super()._precompute_ref_logps(*args)
        self.score_seconds = time.perf_counter() - began
        return dataset

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
        self.pairs_scored += len(inputs["input_ids"]) // 2
        return super().compute_ref_log_probs(model, inputs)


def run(
    model: PreTrainedModel,
    triples: Sequence[Triple],
    settings: Settings,
    *,
    micro_batch: int,
    train: bool = True,
) -> TrlRun:
    """Score and train in place; the model itself is the reference, as `ref_model=None` means.

    Args:
        micro_batch: pairs in a micro-batch of training, and of the reference log-probs.
        train: False scores only.
    """
    if settings.batch % micro_batch:
        raise ValueError(f"batch {settings.batch} is not a multiple of micro-batch {micro_batch}")
    datasets.disable_progress_bars()
    device = next(model.parameters()).device
    clock = StepClock(device, settings.watch)
    with TemporaryDirectory() as folder:
        trainer = _TokenIdTrainer(
            model=model,
            args=DPOConfig(
                beta=settings.objective["lambda_"],
                train_sampling_strategy="sequential",
                precompute_ref_log_probs=True,
                router_aux_loss_coef=0.0,  # ours has no such loss
                max_length=None,
                per_device_train_batch_size=micro_batch,
                gradient_accumulation_steps=settings.batch // micro_batch,
                gradient_checkpointing=settings.checkpointing,
                **trainer_arguments(folder, device, settings),
            ),
            train_dataset=_dataset(triples),
            processing_class=_tokenizer(),
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        # A log-prob found in a cache would be timed as if it had been computed.
        if trainer.pairs_scored != len(triples):
            raise RuntimeError(f"TRL scored {trainer.pairs_scored} pairs of {len(triples)}")
        if not train:
            return TrlRun(trainer.score_seconds, Training(0.0, []))
        trainer.train()
    return TrlRun(trainer.score_seconds, clock.training(model, trainer.state.log_history))


def _dataset(triples: Sequence[Triple]) -> Dataset:
    return Dataset.from_dict(
        {
            "prompt_ids": [t.prompt.tolist() for t in triples],
            "chosen_ids": [t.target.tolist() for t in triples],
            "rejected_ids": [t.generated.tolist() for t in triples],
        }
    )


def _tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<pad>")
