"""Equations 2 to 8 against a scalar implementation written from the paper, and against TRL."""

from __future__ import annotations

import math

import pytest
import torch
from builders import PAPER, make_model, make_tokenizer
from messages import refused
from oracles import paper_loss

from tpaw.objectives.tpaw import team_loss


def random_batch(B, K, seed, spread=5.0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return -60 + spread * torch.randn(*shape, generator=generator, dtype=torch.float64)

    return draw(B), draw(B), draw(B, K), draw(B, K)


@pytest.mark.parametrize("K", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("lam", "eta", "gamma"), [(0.1, 6, 0.5), (5, 6, 0.5), (1, 1, 0), (2, 3, 2)]
)
def test_matches_the_scalar_paper_in_values_and_gradients(K, lam, eta, gamma):
    y, g, ys, gs = random_batch(20, K, seed=K, spread=2.0)
    y.requires_grad_()
    g.requires_grad_()
    team = team_loss(y, g, ys, gs, lambda_=lam, eta=eta, gamma=gamma)
    team.loss_B.sum().backward()
    for b in range(20):
        players = list(zip(ys[b].tolist(), gs[b].tolist(), strict=True))
        loss, grad_y, grad_g, alpha, beta = paper_loss(
            y[b].item(), g[b].item(), players, lam, eta, gamma
        )
        assert team.loss_B[b].item() == pytest.approx(loss, rel=1e-12, abs=1e-12)
        assert y.grad[b].item() == pytest.approx(grad_y, rel=1e-11, abs=1e-12)
        assert g.grad[b].item() == pytest.approx(grad_g, rel=1e-11, abs=1e-12)
        assert team.target_weight_BK[b].tolist() == alpha
        assert team.player_weight_BK[b].tolist() == pytest.approx(beta, abs=1e-12)


def test_first_step_of_the_first_iteration_is_log_two_with_the_target_weight_at_eta():
    # θ = θ_0: all rewards are exactly 0, and 0 counts as not positive.
    logps = torch.tensor([-50.0], dtype=torch.float64)
    team = team_loss(logps, logps, logps[:, None], logps[:, None], **PAPER)
    assert team.loss_B.item() == pytest.approx(math.log(2), abs=1e-15)
    assert team.target_weight_BK.item() == 6.0
    assert team.player_weight_BK.item() == 1.0


def test_a_small_player_weight_becomes_zero_and_the_rest_sum_to_one():
    # Margins 0, 0 and 20 with γ = 0.5: the third weight is e^-10 / (2 + e^-10), far below 0.01.
    zero = torch.zeros(1, dtype=torch.float64)
    team = team_loss(
        zero + 1,
        zero - 1,
        torch.tensor([[1.0, 1.0, -9.0]], dtype=torch.float64),
        torch.tensor([[-1.0, -1.0, 9.0]], dtype=torch.float64),
        lambda_=1.0,
        eta=6.0,
        gamma=0.5,
    )
    assert team.margin_BK.tolist() == [[0.0, 0.0, 20.0]]
    assert team.player_weight_BK.tolist() == [[0.5, 0.5, 0.0]]


@pytest.mark.parametrize(
    ("floor", "expected"),
    [(0.1, [4 / 9, 4 / 9, 1 / 9]), (0.2, [0.5, 0.5, 0.0])],
)
def test_the_smallest_player_weight_is_the_one_that_was_set(floor, expected):
    # Margins 0, 0 and ln 4 with γ = 1: the softmax is 1 : 1 : 1/4.
    zero = torch.zeros(1, dtype=torch.float64)
    players = torch.tensor([[0.0, 0.0, -math.log(4)]], dtype=torch.float64)
    settings = {"lambda_": 1.0, "eta": 6.0, "gamma": 1.0, "min_player_weight": floor}
    team = team_loss(zero, zero, players, torch.zeros_like(players), **settings)
    assert team.player_weight_BK[0].tolist() == pytest.approx(expected, abs=1e-12)


def test_a_player_weight_of_exactly_the_smallest_stays():
    # Two players that judge alike have 1/2 each, the most that min_player_weight may be.
    logps = torch.zeros(1, dtype=torch.float64)
    players = torch.zeros(1, 2, dtype=torch.float64)
    team = team_loss(logps, logps, players, players, **PAPER, min_player_weight=0.5)
    assert team.player_weight_BK.tolist() == [[0.5, 0.5]]


def test_a_team_without_players_is_refused():
    logps, nobody = torch.zeros(2), torch.zeros(2, 0)
    with refused("(B, K)", error=ValueError):
        team_loss(logps, logps, nobody, nobody, **PAPER)


def test_weights_carry_no_gradient():
    y, g, ys, gs = random_batch(4, 3, seed=0)
    team = team_loss(y.requires_grad_(), g.requires_grad_(), ys, gs, **PAPER)
    assert team.loss_B.requires_grad
    for name in ("target_reward_BK", "generated_reward_BK", "margin_BK"):
        assert not getattr(team, name).requires_grad
    assert not team.target_weight_BK.requires_grad
    assert not team.player_weight_BK.requires_grad


def test_permuting_the_players_permutes_the_weights_and_leaves_the_loss():
    y, g, ys, gs = random_batch(16, 4, seed=3)
    order = [2, 0, 3, 1]
    team = team_loss(y, g, ys, gs, **PAPER)
    permuted = team_loss(y, g, ys[:, order], gs[:, order], **PAPER)
    assert torch.allclose(team.loss_B, permuted.loss_B, rtol=1e-14, atol=0)
    assert torch.allclose(
        team.player_weight_BK[:, order], permuted.player_weight_BK, rtol=1e-14, atol=0
    )
    assert torch.equal(team.target_weight_BK[:, order], permuted.target_weight_BK)


def test_one_player_with_eta_one_is_trls_sigmoid_dpo_loss(tmp_path):
    """DPOTrainer.compute_loss itself, on a model whose log-probs are known, gives the same loss."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from tpaw.data.token_ids import token_ids
    from tpaw.logprobs.packing import padded_batch
    from tpaw.logprobs.response import response_logps

    policy, reference = make_model(seed=1), make_model(seed=2)
    tokenizer = make_tokenizer()
    rows = [
        {"prompt": "What is 1 + 2?", "chosen": "3 is it", "rejected": "it is four"},
        {"prompt": "What is 12 + 2?", "chosen": "14", "rejected": "13, or so"},
    ]
    trainer = DPOTrainer(
        model=policy,
        ref_model=reference,
        args=DPOConfig(
            output_dir=str(tmp_path),
            beta=0.1,
            per_device_train_batch_size=2,
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_dropout=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    trl_loss = trainer.compute_loss(trainer.model, batch)

    prepared = [trainer.train_dataset[i] for i in range(2)]
    prompts = [token_ids(row["prompt_ids"]) for row in prepared]

    def logps(model, column):
        answers = [token_ids(row[column]) for row in prepared]
        rows = padded_batch(list(zip(prompts, answers, strict=True)))
        with torch.no_grad():
            return response_logps(model, rows)

    team = team_loss(
        logps(policy, "chosen_ids"),
        logps(policy, "rejected_ids"),
        logps(reference, "chosen_ids")[:, None],
        logps(reference, "rejected_ids")[:, None],
        lambda_=0.1,
        eta=1.0,
        gamma=0.5,
    )
    assert team.loss_B.mean().item() == pytest.approx(trl_loss.item(), abs=1e-6)


def test_no_overflow_at_a_large_lambda():
    far = torch.tensor([-4000.0], dtype=torch.float32, requires_grad=True)
    near = torch.tensor([-10.0], dtype=torch.float32, requires_grad=True)
    team = team_loss(
        far, near, near.detach()[:, None], far.detach()[:, None], lambda_=5.0, eta=6.0, gamma=0.5
    )
    team.loss_B.sum().backward()
    # -(6·5·(-3990) - 5·3990) = 139650, in the linear part of the logistic loss.
    assert team.loss_B.item() == pytest.approx(139650)
    assert far.grad.item() == pytest.approx(-30)
    assert near.grad.item() == pytest.approx(5)


def test_variants_switch_the_weights_off():
    y, g, ys, gs = random_batch(8, 3, seed=5)
    team = team_loss(y, g, ys, gs, **PAPER, target_weight="one", player_weight="uniform")
    assert torch.equal(team.target_weight_BK, torch.ones(8, 3, dtype=torch.float64))
    expected = torch.nn.functional.softplus(-team.margin_BK).mean(dim=1)
    assert torch.allclose(team.loss_B, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "value", "bound"),
    [
        ("eta", 0.99, "1"),
        ("eta", math.nan, ""),
        ("eta", math.inf, ""),
        ("lambda_", math.inf, ""),
        ("gamma", math.inf, ""),
        ("gamma", -0.1, "0"),
        ("lambda_", 0.0, "0"),
        ("lambda_", -1.0, "0"),
        ("min_player_weight", 0.4, "1/3"),
        ("min_player_weight", -0.1, "[0, 1)"),
        ("min_player_weight", 1.0, "[0, 1)"),
        ("target_weight", "two", "adaptive"),
        ("player_weight", "max", "softmax"),
    ],
)
def test_refuses_settings_out_of_range(name, value, bound):
    with refused(name, repr(value), bound, error=ValueError):
        team_loss(*random_batch(2, 3, seed=0), **(PAPER | {name: value}))


@pytest.mark.parametrize("arguments", [(0, 2), (1, 3), (0,), (3,)])
@pytest.mark.parametrize("value", [-math.inf, math.inf])
def test_refuses_infinite_log_probs_where_their_difference_is_nan_too(arguments, value):
    logps = [t.clone() for t in random_batch(3, 2, seed=0)]
    for argument in arguments:
        logps[argument].view(-1)[1] = value
    with refused("infinite", error=ValueError):
        team_loss(*logps, **PAPER)


@pytest.mark.parametrize("argument", range(4))
def test_refuses_nan_shapes_and_integers(argument):
    good = random_batch(3, 2, seed=0)
    with_nan = [t.clone() for t in good]
    with_nan[argument].view(-1)[1] = math.nan
    with refused(1, error=ValueError):
        team_loss(*with_nan, **PAPER)
    misshapen = list(good)
    misshapen[argument] = good[argument][:2] if argument else good[argument][:, None]
    with refused(error=ValueError):
        team_loss(*misshapen, **PAPER)
    integers = list(good)
    integers[argument] = good[argument].long()
    with refused(error=ValueError):
        team_loss(*integers, **PAPER)
