"""One iteration's training over a run directory: build the trainer, resume, save θ_{t+1}."""

from __future__ import annotations

import contextlib
import pickle
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from tpaw.config.schema import ObjectiveConfig, RunConfig, at_iteration
from tpaw.data.inputs import Inputs
from tpaw.errors import ArtifactError, DivergenceError, InputError
from tpaw.models.adapters import complete_adapter
from tpaw.objectives.base import NamedObjective, Objective
from tpaw.objectives.tpaw import TeamObjective
from tpaw.runtime.interrupt import StopSignal
from tpaw.runtime.processes import (
    as_main_process_sees,
    is_main_process,
    largest_of_all,
    process_count,
)
from tpaw.runtime.progress import Advance, note
from tpaw.storage.artifacts import describe_file, flush, read_manifest
from tpaw.storage.run_directory import Iteration
from tpaw.team import Base
from tpaw.training.arguments import split_optimizer, training_arguments
from tpaw.training.callbacks import Recorder, seconds_of
from tpaw.training.frozen_ranks import FrozenRanks
from tpaw.training.split_weights import restore_fp32
from tpaw.training.trainer import TeamTrainer
from tpaw.training.triples import TripleDataset

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

# Makes the trainer of one iteration from the policy and its arguments.
BuildTrainer = Callable[["PreTrainedModel | PeftModel", TrainingArguments], Trainer]


def team_objective(config: NamedObjective, t: int) -> Objective:
    """The objective of the iteration that trains θ_{t+1}."""
    if not isinstance(config, ObjectiveConfig):
        return config
    return TeamObjective(
        lambda_=at_iteration(config.lambda_, t), **config.model_dump(exclude={"name", "lambda_"})
    )


def dpo_objective(config: NamedObjective, t: int) -> TeamObjective:
    """DPO's loss, −log σ(β(Δ − Γ)): one reference, no weights, and λ is β.

    With K = 1 and both weights switched off, equation 8 is DPO's loss. A test compares it with
    TRL's.
    """
    assert isinstance(config, ObjectiveConfig)  # method dpo refuses others
    return TeamObjective(
        lambda_=at_iteration(config.lambda_, t),
        eta=1.0,
        gamma=0.0,
        target_weight="one",
        player_weight="uniform",
    )


def team_trainer(
    policy: PreTrainedModel | PeftModel,
    arguments: TrainingArguments,
    dataset: TripleDataset,
    inputs: Inputs,
    config: RunConfig,
    objective: Objective,
    start_column: int | None,
) -> TeamTrainer:
    """The trainer of self-play, and of DPO."""
    return TeamTrainer(
        model=policy,
        args=arguments,
        train_dataset=dataset,
        processing_class=inputs.tokenizer,
        objective=objective,
        start_column=start_column,
        tokens_per_row=config.train.tokens_per_row,
        group_by_prompt=config.train.group_by_prompt,
        optimizer_cls_and_kwargs=split_optimizer(config, arguments),
    )


def train_iteration(
    policy: PreTrainedModel | PeftModel,
    build: BuildTrainer,
    inputs: Inputs,
    config: RunConfig,
    iteration: Iteration,
    base: Base | None = None,
    *,
    publish_to: Path,
    advance: Advance,
    stop: StopSignal,
) -> dict[str, Any]:
    """Train θ_{t+1} from `policy`, which is θ_t, and save it into `publish_to` in fp32.

    Resumes from the last saved step, if there is one.

    Args:
        build: makes the trainer.
        base: the model below the policy's adapter; None if all weights are trained.
        advance: called with 1 after each step, and with a note for each line of the log.

    Returns:
        What the manifest of θ_{t+1} says of its training: `seconds`, those before an interruption
        included, `processes` that trained together, and `training_log`, the manifest entry of
        training.jsonl. Empty on all processes but the main one, which alone writes.

    Raises:
        Interrupted: a stop was asked for; the step is saved.
        InputError: `train.parallel` is fsdp2, but accelerate does not shard on this device; or the
            saved step is of the other kind.
        ArtifactError: the saved step contains pickled code.
        DivergenceError: the policy's log-probs or weights are NaN or infinite.
    """
    resume_from = as_main_process_sees(iteration.last_saved_step())
    if resume_from is not None and is_main_process():
        before = read_manifest(resume_from).get("processes", 1)
        if before != process_count():
            note(
                f"θ_{iteration.number} was trained by {before} processes up to the saved step, and "
                f"is trained by {process_count()} from there on. Results differ by rounding."
            )
    recorder = Recorder(
        iteration.training, iteration.training_log, advance, stop, seconds_of(resume_from)
    )
    # The responses of θ_{t+1} end where those of self-play did. The sampling defaults of θ_0 are
    # dropped: they were not used, and transformers refuses to save some that are published.
    generation = GenerationConfig(
        eos_token_id=list(inputs.stop_ids),
        pad_token_id=inputs.tokenizer.pad_token_id,
        bos_token_id=inputs.tokenizer.bos_token_id,
    )
    policy.generation_config = generation
    arguments = training_arguments(config, iteration.t, iteration.training)
    with _with_advice(iteration, config):
        trainer = build(policy, arguments)
        _check_parallel(trainer, config)
        _check_saved_step(resume_from, trainer, iteration)
        trainer.add_callback(recorder)
        trainer.remove_callback(PrinterCallback)
        if config.model.adapter is not None and config.model.adapter.each_iteration == "fresh":
            trainer.add_callback(FrozenRanks(policy, config.model.adapter.rank))
        trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
        if trainer.state.global_step < trainer.state.max_steps:
            stop.check()
            raise RuntimeError(
                f"training stopped at step {trainer.state.global_step} of "
                f"{trainer.state.max_steps}, and nobody asked for it"
            )
        if config.train.weights == "split":
            restore_fp32(trainer.optimizer)
        # Each process of FSDP2 sees its own part.
        infinite = not all(bool(p.isfinite().all()) for p in policy.parameters())
        if largest_of_all(int(infinite)):
            raise DivergenceError(f"the weights of θ_{iteration.number} are NaN or infinite")
    if trainer.is_fsdp_enabled:  # saved steps are sharded, a checkpoint is not
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(publish_to))
    if not is_main_process():
        return {}
    (publish_to / "training_args.bin").unlink(missing_ok=True)  # a pickle that nobody reads
    if base is not None:
        generation.save_pretrained(str(publish_to))  # PEFT saves the adapter alone
        complete_adapter(publish_to, base)
    flush(iteration.training_log)
    log = describe_file(iteration.folder, iteration.training_log)
    return {"seconds": recorder.seconds, "processes": process_count(), "training_log": log}


def _check_parallel(trainer: Trainer, config: RunConfig) -> None:
    wanted = process_count() > 1 and config.train.parallel == "fsdp2"
    if wanted != bool(trainer.is_fsdp_enabled):
        raise InputError(
            "train.parallel: fsdp2: accelerate shards models on GPUs only; set it to ddp"
        )


def _check_saved_step(saved: Path | None, trainer: Trainer, iteration: Iteration) -> None:
    """Raise an InputError if a saved step cannot be read by the way in which `trainer` trains."""
    if saved is None:
        return
    is_sharded = next(saved.rglob("*.distcp"), None) is not None
    if is_sharded != bool(trainer.is_fsdp_enabled):
        by, now = ("fsdp2", "whole") if is_sharded else ("ddp, or in one process", "sharded")
        raise InputError(
            f"{saved}: this step was saved by train.parallel {by}, and cannot be loaded as a {now} "
            "model; train as before, or run "
            f"`tpaw run {iteration.run_root} --restart-iteration {iteration.number}`"
        )


@contextlib.contextmanager
def _with_advice(iteration: Iteration, config: RunConfig) -> Iterator[None]:
    again = (
        f"tpaw run {shlex.quote(str(iteration.run_root))} --restart-iteration {iteration.number}"
    )
    try:
        yield
    except DivergenceError as error:
        raise DivergenceError(
            f"Training of θ_{iteration.number} diverged: {error}. Train it again with a lower "
            f"RATE: `{again} --set {shlex.quote(_lower_rate(config, iteration.t))}`."
        ) from None
    except pickle.UnpicklingError:  # torch runs no code from it
        raise ArtifactError(
            f"{iteration.last_saved_step()}: a file of this saved step contains what tpaw never "
            "writes, and it may be harmful; it was not run. If you trust the rest of the run, run "
            f"`{again}`."
        ) from None


def _lower_rate(config: RunConfig, t: int) -> str:
    """Another learning rate from iteration t on; those before have trained with theirs."""
    if t == 0:
        return "train.learning_rate=RATE"
    rates = [str(at_iteration(config.train.learning_rate, i)) for i in range(t)]
    rates += ["RATE"] * (config.iterations - t)
    return f"train.learning_rate=[{', '.join(rates)}]"
