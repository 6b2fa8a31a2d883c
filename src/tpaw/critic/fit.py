"""Fit a critic with TRL's RewardTrainer, and stop when it no longer learns.

    loss = −log σ(score of target − score of response)

the Bradley-Terry loss of a reward model. The weights that order most pairs of other prompts rightly
are kept. Their loss is no guide: it rises long before the order gets worse (docs/log.md).
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.utils.versions import require_version

from tpaw.config.schema import CriticConfig
from tpaw.data.columns import ColumnWriter, IdColumn
from tpaw.errors import InputError
from tpaw.runtime.interrupt import StopSignal
from tpaw.runtime.progress import Advance
from tpaw.storage.artifacts import write_json
from tpaw.training.callbacks import Recorder, seconds_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tpaw.data.token_ids import TokenIds

    Pairs = Sequence[tuple[TokenIds, TokenIds]]


def require_trl() -> None:
    """Raise an InputError if TRL is missing or too old."""
    try:
        require_version("trl>=1.16")
        import trl  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"method: critic needs TRL: pip install 'tpaw[baselines]' ({error})"
        ) from None


class Fitted(NamedTuple):
    """How a critic was fitted.

    Attributes:
        steps: optimizer steps.
        best_step: the step whose weights were kept.
        accuracy: share of the watched pairs in which the target had the higher score at that step.
        seconds: of fitting, those before an interruption included.
    """

    steps: int
    best_step: int
    accuracy: float
    seconds: float


def fit(
    model: PreTrainedModel,
    pairs: Pairs,
    watched: Pairs,
    config: CriticConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    steps: int,
    seed: int,
    use_cpu: bool,
    saved_steps: Path,
    log_file: Path,
    resume_from: Path | None,
    advance: Advance,
    stop: StopSignal,
) -> Fitted:
    """Fit a critic in place.

    Args:
        model: the critic.
        pairs: what it reads of targets, each with what it reads of a response.
        watched: the same of prompts that are not in `pairs`. They decide which weights are kept,
            so what the critic is worth must be measured on others.
        config: learning rate, batch size and patience.
        tokenizer: of the critic's ids; TRL pads with its padding token.
        steps: number of steps at most.
        seed: of the order of the pairs.
        use_cpu: whether to stay on the CPU.
        saved_steps: folder of saved steps.
        log_file: JSON lines, one for each logged step.
        resume_from: folder of the last saved step.
        advance: called with 1 after each step.
        stop: tells whether the user asked for a stop.

    Raises:
        Interrupted: the user asked for a stop; the step is saved.
    """
    from trl import RewardConfig, RewardTrainer

    every = min(config.evaluate_every, steps)
    arguments = RewardConfig(
        output_dir=str(saved_steps),
        max_steps=steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(50, steps // 10),
        weight_decay=config.weight_decay,
        max_length=None,
        logging_steps=every,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        report_to="none",
        disable_tqdm=True,
        bf16=False,
        use_cpu=use_cpu,
        seed=seed,
        gradient_checkpointing=False,
        logging_first_step=True,
        pad_token=tokenizer.pad_token or tokenizer.eos_token,
    )
    trainer = RewardTrainer(
        model=model,
        args=arguments,
        train_dataset=_dataset(pairs),
        eval_dataset=_dataset(watched),
        processing_class=copy.deepcopy(tokenizer),  # TRL gives it a padding token
    )
    best = _BestWeights(model, config.patience, resume_from)
    recorder = Recorder(saved_steps, log_file, advance, stop, seconds_of(resume_from))
    trainer.add_callback(best)  # before the recorder, which publishes what it saves
    trainer.add_callback(recorder)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    stop.check()
    model.load_state_dict(best.weights, strict=False)  # what is not trained has not changed
    return Fitted(trainer.state.global_step, best.step, best.accuracy, recorder.seconds)


class _BestWeights(TrainerCallback):
    """Keeps the weights of the highest accuracy, and ends the fit when it rises no more.

    It stores them beside each saved step, so that a resumed fit ends with the same weights.
    """

    def __init__(self, model: PreTrainedModel, patience: int, resume_from: Path | None) -> None:
        self.model = model
        self.patience = patience
        self.step, self.accuracy, self.misses = 0, -1.0, 0
        self.weights: dict[str, torch.Tensor] = {}
        if resume_from is not None:
            found = json.loads((resume_from / "best.json").read_text(encoding="utf-8"))
            self.step, self.accuracy, self.misses = (
                found["step"],
                found["accuracy"],
                found["misses"],
            )
            self.weights = load_file(resume_from / "best.safetensors")

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Compare the weights with the best ones so far."""
        accuracy = (metrics or {})["eval_accuracy"]
        if accuracy > self.accuracy:
            self.step, self.accuracy, self.misses = state.global_step, accuracy, 0
            trained = [(n, w) for n, w in self.model.named_parameters() if w.requires_grad]
            self.weights = {name: weight.detach().cpu().clone() for name, weight in trained}
            return
        self.misses += 1
        if self.misses >= self.patience:
            control.should_training_stop = True

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Store what a resumed fit needs."""
        folder = Path(args.output_dir or "") / f"checkpoint-{state.global_step}"
        found = {"step": self.step, "accuracy": self.accuracy, "misses": self.misses}
        write_json(folder / "best.json", found)
        save_file(self.weights, folder / "best.safetensors")


def _dataset(pairs: Pairs) -> Dataset:
    from datasets import Dataset

    chosen, rejected = ColumnWriter(IdColumn), ColumnWriter(IdColumn)
    for target, response in pairs:
        chosen.append(target)
        rejected.append(response)
    table = {"chosen_ids": chosen.finish().to_arrow(), "rejected_ids": rejected.finish().to_arrow()}
    return Dataset(pa.table(table))
