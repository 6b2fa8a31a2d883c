"""TeamTrainer by itself, on a dataset with its columns: the way people use it in their own loop."""

from __future__ import annotations

import contextlib
import copy
import math
import random

import numpy as np
import pytest
import torch
from builders import PAPER, arguments, make_model, score, train, triples
from messages import DIFFERENCE, refused
from oracles import oracle, paper_loss
from transformers import TrainerCallback, set_seed

from tpaw.errors import DivergenceError, PolicyMismatchError
from tpaw.logprobs.packing import PACKED_LAYOUT
from tpaw.objectives.tpaw import TeamObjective
from tpaw.training.batching import collate_triples
from tpaw.training.first_step import FIRST_STEP_TOLERANCE
from tpaw.training.trainer import TeamTrainer


class Gradients(TrainerCallback):
    """Keeps the gradient of every optimizer step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append([p.grad.clone() for p in model.parameters()])


@pytest.mark.parametrize("split", [(1, 4), (2, 2), (3, 2)])
def test_accumulation_changes_neither_loss_nor_gradient(tmp_path, split):
    """10 triples in steps of 4 (6 for the odd split): the last step is smaller and ragged."""
    micro, accumulation = split
    rows = triples(10, [make_model(seed=0), make_model(seed=2)])
    whole, cut = Gradients(), Gradients()
    one = train(
        make_model(seed=1),
        rows,
        arguments(tmp_path, per_device_train_batch_size=micro * accumulation),
        callbacks=[whole],
    )
    many = train(
        make_model(seed=1),
        rows,
        arguments(
            tmp_path, per_device_train_batch_size=micro, gradient_accumulation_steps=accumulation
        ),
        callbacks=[cut],
    )
    losses = [[x["loss"] for x in t.state.log_history if "loss" in x] for t in (one, many)]
    assert len(losses[0]) == math.ceil(10 / (micro * accumulation))
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    for a, b in zip(whole.steps, cut.steps, strict=True):
        for x, y in zip(a, b, strict=True):
            assert torch.allclose(x, y, atol=1e-6)


def test_the_first_steps_loss_and_gradient_are_the_papers(tmp_path):
    """Against the scalar objective and one float64 sequence at a time."""
    players = [make_model(seed=1), make_model(seed=2), make_model(seed=3)]
    rows = triples(6, players)
    reference = make_model(seed=1).double()
    total, mean_loss = 0, 0.0
    for row in rows:
        y = oracle(reference, row["prompt_ids"], row["target_ids"])
        g = oracle(reference, row["prompt_ids"], row["generated_ids"])
        pairs = list(zip(row["player_target_logps"], row["player_generated_logps"], strict=True))
        # η is 1: the newest player's reward is 0 up to rounding, on either side of [4].
        loss, grad_y, grad_g, _, _ = paper_loss(y.item(), g.item(), pairs, 0.1, 1.0, 0.5)
        total = total + (grad_y * y + grad_g * g) / 6
        mean_loss += loss / 6
    expected = torch.autograd.grad(total, list(reference.parameters()))
    kept = Gradients()
    trainer = train(
        make_model(seed=1),
        rows,
        arguments(tmp_path, per_device_train_batch_size=6, max_grad_norm=0.0),
        objective=PAPER | {"eta": 1.0},
        callbacks=[kept],
    )
    assert trainer.state.log_history[0]["loss"] == pytest.approx(mean_loss, abs=1e-6)
    for found, wanted in zip(kept.steps[0], expected, strict=True):
        assert torch.allclose(found.double(), wanted, atol=1e-6)


def test_metrics_are_means_over_triples_with_trls_names(tmp_path):
    players = [make_model(seed=2), make_model(seed=3)]
    rows = triples(7, players)
    for row in rows[:2]:
        row["is_truncated"] = True
    for row in rows[2:]:
        row["is_truncated"] = False
    trainer = train(
        make_model(seed=1),
        rows,
        arguments(
            tmp_path,
            per_device_train_batch_size=3,
            gradient_accumulation_steps=3,
            learning_rate=1e-9,
        ),
    )
    logged = trainer.state.log_history[0]
    reference = make_model(seed=1).double()
    with torch.no_grad():
        y = [oracle(reference, r["prompt_ids"], r["target_ids"]).item() for r in rows]
        g = [oracle(reference, r["prompt_ids"], r["generated_ids"]).item() for r in rows]
    targets = 0.1 * (np.array(y)[:, None] - np.array([r["player_target_logps"] for r in rows]))
    generated = 0.1 * (np.array(g)[:, None] - np.array([r["player_generated_logps"] for r in rows]))
    margins = targets - generated
    expected = {
        "rewards/target": targets.mean(),
        "rewards/target/player_1": targets[:, 1].mean(),
        "rewards/generated": generated.mean(),
        "rewards/margins": margins.mean(),
        "rewards/margins/player_0": margins[:, 0].mean(),
        "rewards/accuracies": (margins > 0).mean(),
        "weights/target": (targets <= 0).mean(),
        "logps/target": np.mean(y),
        "logps/generated": np.mean(g),
        "logps/target_per_token": sum(y) / sum(len(r["target_ids"]) for r in rows),
        "logps/generated_per_token": sum(g) / sum(len(r["generated_ids"]) for r in rows),
        "share/truncated": 2 / 7,
        "share/identical": 2 / 7,
    }
    for name, value in expected.items():
        assert logged[name] == pytest.approx(value, abs=1e-5), name
    assert logged["weights/player_0"] + logged["weights/player_1"] == pytest.approx(1)


def test_a_line_of_the_log_is_about_the_triples_since_the_last_one(tmp_path):
    rows = triples(8, [make_model(seed=2)])
    trainer = train(make_model(seed=1), rows, arguments(tmp_path, learning_rate=1e-30))
    first, second = (x["logps/target"] for x in trainer.state.log_history if "loss" in x)
    reference = make_model(seed=1).double()
    with torch.no_grad():
        y = [oracle(reference, r["prompt_ids"], r["target_ids"]).item() for r in rows]
    # Two steps of four triples: the mean of both is the mean over all.
    assert (first + second) / 2 == pytest.approx(np.mean(y), abs=1e-4)
    assert abs(first - second) > 1


def test_a_loss_that_is_not_finite_is_logged_as_it_is(tmp_path):
    rows = triples(8, [make_model(seed=1)])
    for row in rows:  # a player that gives the response no probability: t is −∞, the loss is ∞
        row["player_generated_logps"] = [-math.inf]
    trainer = train(
        make_model(seed=1), rows, arguments(tmp_path), PAPER | {"player_weight": "uniform"}
    )
    assert trainer.state.log_history[0]["loss"] == math.inf


def test_the_first_step_check_stops_a_policy_that_is_not_its_newest_player(tmp_path):
    rows = triples(8, [make_model(seed=1), make_model(seed=2)])
    tolerance = FIRST_STEP_TOLERANCE["fp32"]
    train(
        make_model(seed=1),
        rows,
        arguments(tmp_path),
        start_column=0,
        first_step_tolerance=tolerance,
    )
    with refused(error=PolicyMismatchError, hide=DIFFERENCE):
        train(
            make_model(seed=2),
            rows,
            arguments(tmp_path),
            start_column=0,
            first_step_tolerance=tolerance,
        )
    train(make_model(seed=2), rows, arguments(tmp_path))  # off: one's own loop may mean it
    # A mask that is off by one token is found too.
    shifted = [
        row
        | {
            "prompt_ids": np.append(row["prompt_ids"], row["target_ids"][0]),
            "target_ids": row["target_ids"][1:],
        }
        for row in rows
    ]
    with pytest.raises(PolicyMismatchError):
        train(
            make_model(seed=1),
            shifted,
            arguments(tmp_path),
            start_column=0,
            first_step_tolerance=tolerance,
        )


def test_dropout_is_off_whatever_the_model_brings(tmp_path):
    policy = make_model("gpt2", seed=1)
    assert policy.config.resid_pdrop > 0
    rows = triples(8, [make_model("gpt2", seed=1)])
    train(
        policy,
        rows,
        arguments(tmp_path),
        start_column=0,
        first_step_tolerance=FIRST_STEP_TOLERANCE["fp32"],
    )


def test_the_first_step_check_is_per_token_and_infinity_stops_the_run(tmp_path):
    rows = triples(4, [make_model(seed=1)])
    tokens = [len(row["target_ids"]) + len(row["generated_ids"]) for row in rows]
    for row in rows:  # one triple is off by 0.01 nats per token of the whole micro-batch
        row["player_target_logps"] = list(row["player_target_logps"])
    rows[0]["player_target_logps"][0] += 0.01 * sum(tokens)
    train(make_model(seed=1), rows, arguments(tmp_path), start_column=0, first_step_tolerance=0.011)
    with refused("0.01", error=PolicyMismatchError):
        train(
            make_model(seed=1),
            rows,
            arguments(tmp_path),
            start_column=0,
            first_step_tolerance=0.009,
        )

    class Impossible(torch.nn.Module):  # gives the target's first token no probability at all
        def __init__(self):
            super().__init__()
            self.model = make_model(seed=1)
            self.config = self.model.config

        def forward(self, input_ids, use_cache):
            out = self.model(input_ids=input_ids, use_cache=use_cache)
            out.logits[..., int(rows[0]["target_ids"][0])] = -math.inf
            return out

    with refused("step 1", error=DivergenceError):
        train(
            Impossible(), rows[:1], arguments(tmp_path), start_column=0, first_step_tolerance=0.011
        )


def test_the_processes_average_is_the_mean_over_all_triples(tmp_path, monkeypatch):
    rows = triples(6, [make_model(seed=2)])
    trainer = TeamTrainer(
        make_model(seed=1), arguments(tmp_path), rows, None, TeamObjective(**PAPER)
    )
    trainer.model.eval()

    def loss(part):
        row = trainer._prepare_inputs(collate_triples(part, PACKED_LAYOUT))
        return trainer.compute_loss(trainer.model, row, num_items_in_batch=6)

    whole = loss(rows).item()
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", property(lambda self: 2))
    assert (loss(rows[:2]) + loss(rows[2:])).item() / 2 == pytest.approx(whole, rel=1e-6)
    assert trainer._metric_sums is None  # a model that is not in training mode leaves no metrics


def test_bf16_computation_passes_the_first_step_check_and_moves_fp32_weights(tmp_path):
    policy = make_model(seed=1)
    before = copy.deepcopy(policy.state_dict())
    rows = triples(8, [make_model(seed=1)])
    for row in rows:
        for kind in ("target", "generated"):
            sequence = [(row["prompt_ids"], row[f"{kind}_ids"])]
            row[f"player_{kind}_logps"] = score(
                make_model(seed=1), sequence, tokens_per_row=1, use_bf16=True
            )
    train(
        policy,
        rows,
        arguments(
            tmp_path, bf16=True, learning_rate=1e-7, warmup_steps=0, optim="sgd", max_grad_norm=0.0
        ),
        start_column=0,
        first_step_tolerance=FIRST_STEP_TOLERANCE["bf16"],
    )
    # At 1e-7 a bf16 weight would not move; the optimizer's weights are fp32 and do.
    changed = [not torch.equal(before[name], value) for name, value in policy.state_dict().items()]
    assert all(value.dtype == torch.float32 for value in policy.state_dict().values())
    assert any(changed)


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_activation_checkpointing_computes_every_layer_again_and_changes_nothing(tmp_path, name):
    rows = triples(8, [make_model(seed=1)])
    weights, forwards = [], []
    for on in (False, True):
        policy = make_model(seed=1)
        trainer = TeamTrainer(
            policy, arguments(tmp_path, **{name: on}), rows, None, TeamObjective(**PAPER), 0
        )
        calls = []
        for layer in policy.model.layers:
            layer.mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        trainer.train()
        weights.append(policy.state_dict())
        forwards.append(len(calls))
    assert forwards == [4, 8]  # two steps of one row, two layers
    for name in weights[0]:
        assert torch.allclose(weights[0][name], weights[1][name], atol=1e-6)


def test_a_nan_stops_the_run_and_is_not_filtered_away(tmp_path):
    rows = triples(8, [make_model(seed=1)])
    rows[3]["player_target_logps"] = [math.nan]
    with refused("row 3", "player_target_logps", error=ValueError):
        train(make_model(seed=1), rows, arguments(tmp_path))


@pytest.mark.parametrize(("warmup", "at_rest"), [(0.5, 2), (0, 1)])
def test_while_the_policy_is_its_newest_player_every_target_weight_of_that_player_is_eta(
    tmp_path, warmup, at_rest
):
    """Equation 4 at a reward of 0, where rounding would make it a coin's toss."""
    rows = triples(16, [make_model(seed=1)])
    for row in rows:  # what scoring in other batches may differ by
        row["player_target_logps"] = [row["player_target_logps"][0] - 1e-5]
    trainer = train(
        make_model(seed=1),
        rows,
        arguments(tmp_path, warmup_steps=warmup, learning_rate=1e-3),
        start_column=0,
        first_step_tolerance=FIRST_STEP_TOLERANCE["fp32"],
    )
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["weights/target"] for line in lines[:at_rest]] == [1.0] * at_rest
    assert [line["rewards/target"] for line in lines[:at_rest]] == [0.0] * at_rest
    assert lines[at_rest]["rewards/target"] != 0
    found = train(
        make_model(seed=1), rows, arguments(tmp_path, warmup_steps=warmup, learning_rate=1e-3)
    )
    assert [x.get("loss") for x in found.state.log_history] == [
        x.get("loss") for x in trainer.state.log_history
    ]


def test_it_changes_no_flag_of_torch_and_draws_nothing_when_it_is_built(tmp_path):
    """As every Trainer it seeds when it is built. Nothing that it does beside draws a number."""

    def flags():
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
            torch.backends.cudnn.deterministic,
            torch.backends.cudnn.benchmark,
            torch.get_float32_matmul_precision(),
            torch.get_default_dtype(),
            torch.get_num_threads(),
            torch.is_grad_enabled(),
        )

    def draws():
        return random.random(), np.random.random(), torch.rand(1).item()  # noqa: NPY002

    rows, before = triples(8, [make_model(seed=1)]), flags()
    set_seed(1)
    expected = draws()
    trainer = TeamTrainer(
        make_model(seed=1), arguments(tmp_path, seed=1), rows, None, TeamObjective(**PAPER)
    )
    assert draws() == expected
    trainer.train()
    assert flags() == before


def test_processes_exchange_gradients_at_the_last_row_of_a_step_alone(tmp_path, monkeypatch):
    rows = triples(8, [make_model(seed=1)])
    calls = []

    class Watching(TeamTrainer):
        def compute_loss(self, *args, **kwargs):
            calls.append(self.state.global_step)
            return super().compute_loss(*args, **kwargs)

    trainer = Watching(
        make_model(seed=1),
        arguments(tmp_path),
        rows,
        None,
        TeamObjective(**PAPER),
        tokens_per_row=40,
    )
    waits = []

    @contextlib.contextmanager
    def no_sync(model):
        waits.append(len(calls))
        yield

    monkeypatch.setattr(trainer.accelerator, "no_sync", no_sync)
    trainer.train()
    assert len(calls) > 4
    exchanging = [i for i in range(len(calls)) if i not in waits]
    assert [calls[i] for i in exchanging] == [0, 1]  # once in each of the two steps
    assert exchanging == [calls.index(1) - 1, len(calls) - 1]
