"""TrainingArguments: what a setting of ours decides, and what cannot be set."""

from __future__ import annotations

import dataclasses

import pytest
from messages import by_first, refused
from transformers import TrainingArguments

import tpaw.training.arguments
from tpaw.config.schema import RunConfig
from tpaw.training.arguments import (
    CANNOT_BE_SET,
    RESERVED,
    USE_INSTEAD,
    check_training,
    training_arguments,
)


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_a_reserved_argument_is_refused_by_name(name):
    config = RunConfig.load("starter", overrides=[f"train.training_arguments={{{name}: 1}}"])
    with refused(f"train.training_arguments.{name}"):
        check_training(config)


@by_first(
    ("arguments", "parts"),
    [
        ("{max_grad_norm: abc}", ["max_grad_norm", "'abc'"]),
        ("{max_grad_norm: .nan}", ["max_grad_norm", "nan", "finite"]),
        ("{lr_scheduler_kwargs: {min_lr: .inf}}", ["lr_scheduler_kwargs", "inf", "finite"]),
        ("{weight_decay: true}", ["weight_decay", "True"]),
        ("{label_names: a}", ["label_names", "'a'", "list"]),
        ("{run_name: !!binary aGk=}", ["run_name", "b'hi'"]),
        ("{dataloader_num_workers: -1}", ["num_workers", "non-negative"]),
        ("{dataloader_num_workers: 99999}", ["dataloader_num_workers", 99999, 256]),
        ("{log_level: abc}", ["abc"]),
        ("{accelerator_config: {x: 1}}", ["x"]),
        ("{debug: abc}", ["abc"]),
    ],
)
def test_a_value_that_training_could_not_use_is_refused_before_it(arguments, parts):
    config = RunConfig.load("starter", overrides=[f"train.training_arguments={arguments}"])
    with refused("train.training_arguments", *parts):
        check_training(config)


@pytest.mark.parametrize("method", ["self_play", "sft"])
def test_what_transformers_takes_is_taken(method):
    given = {
        "weight_decay": 1,
        "max_grad_norm": 0.5,
        "dataloader_num_workers": 0,
        "ddp_bucket_cap_mb": None,
        "label_names": ["a"],
        "lr_scheduler_kwargs": {"num_cycles": 0.5},
        "optim_args": "alpha=0.9",
    }
    sources = ["starter", *(["sft"] if method == "sft" else [])]
    settings = {"train": {"training_arguments": given, "optimizer": "rmsprop"}}
    check_training(RunConfig.load(*sources, settings))


def test_each_setting_of_training_is_the_argument_of_its_iteration(tmp_path):
    settings = {
        "iterations": 2,
        "precision": "bf16",
        "device": "cpu",
        "train": {
            "epochs": [5, 3],
            "learning_rate": [1e-6, 2e-7],
            "optimizer": "adafactor",
            "schedule": "cosine",
            "warmup": 0.25,
            "activation_checkpointing": True,
            "batch_size": 7,
            "log_every": 11,
            "save_every": 13,
            "training_arguments": {"max_grad_norm": 0.5},
        },
    }
    config = RunConfig.load("starter", settings, {"objective": {"lambda": 0.1}})
    first, second = (training_arguments(config, t, tmp_path) for t in (0, 1))
    expected = {
        "num_train_epochs": 3,
        "learning_rate": 2e-7,
        "optim": "adafactor",
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.25,
        "activation_checkpointing": True,
        "bf16": True,
        "per_device_train_batch_size": 7,
        "logging_steps": 11,
        "logging_first_step": True,
        "save_steps": 13,
        "report_to": [],
        "max_grad_norm": 0.5,
    }
    assert {name: getattr(second, name) for name in expected} == expected
    assert (first.num_train_epochs, first.learning_rate) == (5, 1e-6)
    assert first.seed != second.seed


def test_arguments_are_built_once_for_each_pair_of_values(monkeypatch):
    built = []
    original = tpaw.training.arguments.training_arguments
    monkeypatch.setattr(
        "tpaw.training.arguments.training_arguments",
        lambda config, t, output: built.append(t) or original(config, t, output),
    )
    same = {"learning_rate": 1e-6, "epochs": 1}
    settings = {"iterations": 1000, "train": same, "objective": {"lambda": 0.1}}
    check_training(RunConfig.load("starter", settings))
    settings = {"iterations": 4, "train": same | {"epochs": [1, 2, 1, 2]}}
    check_training(RunConfig.load("starter", settings))
    assert len(built) == 1 + 2


def test_reserved_names_are_names_of_transformers():
    assert set(RESERVED) <= {f.name for f in dataclasses.fields(TrainingArguments)}
    assert not set(USE_INSTEAD) & set(CANNOT_BE_SET)
