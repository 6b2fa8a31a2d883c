"""The objective against golden values, needs golden/objective.json."""

from __future__ import annotations

import json

import pytest
import torch

from tpaw.objectives.tpaw import team_loss


def test_every_golden_case_to_1e_12_gradients_included(shared):
    cases = json.loads((shared / "golden" / "objective.json").read_text())["cases"]
    assert len(cases) > 10
    for case in cases:
        inputs, options, expected = case["inputs"], dict(case["options"]), case["expected"]

        def tensor(name, inputs=inputs):
            return torch.tensor([inputs[name]], dtype=torch.float64)

        y = tensor("policy_target_logp").requires_grad_()
        g = tensor("policy_generated_logp").requires_grad_()
        team = team_loss(
            y,
            g,
            tensor("player_target_logps"),
            tensor("player_generated_logps"),
            lambda_=options.pop("lambda"),
            **options,
        )
        team.loss_B.sum().backward()
        found = {
            "target_reward": team.target_reward_BK[0].tolist(),
            "generated_reward": team.generated_reward_BK[0].tolist(),
            "margin": team.margin_BK[0].tolist(),
            "target_weight": team.target_weight_BK[0].tolist(),
            "player_weight": team.player_weight_BK[0].tolist(),
            "loss": team.loss_B.item(),
            "grad_policy_target_logp": y.grad.item(),
            "grad_policy_generated_logp": g.grad.item(),
        }
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-12, abs=1e-12), (case["name"], name)
