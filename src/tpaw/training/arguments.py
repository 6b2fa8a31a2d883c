"""Build transformers' TrainingArguments for an iteration, and check them before a run begins.

transformers refuses some settings only when training starts, after hours of generation and scoring.
`check_training` tries them first, on a model with one weight.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_type_hints

import numpy as np
import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from tpaw.config.messages import explain_unknown
from tpaw.config.schema import RunConfig, at_iteration
from tpaw.errors import InputError, brief
from tpaw.models.loading import pick_device
from tpaw.runtime.processes import process_count
from tpaw.training.split_weights import SplitRMSprop
from tpaw.training.trl import sft_arguments

# TrainingArguments that another setting decides. The value names this setting.
USE_INSTEAD: Mapping[str, str] = {
    "output_dir": "--output",
    "num_train_epochs": "train.epochs",
    "max_steps": "train.epochs",
    "learning_rate": "train.learning_rate",
    "per_device_train_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.batch_size and train.tokens_per_row",
    "auto_find_batch_size": "train.tokens_per_row",
    "optim": "train.optimizer",
    "lr_scheduler_type": "train.schedule",
    "warmup_steps": "train.warmup",
    "activation_checkpointing": "train.activation_checkpointing",
    "gradient_checkpointing": "train.activation_checkpointing",
    "logging_steps": "train.log_every",
    "logging_strategy": "train.log_every",
    "save_steps": "train.save_every",
    "save_strategy": "train.save_every",
    "report_to": "train.report_to",
    "seed": "seed",
    "data_seed": "seed",
    "full_determinism": "deterministic",
    "bf16": "precision",
    "fp16": "precision",
    "use_cpu": "device",
    "eval_strategy": "evaluate",
    "eval_steps": "evaluate",
    "eval_on_start": "evaluate",
    "do_eval": "evaluate",
    "train_sampling_strategy": "train.group_by_prompt",
    "fsdp": "train.parallel",
    "fsdp_config": "train.parallel",
}

# TrainingArguments that cannot be set. The value says why.
CANNOT_BE_SET: Mapping[str, str] = {
    "logging_nan_inf_filter": "TPAW never filters a NaN out of the log",
    "ignore_data_skip": "a resumed iteration sees each batch exactly once",
    "save_only_model": "an iteration resumes from its saved steps",
    "save_total_limit": "TPAW always keeps the newest saved step",
    "resume_from_checkpoint": "run the same command again to resume",
    "remove_unused_columns": "the columns are TPAW's own",
    "push_to_hub": "push a published checkpoint instead",
    "load_best_model_at_end": "θ_{t+1} is always the last step",
    "metric_for_best_model": "θ_{t+1} is always the last step",
    "dataloader_drop_last": "TPAW trains on every triple",
    "disable_tqdm": "TPAW shows its own progress bars",
    "logging_first_step": "TPAW always logs the first step",
    "label_smoothing_factor": "the objective has no labels",
    "neftune_noise_alpha": "the policy must start as its newest player",
    "include_num_input_tokens_seen": "training.jsonl reports log-probs per token instead",
    "use_liger_kernel": "TPAW has its own fused head and never stores all logits",
    "enable_jit_checkpoint": "TPAW itself saves a step when SIGTERM arrives",
    "deepspeed": "it is untested; train.parallel knows ddp and fsdp2",
    "parallelism_config": "it is untested; train.parallel knows ddp and fsdp2",
}

RESERVED = (*USE_INSTEAD, *CANNOT_BE_SET)

# A larger number of processes that load data is a typing error.
MAX_WORKERS = 256

# These schedules need an evaluation metric during training. TPAW evaluates only after training.
_SCHEDULES_BY_METRIC = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)


def training_arguments(config: RunConfig, t: int, output: Path) -> TrainingArguments:
    """Build the arguments of the iteration that trains θ_{t+1}.

    Args:
        config: the run's configuration.
        t: iteration, counted from 0.
        output: folder for saved steps.

    Raises:
        InputError: transformers refuses them, or more than one GPU is visible.
    """
    train = config.train
    settings = dict(train.training_arguments)
    if train.weights == "split":
        settings["max_grad_norm"] = 0.0  # the optimizer clips, see `split_optimizer`
    kind: type[TrainingArguments] = TrainingArguments
    own: dict[str, Any] = {}
    if config.trains_by_sft:
        kind, own = sft_arguments(config)
    try:
        arguments = kind(
            output_dir=str(output),
            num_train_epochs=at_iteration(train.epochs, t),
            learning_rate=at_iteration(train.learning_rate, t),
            optim=train.optimizer,
            lr_scheduler_type=train.schedule,
            warmup_steps=train.warmup,
            activation_checkpointing=train.activation_checkpointing,
            bf16=config.precision == "bf16",
            use_cpu=pick_device(config.device).type == "cpu",
            seed=int(np.random.SeedSequence((config.seed, t)).generate_state(1)[0] % 2**31),
            logging_steps=train.log_every,
            logging_first_step=True,
            save_strategy="steps",
            save_steps=train.save_every,
            report_to="none",  # the process of the run feeds the trackers
            disable_tqdm=True,
            **({"per_device_train_batch_size": train.batch_size // process_count()} | own),
            **({"run_name": f"theta_{t + 1}"} | _of_several_processes(config) | settings),
        )
    except Exception as error:  # transformers raises many types
        raise InputError(f"train.training_arguments: {_described(error)}") from None
    if arguments.n_gpu > 1:
        raise InputError(
            f"device: {arguments.n_gpu} GPUs are visible, but one process uses one; set "
            "launch.engine to ray to use them all, or CUDA_VISIBLE_DEVICES to the number of one GPU"
        )
    return arguments


def _of_several_processes(config: RunConfig) -> dict[str, Any]:
    """How the processes of `train.parallel` hold the model.

    Saved steps of FSDP2 are sharded (torch's distributed checkpoints), so that each process writes
    its own part and another number of processes can read it.
    """
    if process_count() == 1 or config.train.parallel == "ddp":
        return {}
    return {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}}


def split_optimizer(
    config: RunConfig, arguments: TrainingArguments
) -> tuple[type[SplitRMSprop], dict[str, Any]] | None:
    """Return the optimizer class and its options for `train.weights: split`.

    Args:
        config: the run's configuration.
        arguments: see `training_arguments`.

    Returns:
        None for `train.weights: fp32`, where transformers chooses the optimizer.
    """
    if config.train.weights == "fp32":
        return None
    limit = config.train.training_arguments.get("max_grad_norm", TrainingArguments.max_grad_norm)
    options = Trainer.get_optimizer_cls_and_kwargs(arguments)[1]
    return SplitRMSprop, options | {"max_grad_norm": limit}


def check_training(config: RunConfig) -> None:
    """Refuse an optimizer, schedule or TrainingArgument that cannot work.

    It builds what training builds, on a model of one weight and a data set of one record.

    Raises:
        InputError: names the setting, and says what is allowed or what transformers reports.
    """
    train = config.train
    _refuse_reserved(train.training_arguments)
    known = [field.name for field in dataclasses.fields(TrainingArguments) if field.init]
    explain_unknown("train.training_arguments", train.training_arguments, known)
    _check_values(train.training_arguments)
    explain_unknown("train.optimizer", [train.optimizer], [o.value for o in OptimizerNames])
    schedules = [s.value for s in SchedulerType if s not in _SCHEDULES_BY_METRIC]
    explain_unknown("train.schedule", [train.schedule], schedules)
    with TemporaryDirectory() as folder:
        per_iteration = [train.learning_rate, train.epochs]
        different = {
            tuple(at_iteration(v, t) for v in per_iteration): t for t in range(config.iterations)
        }
        for t in different.values():
            arguments = training_arguments(config, t, Path(folder))
        model = torch.nn.Linear(1, 1)
        try:
            optimizer_class, options = split_optimizer(
                config, arguments
            ) or Trainer.get_optimizer_cls_and_kwargs(arguments, model)
            optimizer = optimizer_class(model.parameters(), **options)
        except (ImportError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"train.optimizer: {train.optimizer}: {error}") from None
        try:
            get_scheduler(
                train.schedule,
                optimizer,
                num_warmup_steps=1,
                num_training_steps=10,
                scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
            )
        except (TypeError, ValueError) as error:
            raise InputError(f"train.schedule: {train.schedule}: {error}") from None
        try:
            Trainer(model, arguments, train_dataset=[{}]).get_train_dataloader()
        except Exception as error:  # transformers, accelerate and torch raise many types
            raise InputError(f"train.training_arguments: {_described(error)}") from None


def _check_values(values: Mapping[str, Any]) -> None:
    """Compare the values with the types that transformers declares.

    transformers itself compares few of them. It fails with the others when it uses them.
    """
    declared = get_type_hints(TrainingArguments)
    for name, value in values.items():
        key = f"train.training_arguments.{name}: {brief(value)}"
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            raise InputError(f"{key}: must be text, finite numbers, lists or mappings") from None
        try:
            TypeAdapter(declared[name], config=ConfigDict(strict=True)).validate_python(value)
        except ValidationError as error:
            reasons = dict.fromkeys(problem["msg"] for problem in error.errors())
            reason = " or ".join(reasons).replace("Input should be", "must be")
            raise InputError(f"{key}: {reason}") from None
        if name == "dataloader_num_workers" and value > MAX_WORKERS:
            raise InputError(f"{key}: must be at most {MAX_WORKERS}")


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if isinstance(error, LookupError) else str(error)


def _refuse_reserved(names: Iterable[str]) -> None:
    for name in names:
        key = f"train.training_arguments.{name}"
        if name in USE_INSTEAD:
            raise InputError(f"{key} cannot be set; use {USE_INSTEAD[name]}")
        if name in CANNOT_BE_SET:
            raise InputError(f"{key} cannot be set: {CANNOT_BE_SET[name]}")
