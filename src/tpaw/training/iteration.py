"""One iteration's training over a run directory: settings, saved steps, resuming, the log."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import (
    GenerationConfig,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

from tpaw.config.schema import RunConfig, at_iteration
from tpaw.data.inputs import Inputs
from tpaw.errors import DivergenceError
from tpaw.runtime.interrupt import StopSignal
from tpaw.storage.run_directory import RunDirectory
from tpaw.training.arguments import split_optimizer, training_arguments
from tpaw.training.callbacks import Recorder, seconds_of
from tpaw.training.split_weights import restore_fp32
from tpaw.training.trainer import ADVICE, FIRST_STEP_TOLERANCE, TeamTrainer
from tpaw.training.triples import TripleDataset

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# (policy, tokenizer, rows, config, t, arguments): the trainer of the iteration that makes θ_{t+1}.
BuildTrainer = Callable[..., Trainer]


def team_trainer(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: TripleDataset,
    config: RunConfig,
    t: int,
    arguments: TrainingArguments,
) -> TeamTrainer:
    """The trainer of self-play."""
    return TeamTrainer(
        model=policy,
        args=arguments,
        train_dataset=rows,
        processing_class=tokenizer,
        objective={
            "lambda_": at_iteration(config.objective.lambda_, t),
            **config.objective.model_dump(exclude={"lambda_"}),
        },
        tokens_per_row=config.train.tokens_per_row,
        group_by_prompt=config.train.group_by_prompt,
        first_step_tolerance=FIRST_STEP_TOLERANCE[config.precision],
        optimizer_cls_and_kwargs=split_optimizer(config, arguments),
    )


def train_iteration(
    policy: PreTrainedModel,
    inputs: Inputs,
    rows: Any,
    config: RunConfig,
    run: RunDirectory,
    t: int,
    *,
    publish_to: Path,
    on_step: Callable[[int, str], None],
    stop: StopSignal,
    build: BuildTrainer = team_trainer,
) -> float:
    """Train θ_{t+1} from `policy`, which is θ_t in fp32, and save it into `publish_to` in fp32.

    Goes on from the last saved step, if there is one.

    Args:
        rows: what the trainer that `build` makes is to train on.

    Returns:
        Seconds of training, those before an interruption included.

    Raises:
        Interrupted: a stop was asked for; the step is saved.
        DivergenceError: the policy's log-probs or weights are no longer numbers.
    """
    resume_from = run.last_saved_step(t + 1)
    recorder = Recorder(
        run.training(t + 1), run.training_log(t + 1), on_step, stop, seconds_of(resume_from)
    )
    # The answers of θ_{t+1} end where those of the self-play did. SamplingParams defaults of θ_0 are not
    # handed on: they were not used, and some that are published cannot be saved.
    policy.generation_config = GenerationConfig(
        eos_token_id=list(inputs.stop_ids),
        pad_token_id=inputs.tokenizer.pad_token_id,
        bos_token_id=inputs.tokenizer.bos_token_id,
    )
    arguments = training_arguments(config, t, run.training(t + 1))
    with _tensorboard_in(run.iteration(t + 1) / "tensorboard"):
        trainer = build(policy, inputs.tokenizer, rows, config, t, arguments)
        trainer.add_callback(recorder)
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    if trainer.state.global_step < trainer.state.max_steps:
        stop.check()
    if config.train.weights == "split":
        restore_fp32(trainer.optimizer)
    if not all(bool(p.isfinite().all()) for p in policy.parameters()):
        raise DivergenceError(f"θ_{t + 1} has weights that are not numbers; {ADVICE}")
    trainer.save_model(str(publish_to))
    (publish_to / "training_args.bin").unlink(missing_ok=True)  # a pickle that nobody reads
    return recorder.seconds


@contextlib.contextmanager
def _tensorboard_in(folder: Path) -> Iterator[None]:
    """Keep event files from among the saved steps, which are removed; a user's choice stays."""
    name = "TENSORBOARD_LOGGING_DIR"
    chosen = os.environ.get(name)
    os.environ[name] = chosen or str(folder)
    try:
        yield
    finally:
        if chosen is None:
            del os.environ[name]
