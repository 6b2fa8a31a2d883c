"""What TeamTrainer takes, and what it refuses: datasets and arguments."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from accelerate import Accelerator
from accelerate.utils import DistributedType
from builders import arguments, make_model, train, triples
from datasets import Dataset
from distributed_driver import turn_fsdp_on
from messages import refused

from tpaw.objectives.base import ObjectiveNeeds
from tpaw.training.batching import columns_for


def test_a_hugging_face_dataset_will_do_and_absent_columns_are_named(tmp_path):
    rows = triples(8, [make_model(seed=1)])
    as_lists = [
        {k: list(map(float if "logps" in k else int, v)) for k, v in row.items()} for row in rows
    ]
    dataset = Dataset.from_list(as_lists)
    assert set(columns_for(ObjectiveNeeds())) == set(dataset.column_names)
    a = train(make_model(seed=1), dataset, arguments(tmp_path))
    b = train(make_model(seed=1), rows, arguments(tmp_path))
    assert a.state.log_history[0]["loss"] == b.state.log_history[0]["loss"]
    with refused("player_target_logps, player_generated_logps", error=ValueError):
        train(
            make_model(),
            dataset.select_columns(["prompt_ids", "target_ids", "generated_ids"]),
            arguments(tmp_path),
        )


def test_any_optimizer_and_schedule_of_transformers(tmp_path):
    rows = triples(8, [make_model(seed=1)])
    for optimizer, schedule in (
        ("adamw_torch", "linear"),
        ("adafactor", "constant"),
        ("sgd", "cosine"),
    ):
        trainer = train(
            make_model(seed=1),
            rows,
            arguments(tmp_path, optim=optimizer, lr_scheduler_type=schedule),
        )
        assert trainer.state.global_step == 2
    json.dumps(trainer.state.log_history)


def test_floating_point_operations_are_six_for_each_weight_and_token(tmp_path):
    rows = triples(8, [make_model(seed=1)])
    trainer = train(make_model(seed=1), rows, arguments(tmp_path))
    tokens = sum(
        len(r["prompt_ids"])
        + len(r["target_ids"])
        - 1
        + (
            0
            if np.array_equal(r["target_ids"], r["generated_ids"])
            else len(r["generated_ids"]) - 1
        )
        for r in rows
    )
    model = make_model(seed=1)
    weights = model.num_parameters() - model.get_input_embeddings().weight.numel()
    assert trainer.state.total_flos == 6 * weights * tokens


@pytest.mark.parametrize(
    "option",
    [
        {"dataloader_drop_last": True},
        {"auto_find_batch_size": True},
        {"train_sampling_strategy": "group_by_length"},
        {"label_smoothing_factor": 0.1},
        {"use_liger_kernel": True},
        {"include_num_input_tokens_seen": "all"},
    ],
)
def test_an_argument_that_would_do_nothing_is_refused(option, tmp_path):
    rows = triples(2, [make_model(seed=1)])
    [name] = option
    with refused(name, error=ValueError):
        train(make_model(seed=1), rows, arguments(tmp_path, **option))


def test_fsdp1_and_deepspeed_are_refused(tmp_path, monkeypatch):
    rows = triples(2, [make_model(seed=1)])
    args = arguments(tmp_path)
    args.deepspeed_plugin = object()  # as `accelerate launch` with DeepSpeed sets it
    with refused("deepspeed", error=ValueError, hide={"plugin": str(args.deepspeed_plugin)}):
        train(make_model(seed=1), rows, args)
    monkeypatch.setattr(os, "environ", os.environ.copy())  # accelerate writes to it
    # Version 1 itself cannot be built without an accelerator.
    monkeypatch.setattr(Accelerator, "is_fsdp2", property(lambda self: False))
    args = arguments(tmp_path, fsdp=True)
    turn_fsdp_on(args, DistributedType.NO)
    with refused("fsdp_config", "version 1", error=ValueError):
        train(make_model(seed=1), rows, args)


def test_a_dataset_in_torch_format_gives_log_probs_in_full(tmp_path):
    rows = triples(4, [make_model(seed=2)])
    as_lists = [
        {k: [x.item() if hasattr(x, "item") else x for x in v] for k, v in r.items()} for r in rows
    ]
    plain = Dataset.from_list(as_lists)
    found = [
        train(make_model(seed=1), dataset, arguments(tmp_path)).state.log_history[0]["loss"]
        for dataset in (plain, plain.with_format("torch"), plain.with_format("numpy"))
    ]
    assert found[0] == found[1] == found[2]


def test_a_prompt_without_tokens_is_refused_before_training(tmp_path):
    rows = triples(3, [make_model(seed=1)])
    rows[1]["prompt_ids"] = []
    with refused("row 1", "prompt_ids", error=ValueError):
        train(make_model(seed=1), rows, arguments(tmp_path))


def test_every_epoch_has_an_order_of_its_own(tmp_path):
    rows = triples(16, [make_model(seed=2)])
    trainer = train(
        make_model(seed=1), rows, arguments(tmp_path, learning_rate=1e-30, num_train_epochs=2)
    )
    logged = [line["logps/target"] for line in trainer.state.log_history if "loss" in line]
    first, second = logged[:4], logged[4:]
    assert np.mean(first) == pytest.approx(np.mean(second), abs=1e-4)
    assert not np.allclose(first, second, atol=0.1)
