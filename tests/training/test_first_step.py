"""Before the first update: rewards that are rounding alone count as 0, for everybody."""

from __future__ import annotations

import ast
import copy
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import arguments, make_model, make_tokenizer, train, triples
from messages import says
from oracles import oracle, paper_loss
from transformers import TrainerCallback

README = Path(__file__).parents[2] / "README.md"


class FirstStep(TrainerCallback):
    """Keeps the gradient of the first step, and as an objective the target weights of it."""

    def __init__(self, objective):
        self.objective, self.needs = objective, objective.needs
        self.gradient, self.weights = None, []

    def __call__(self, logps):
        output = self.objective(logps)
        if self.gradient is None:
            self.weights += output.metrics["weights/target"].tolist()
        return output

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.gradient is None:
            self.gradient = torch.cat([p.grad.double().ravel() for p in model.parameters()])


def readme_example(**changes):
    """The README's code with `TeamTrainer`, on a CPU; None removes an argument of a call."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    [code] = [block for block in blocks if "TeamTrainer(" in block]
    tree = ast.parse(code)
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        call.keywords = [k for k in call.keywords if changes.get(k.arg, "") is not None]
        for keyword in call.keywords:
            if keyword.arg in changes:
                keyword.value = ast.Constant(changes[keyword.arg])
        if ast.unparse(call.func) == "TrainingArguments":
            call.keywords.append(ast.keyword("use_cpu", ast.Constant(True)))
    *before, train_it = tree.body
    assert ast.unparse(train_it) == "trainer.train()"
    return [ast.unparse(ast.Module(body, [])) for body in (before, [train_it])]


def rounded(rows, column, by_token):
    """The rows with one player's log-probs off by what rounding in another batch gives."""
    rng = np.random.default_rng(0)
    for row in rows:
        for kind in ("target", "generated"):
            error = rng.uniform(-by_token, by_token) * len(row[f"{kind}_ids"])
            row[f"player_{kind}_logps"][column] += error
    return rows


@pytest.mark.parametrize("start_column", [0, None], ids=["as written", "no start_column"])
@pytest.mark.parametrize("bf16", [True, False], ids=["bf16", "fp32"])
def test_the_readmes_first_step_has_the_papers_gradient(tmp_path, monkeypatch, bf16, start_column):
    monkeypatch.chdir(tmp_path)
    policy, other = make_model(seed=1), make_model(seed=2)
    reference = copy.deepcopy(policy).double()
    rows = rounded(triples(8, [policy, other]), column=0, by_token=4e-5 if bf16 else 1e-7)
    names = {"policy": policy, "dataset": rows, "tokenizer": make_tokenizer()}
    build, train_it = readme_example(bf16=bf16, start_column=start_column)
    exec(build, names)
    trainer = names["trainer"]
    trainer.objective = first = FirstStep(trainer.objective)
    trainer.add_callback(first)
    exec(train_it, names)

    total, is_eta = 0, []
    for row in rows:
        y = oracle(reference, row["prompt_ids"], row["target_ids"])
        g = oracle(reference, row["prompt_ids"], row["generated_ids"])
        # Rewards against the player that the policy is are 0 in exact arithmetic.
        pairs = [
            (y.item(), g.item()),
            (row["player_target_logps"][1], row["player_generated_logps"][1]),
        ]
        _, grad_y, grad_g, _, _ = paper_loss(y.item(), g.item(), pairs, 0.1, 6.0, 0.5)
        total = total + grad_y * y + grad_g * g
        is_eta.append((1 + (y.item() <= pairs[1][0])) / 2)
    intended = torch.cat([g.ravel() for g in torch.autograd.grad(total, reference.parameters())])
    assert sorted(first.weights) == sorted(is_eta)  # a batch has an order of its own
    assert min(is_eta) == 0.5  # the other player's weights are decided by its rewards
    assert float(torch.cosine_similarity(first.gradient.cpu(), intended.cpu(), dim=0)) > 0.999


def shifted(rows, column, by_token):
    """The rows with one player's log-probs lower by a number of nats per token."""
    for row in rows:
        for kind in ("target", "generated"):
            row[f"player_{kind}_logps"][column] -= by_token * len(row[f"{kind}_ids"])
    return rows


@pytest.mark.parametrize("warmup", [0.5, 0])
def test_a_policy_that_is_no_player_keeps_its_rewards(tmp_path, caplog, monkeypatch, warmup):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    rows = shifted(triples(8, [make_model(seed=1)]), column=0, by_token=1e-3)
    trainer = train(make_model(seed=1), rows, arguments(tmp_path, warmup_steps=warmup))
    line = trainer.state.log_history[0]
    assert line["weights/target"] == 0  # each is 1, because each reward is positive
    assert line["rewards/target"] > 1e-4
    [told] = [r.getMessage() for r in caplog.records if "none of the players" in r.getMessage()]
    says(told, "column 0", "0.001")


def test_of_two_near_players_the_nearest_is_the_one_that_the_policy_starts_as(tmp_path):
    rows = rounded(triples(8, [make_model(seed=1)] * 2), column=1, by_token=1e-7)
    rows = shifted(rows, column=0, by_token=-5e-5)
    line = train(make_model(seed=1), rows, arguments(tmp_path)).state.log_history[0]
    assert line["rewards/target/player_1"] == line["rewards/generated/player_1"] == 0
    assert line["rewards/target/player_0"] < 0


def test_a_second_training_starts_where_the_first_one_ended(tmp_path):
    rows = triples(8, [make_model(seed=1)])
    trainer = train(make_model(seed=1), rows, arguments(tmp_path, warmup_steps=0))
    assert trainer.state.log_history[0]["rewards/target"] == 0
    trainer.train()
    assert trainer.state.log_history[0]["rewards/target"] != 0


def test_the_log_says_how_far_the_first_step_is_from_the_stored_log_probs(tmp_path):
    rows = shifted(triples(8, [make_model(seed=1)]), column=0, by_token=3e-5)
    log = train(
        make_model(seed=1), rows, arguments(tmp_path, warmup_steps=0), start_column=0
    ).state.log_history
    assert log[0]["first_step/difference"] == pytest.approx(3e-5, rel=0.02)
    assert log[0]["first_step/limit"] == 1e-4
    assert not any("first_step/difference" in line for line in log[1:])
