"""What TeamTrainer takes, and what it refuses: datasets and arguments."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import DistributedType
from builders import PAPER, arguments, make_model, train, triples
from datasets import Dataset, DatasetDict
from distributed_driver import turn_fsdp_on
from messages import DIFFERENCE, refused, says

from tpaw.objectives.base import ObjectiveNeeds
from tpaw.objectives.tpaw import TeamObjective
from tpaw.training.batching import columns_for
from tpaw.training.checks import CheckedRows, check_arguments
from tpaw.training.trainer import TeamTrainer


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


def test_a_model_that_sees_what_it_must_predict_is_refused(tmp_path):
    rows = triples(4, [make_model(seed=1)])
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.BertConfig(vocab_size=320, intermediate_size=48, **sizes)
    with refused("bert", "not causal", hide=DIFFERENCE):
        train(transformers.BertLMHeadModel(config), rows, arguments(tmp_path))


def test_rope_that_depends_on_the_longest_row_is_refused_beyond_the_original_length(tmp_path):
    rows = triples(4, [make_model(seed=1)])
    longest = max(
        len(row["prompt_ids"]) + len(row[key])
        for row in rows
        for key in ("target_ids", "generated_ids")
    )
    for limit in (longest, longest - 1):
        model = make_model("llama", seed=1)
        model.config.rope_parameters = {
            "rope_type": "dynamic",
            "rope_theta": 1e4,
            "factor": 2.0,
            "original_max_position_embeddings": limit,
        }
        model = type(model)(model.config)
        if limit == longest:
            train(model, rows, arguments(tmp_path, max_steps=1))
        else:
            with refused("dynamic", longest, limit):
                train(model, rows, arguments(tmp_path))


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
        {"save_strategy": "best", "metric_for_best_model": "loss"},
        {"learning_rate": 1e300},
        {"learning_rate": math.nan},
    ],
)
def test_an_argument_that_would_do_nothing_is_refused(option, tmp_path):
    rows = triples(2, [make_model(seed=1)])
    name = next(iter(option))
    with refused(name, error=ValueError):
        train(make_model(seed=1), rows, arguments(tmp_path, **option))


@pytest.mark.parametrize(
    "name",
    [
        "eval_dataset",
        "compute_metrics",
        "preprocess_logits_for_metrics",
        "data_collator",
        "compute_loss_func",
        "model_init",
        "ref_model",
        "peft_config",
    ],
)
def test_an_option_of_other_trainers_is_refused(name, tmp_path):
    rows = triples(1, [make_model(seed=1)])
    with refused(name, error=ValueError):
        train(make_model(seed=1), rows, arguments(tmp_path), **{name: object()})
    train(make_model(seed=1), rows, arguments(tmp_path), **{name: None})


@pytest.mark.parametrize("method", ["evaluate", "predict"])
def test_it_only_trains(method, tmp_path):
    rows = triples(1, [make_model(seed=1)])
    trainer = TeamTrainer(
        make_model(seed=1), arguments(tmp_path), rows, None, TeamObjective(**PAPER)
    )
    with refused(error=NotImplementedError):
        getattr(trainer, method)(rows)


def test_a_path_is_loaded_in_fp32_as_by_trl(tmp_path):
    rows = triples(8, [make_model(seed=1)])
    make_model(seed=1).bfloat16().save_pretrained(tmp_path / "model")
    loaded = make_model(seed=1).bfloat16().float()
    found, expected = (
        train(model, rows, arguments(tmp_path)) for model in (str(tmp_path / "model"), loaded)
    )
    assert found.model.dtype == torch.float32
    assert found.state.log_history[0]["loss"] == expected.state.log_history[0]["loss"]


@pytest.mark.parametrize("model", [None, lambda: 1, Path])
def test_what_is_no_model_is_refused(model, tmp_path):
    with refused("model", error=TypeError, hide={"function": str(model)}):
        train(model, triples(1, [make_model(seed=1)]), arguments(tmp_path))


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, None)]
)
def test_weights_that_would_hardly_move_are_told_of(dtype, name, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model = make_model(seed=1).to(dtype)
    rows = triples(1, [make_model(seed=1)])
    args = arguments(tmp_path, learning_rate=1e-6)
    for frozen in (False, True):
        model.requires_grad_(not frozen)
        caplog.clear()
        TeamTrainer(model, args, rows, None, TeamObjective(**PAPER))
        told = [r.getMessage() for r in caplog.records if "weights of the model" in r.getMessage()]
        assert len(told) == (name is not None and not frozen)
        for text in told:
            says(text, name, "1e-06", "dtype=torch.float32")


class Streamed(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield {}


class StreamedWithLength(Streamed):
    def __len__(self):
        return 1


@pytest.mark.parametrize(
    "dataset",
    [
        Dataset.from_list([{"prompt_ids": [1]}]).to_iterable_dataset(),
        Streamed(),
        StreamedWithLength(),
        DatasetDict({"train": Dataset.from_list([{"prompt_ids": [1]}])}),
        None,
        [],
    ],
    ids=["streaming", "torch", "torch with length", "splits", "nothing", "empty"],
)
def test_a_dataset_that_cannot_be_indexed_is_refused_by_type(dataset, tmp_path):
    with refused("train_dataset", error=ValueError):
        train(make_model(seed=1), dataset, arguments(tmp_path))


@pytest.mark.parametrize(
    ("column", "value", "parts"),
    [
        ("target_ids", [7, 320], ["320", "position 1", "319"]),
        ("generated_ids", [-1], ["-1", "position 0"]),
        ("generated_ids", [5, 6, -100], ["-100", "position 2"]),
        ("prompt_ids", [2**40], [2**40]),
        ("prompt_ids", [], []),
        ("target_ids", list(range(5, 261)), ["256 positions"]),
        ("target_ids", "4 5", ["4 5"]),
        ("target_ids", [[4, 5]], [[4, 5]]),
        ("target_ids", [[4], [5, 6]], [[4], [5, 6]]),
        ("target_ids", [4.5], [4.5]),
        ("target_ids", None, [None]),
        ("player_target_logps", -1.5, [-1.5, "list"]),
        ("player_generated_logps", None, [None, "list"]),
        ("player_target_logps", ["a"], ["a"]),
        ("player_target_logps", [-1.0, -2.0], [2, "player_generated_logps", 1]),
        ("player_generated_logps", [math.nan], ["NaN"]),
    ],
)
def test_a_row_that_cannot_be_trained_on_is_named(column, value, parts, tmp_path):
    for index in (0, 2):
        rows = triples(3, [make_model(seed=1)])
        rows[index][column] = value
        with refused(f"row {index}", column, *parts, error=ValueError):
            train(make_model(seed=1), rows, arguments(tmp_path))


@pytest.mark.parametrize(("tokens", "positions"), [(256, 256), (257, 256), (257, -1)])
def test_a_row_may_fill_every_position(tokens, positions):
    """XLNet and others write -1 for "no limit"."""
    row = {"prompt_ids": [1] * (tokens - 2), "target_ids": [2], "generated_ids": [3, 4]}
    config = transformers.LlamaConfig(vocab_size=5, max_position_embeddings=256)
    config.max_position_embeddings = positions
    rows = CheckedRows([row], ObjectiveNeeds("none"), config)
    if (tokens, positions) == (257, 256):
        with pytest.raises(ValueError, match="generated_ids have 257 tokens"):
            rows[0]
    else:
        assert [len(ids) for ids in rows[0].values()] == [tokens - 2, 1, 2]


@pytest.mark.parametrize("token", [2**31, 2**31 - 1])
def test_without_a_vocabulary_an_id_must_fit_into_int32(token):
    row = {"prompt_ids": [1], "target_ids": [2], "generated_ids": [token]}
    if token < 2**31:
        assert CheckedRows([row], ObjectiveNeeds("none"))[0]["generated_ids"].tolist() == [token]
    else:
        with pytest.raises(ValueError, match=str(token)):
            CheckedRows([row], ObjectiveNeeds("none"))


def test_several_gpus_in_one_process_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match="2 GPUs"):
        check_arguments(arguments(tmp_path))


def test_rows_of_unequal_teams_and_a_row_without_a_column_are_named(tmp_path):
    rows = triples(3, [make_model(seed=1)])
    for kind in ("target", "generated"):
        rows[1][f"player_{kind}_logps"] = [-1.0, -2.0]
    with refused("row 1", "2 players", "row 0 has 1", error=ValueError):
        train(make_model(seed=1), rows, arguments(tmp_path))
    del rows[1]["target_ids"]
    with refused("row 1", "target_ids", error=ValueError):
        train(make_model(seed=1), rows, arguments(tmp_path))


def test_ids_may_be_of_any_integer_type_and_the_first_and_last_of_the_vocabulary(tmp_path):
    rows = triples(4, [make_model(seed=2)])
    for row in rows:
        row["target_ids"] = np.array([0, 319], dtype=np.int32)
    found = [
        train(
            make_model(seed=1),
            [row | {"target_ids": kind(row["target_ids"])} for row in rows],
            arguments(tmp_path),
        ).state.log_history[0]["loss"]
        for kind in (list, tuple, torch.tensor, np.int64, np.uint16)
    ]
    assert len(set(found)) == 1


@pytest.mark.cpu
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
