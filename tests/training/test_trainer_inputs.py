"""What TeamTrainer takes, and what it refuses: datasets and arguments."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from builders import PAPER, arguments, make_model, train, triples
from datasets import Dataset
from messages import DIFFERENCE, refused

from tpaw.logprobs.packing import PACKED_LAYOUT
from tpaw.objectives.base import ObjectiveNeeds
from tpaw.objectives.tpaw import TeamObjective
from tpaw.training.batching import collate_triples, columns_for
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
    ],
)
def test_an_argument_that_would_do_nothing_is_refused(option, tmp_path):
    rows = triples(2, [make_model(seed=1)])
    [name] = option
    with refused(name, error=ValueError):
        train(make_model(seed=1), rows, arguments(tmp_path, **option))


def test_inputs_keep_their_types_under_deepspeed(tmp_path, monkeypatch):
    """The Trainer's own `_prepare_inputs` would make bf16 log-probs of them."""
    rows = triples(4, [make_model(seed=2)])
    trainer = TeamTrainer(
        make_model(seed=1), arguments(tmp_path), rows, None, TeamObjective(**PAPER)
    )
    trainer.is_deepspeed_enabled = True
    batch = trainer._prepare_inputs(collate_triples(rows, PACKED_LAYOUT))
    assert batch["player_target_logps_BK"].dtype == torch.float64
    assert batch["player_target_logps_BK"].tolist() == [r["player_target_logps"] for r in rows]


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
