"""The family of self-play losses: scalar forms, gradients at the start, TRL's own losses."""

from __future__ import annotations

import importlib
import itertools
import math
import pkgutil

import pytest
import torch
from builders import make_model, make_tokenizer

import tpaw.objectives
from tpaw.objectives.base import NamedObjective, Objective, ObjectiveNeeds, PairLogps


def settings(name, **fields):
    return importlib.import_module(f"tpaw.objectives.{name}").Settings(**fields)


def log_sigmoid(z):
    return -math.log1p(math.exp(-z)) if z > 0 else z - math.log1p(math.exp(z))


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


# Of one pair in plain floats, from the formula of the paper or of the authors' code:
# s, g, p are the policy's log-probs of target, response and θ_0's response; s_t, s_0 a player's.
SCALAR = {
    "space": lambda x: (
        -math.log(1 / (1 + x.mu * math.exp(-x.delta)))
        - x.mu * math.log(1 / (1 + (1 / x.mu) * math.exp(x.gamma)))
    ),
    "tspin": lambda x: (
        -log_sigmoid(x.alpha * (x.s - x.g)) - x.beta * log_sigmoid(x.alpha * (x.g - x.p))
    ),
    "alpha_spin": lambda x: (
        -log_sigmoid(
            x.lambda_
            * (
                (x.s - ((1 - x.mixture) * x.s_t + x.mixture * x.s_0))
                - (x.g - ((1 - x.mixture) * x.g_t + x.mixture * x.g_0))
            )
        )
    ),
    "irft logistic": lambda x: -log_sigmoid(x.lambda_ * (x.delta - x.gamma)),
    "irft linear": lambda x: -x.lambda_ * (x.delta - x.gamma),
    "gsil logistic": lambda x: -log_sigmoid(x.u) - log_sigmoid(-x.v),
    "gsil brier": lambda x: (sigmoid(x.u) - 1) ** 2 + sigmoid(x.v) ** 2,
    "gsil hinge": lambda x: max(0.0, 1 - x.u) + max(0.0, 1 + x.v),
    "gsil kliep": lambda x: -x.u + math.exp(x.v),
    "gsil lsif": lambda x: -math.exp(x.u) + 0.5 * math.exp(2 * x.v),
    "spif_ls": lambda x: (
        (x.lambda_ * x.delta - x.bound) ** 2 + (x.lambda_ * x.gamma + x.bound) ** 2
    ),
    "spin_ipo": lambda x: (x.delta / x.n - x.gamma / x.m - 1 / (2 * x.lambda_)) ** 2,
    "spin_norm": lambda x: -log_sigmoid(x.lambda_ * (x.delta / x.n - x.gamma / x.m)),
    "self_training": lambda x: -x.g,
}
OTHER_FIELDS = {
    "space": [{"mu": 0.3}, {"mu": 3.0}],
    "tspin": [{"alpha": 0.2, "beta": 0.7}],
    "alpha_spin": [{"lambda": 0.4, "mixture": 0.3}, {"mixture": 1.0}],
    "irft": [{"lambda": 2.0}],
    "gsil": [{"alpha": 0.3, "beta": -0.5}],
    "spif_ls": [{"lambda": 0.5, "bound": 2.0}],
    "spin_ipo": [{"lambda": 0.7}],
    "spin_norm": [{"lambda": 0.3}],
    "self_training": [{"keep": "all"}],
}
CASES = [
    (name, {**({"loss": loss[0]} if loss else {}), **fields})
    for name, *loss in map(str.split, SCALAR)
    for fields in [{}, *OTHER_FIELDS[name]]
]


class Scalars:
    """Names of the formulas above, of pair b."""

    def __init__(self, logps, objective, b):
        self.__dict__.update(dict(objective))
        self.s, self.g, self.p = (
            x[b].item()
            for x in (logps.policy_target_B, logps.policy_generated_B, logps.policy_initial_B)
        )
        (self.s_t, *_), (self.g_t, *_) = (
            x[b].tolist() for x in (logps.player_target_BK, logps.player_generated_BK)
        )
        self.s_0, self.g_0 = (
            x[b, -1].item() for x in (logps.player_target_BK, logps.player_generated_BK)
        )
        self.n, self.m = logps.target_tokens_B[b].item(), logps.generated_tokens_B[b].item()
        self.delta, self.gamma = self.s - self.s_t, self.g - self.g_t
        if objective.name == "gsil":
            self.u = self.alpha * self.delta + self.beta
            self.v = self.alpha * self.gamma + self.beta


def batch(B, K, seed=0, spread=3.0, start=None):
    """Random log-probs; with `start`, the policy's are those of this player."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return -40 + spread * torch.randn(*shape, generator=generator, dtype=torch.float64)

    players_y, players_g = draw(B, K), draw(B, K)
    policy = [draw(B), draw(B), draw(B)]
    if start is not None:
        policy[:2] = players_y[:, start].clone(), players_g[:, start].clone()
    lengths = torch.randint(1, 50, (2, B), generator=generator)
    for x in policy:
        x.requires_grad_()
    return PairLogps(policy[0], policy[1], players_y, players_g, *lengths, policy[2])


def key(objective):
    loss = getattr(objective, "loss", None)
    return f"{objective.name} {loss}" if loss else objective.name


@pytest.mark.parametrize(("name", "fields"), CASES)
def test_losses_are_those_of_the_formula_and_gradients_their_differences(name, fields):
    objective = settings(name, **fields)
    logps = batch(12, 3 if name == "alpha_spin" else 1)
    output = objective(logps)
    assert output.loss_B.dtype == torch.float64
    policy = (logps.policy_target_B, logps.policy_generated_B, logps.policy_initial_B)
    gradients = torch.autograd.grad(output.loss_B.sum(), policy, allow_unused=True)
    h = 1e-5
    for b in range(12):
        x = Scalars(logps, objective, b)
        formula = SCALAR[key(objective)]
        assert output.loss_B[b].item() == pytest.approx(formula(x), rel=1e-12, abs=1e-12)
        for which, found in zip(range(3), gradients, strict=True):
            values = []
            for sign in (1, -1):
                moved = [p.detach().clone() for p in policy]
                moved[which][b] += sign * h
                values.append(formula(Scalars(_with(logps, moved), objective, b)))
            expected = (values[0] - values[1]) / (2 * h)
            found = 0.0 if found is None else found[b].item()
            assert found == pytest.approx(expected, rel=1e-5, abs=1e-7)


def _with(logps, policy):
    return logps._replace(
        policy_target_B=policy[0], policy_generated_B=policy[1], policy_initial_B=policy[2]
    )


def start_gradients(objective, B=6, K=1):
    logps = batch(B, K, start=0)
    output = objective(logps)
    s, g = torch.autograd.grad(
        output.loss_B.sum(),
        (logps.policy_target_B, logps.policy_generated_B),
        allow_unused=True,
    )
    return logps, s, g


S2, L2 = sigmoid(2.0), sigmoid(-2.0)


@pytest.mark.parametrize(
    ("name", "fields", "target", "response"),
    [
        ("space", {"mu": 1.0}, -1 / 2, 1 / 2),
        ("space", {"mu": 3.0}, -3 / 4, 3 / 4),
        ("irft", {"lambda": 0.1}, -0.05, 0.05),
        ("irft", {"lambda": 0.1, "loss": "linear"}, -0.1, 0.1),
        ("spif_ls", {"lambda": 0.1, "bound": 2.0}, -0.4, 0.4),
        ("alpha_spin", {"lambda": 0.1}, -0.05, 0.05),
        ("gsil", {"loss": "logistic"}, -0.01 * L2, 0.01 * S2),
        ("gsil", {"loss": "brier"}, -0.02 * S2 * L2**2, 0.02 * S2**2 * L2),
        ("gsil", {"loss": "hinge"}, 0.0, 0.01),
        ("gsil", {"loss": "kliep"}, -0.01, 0.01 * math.exp(2)),
        ("gsil", {"loss": "lsif"}, -0.01 * math.exp(2), 0.01 * math.exp(4)),
    ],
)
def test_the_gradient_where_the_policy_is_its_reference(name, fields, target, response):
    _, s, g = start_gradients(settings(name, **fields))
    assert s.tolist() == pytest.approx([target] * 6, rel=1e-12)
    assert g.tolist() == pytest.approx([response] * 6, rel=1e-12)
    if name == "gsil" and fields["loss"] != "hinge":
        assert -response / target == pytest.approx(math.exp(2))  # 7.4 : 1 on the response


def test_gradients_per_token_are_divided_by_the_lengths():
    for name, slope in (("spin_ipo", 1 / 0.1), ("spin_norm", 0.1 / 2)):
        logps, s, g = start_gradients(settings(name, **{"lambda": 0.1}))
        assert s.tolist() == pytest.approx((-slope / logps.target_tokens_B).tolist())
        assert g.tolist() == pytest.approx((slope / logps.generated_tokens_B).tolist())


def test_alpha_spin_begins_where_its_reference_is_not_the_policy():
    # After the first iteration the mixture differs from θ_t, so the first margin is not 0.
    lam, a = 0.4, 0.3
    objective = settings("alpha_spin", **{"lambda": lam, "mixture": a})
    logps, s, g = start_gradients(objective, K=2)
    for b in range(6):
        (s_t, s_0), (g_t, g_0) = (
            x[b].tolist() for x in (logps.player_target_BK, logps.player_generated_BK)
        )
        expected = lam * sigmoid(-lam * a * ((s_t - s_0) - (g_t - g_0)))
        assert s[b].item() == pytest.approx(-expected)
        assert g[b].item() == pytest.approx(expected)


def test_tspin_needs_no_reference_and_moves_three_log_probs_that_balance():
    objective = settings("tspin")
    assert objective.needs == ObjectiveNeeds("none", initial_responses=True)
    s, g, p = (torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (-3, -2, -5))
    nobody = torch.empty(1, 0, dtype=torch.float64)
    one = torch.ones(1, dtype=torch.int64)
    loss = objective(PairLogps(s, g, nobody, nobody, one, one, p)).loss_B
    found = [x.item() for x in torch.autograd.grad(loss.sum(), (s, g, p))]
    assert found == pytest.approx([-0.731059, 0.726316, 0.004743], abs=1e-6)
    assert sum(found) == pytest.approx(0, abs=1e-15)


def test_in_the_first_iteration_beta_of_tspin_has_no_gradient():
    # θ_0's response is the response: their log-probs are one number.
    found = []
    for beta in (0.0, 0.1):
        logps = batch(6, 1)
        logps = logps._replace(policy_initial_B=logps.policy_generated_B)
        loss = settings("tspin", beta=beta)(logps).loss_B
        of = (logps.policy_target_B, logps.policy_generated_B)
        found.append(torch.autograd.grad(loss.sum(), of))
    for without, with_beta in zip(*found, strict=True):
        assert torch.allclose(without, with_beta, atol=1e-15)


# What TRL computes of the same log-probs: the objective, TRL's loss with its beta, a factor, and
# what is added to our references (a higher reference undoes the shift β of GSIL).
TRL = [
    ("irft", {"lambda": 0.2}, "sigmoid", 0.2, 1.0, 0.0),
    ("space", {}, "bco_pair", 1.0, 1.0, 0.0),
    ("gsil", {"alpha": 0.5, "beta": 0.3}, "bco_pair", 0.5, 1.0, 0.3 / 0.5),
    ("spif_ls", {"lambda": 0.2}, "sppo_hard", 0.2, 0.2**2, 0.0),
    ("spif_ls", {"lambda": 0.2, "bound": 2.0}, "sppo_hard", 0.2 / 4, 0.2**2, 0.0),
    ("spin_ipo", {"lambda": 0.2}, "ipo", 0.2, 1.0, 0.0),
    ("spin_norm", {"lambda": 1.5}, "sigmoid_norm", 1.5, 1.0, 0.0),
]


@pytest.mark.parametrize(("name", "fields", "loss_type", "beta", "factor", "shift"), TRL)
def test_trl_computes_the_same_loss(tmp_path, name, fields, loss_type, beta, factor, shift):
    """DPOTrainer.compute_loss itself, on a model whose log-probs are known."""
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from tpaw.data.token_ids import token_ids
    from tpaw.logprobs.packing import padded_batch
    from tpaw.logprobs.response import response_logps

    policy, reference = make_model(seed=1), make_model(seed=2)
    rows = [
        {"prompt": "What is 1 + 2?", "chosen": "3 is it", "rejected": "it is four"},
        {"prompt": "What is 12 + 2?", "chosen": "14", "rejected": "13, or so"},
    ]
    config = DPOConfig(
        output_dir=str(tmp_path),
        beta=beta,
        loss_type=loss_type,
        per_device_train_batch_size=2,
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_dropout=True,
    )
    trainer = DPOTrainer(
        model=policy,
        ref_model=reference,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=make_tokenizer(),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    prepared = [trainer.train_dataset[i] for i in range(2)]
    prompts = [token_ids(row["prompt_ids"]) for row in prepared]
    answers = {
        column: [token_ids(row[column]) for row in prepared]
        for column in ("chosen_ids", "rejected_ids")
    }

    def logps(model, column):
        packed = padded_batch(list(zip(prompts, answers[column], strict=True)))
        with torch.no_grad():
            return response_logps(model, packed)

    trl_loss = trainer.compute_loss(trainer.model, batch)
    lengths = {c: torch.tensor([len(ids) for ids in answers[c]]) for c in answers}
    pairs = PairLogps(
        logps(policy, "chosen_ids"),
        logps(policy, "rejected_ids"),
        logps(reference, "chosen_ids")[:, None] + shift,
        logps(reference, "rejected_ids")[:, None] + shift,
        lengths["chosen_ids"],
        lengths["rejected_ids"],
    )
    ours = settings(name, **fields)(pairs).loss_B.mean().item()
    assert ours == pytest.approx(factor * trl_loss.item(), rel=1e-5)


class TinyPolicy:
    """Three tokens, of which 0 ends, and at most three of them: every sequence can be listed."""

    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        shape = (3, 4, 3)  # position, token before, token
        self.logits = torch.randn(shape, generator=generator, dtype=torch.float64)
        self.logits.requires_grad_()
        complete = [ids for n in (1, 2) for ids in itertools.product((1, 2), repeat=n - 1)]
        self.sequences = [(*ids, 0) for ids in complete]
        self.sequences += itertools.product((1, 2), (1, 2), (0, 1, 2))  # the last may be cut

    def logp(self, ids):
        table = torch.log_softmax(self.logits, dim=-1)
        before = (3, *ids)
        return sum(table[i, before[i], token] for i, token in enumerate(ids))


def expected_gradient(policy, objective, weights):
    """Of the mean loss over responses with these weights, where the policy is the reference."""
    target = policy.logp((1, 2, 0))
    total = 0
    for ids, weight in zip(policy.sequences, weights, strict=True):
        response = policy.logp(ids)
        pair = PairLogps(
            target[None],
            response[None],
            target.detach()[None, None],
            response.detach()[None, None],
            torch.tensor([3]),
            torch.tensor([len(ids)]),
            response[None],
        )
        total = total + weight * objective(pair).loss_B.sum()
    return torch.autograd.grad(total, policy.logits)[0]


@pytest.mark.parametrize(
    ("name", "fields", "coefficient"),
    [
        ("irft", {"lambda": 0.3}, 0.15),
        ("irft", {"lambda": 0.3, "loss": "linear"}, 0.3),
        ("space", {"mu": 3.0}, 0.75),
        ("spif_ls", {"lambda": 0.3, "bound": 0.5}, 0.3),
        ("gsil", {"alpha": 0.3, "loss": "kliep"}, 0.3),
        ("gsil", {"alpha": 0.3}, 0.3 * L2),
        ("gsil", {"alpha": 0.3, "loss": "hinge"}, 0.0),
        ("self_training", {"keep": "all"}, 0.0),
        ("spin_norm", {}, None),
        ("spin_ipo", {}, None),
    ],
)
def test_the_expected_first_gradient_is_a_multiple_of_sfts(name, fields, coefficient):
    """With responses that are sampled at temperature 1; not with greedy ones, or per token."""
    policy, objective = TinyPolicy(), settings(name, **fields)
    logps = [policy.logp(ids).item() for ids in policy.sequences]
    sampled = [math.exp(logp) for logp in logps]
    assert sum(sampled) == pytest.approx(1)
    sft = torch.autograd.grad(-policy.logp((1, 2, 0)), policy.logits)[0]
    found = expected_gradient(policy, objective, sampled)
    if coefficient is None:
        return_of = (found * sft).sum() / (sft * sft).sum()
        assert not torch.allclose(found, return_of * sft, atol=1e-3)
        return
    assert torch.allclose(found, coefficient * sft, atol=1e-14)
    greedy = [float(logp == max(logps)) for logp in logps]
    found = expected_gradient(policy, objective, greedy)
    assert not torch.allclose(found, coefficient * sft, atol=1e-3)


NAMES = sorted(
    module.name
    for module in pkgutil.iter_modules(tpaw.objectives.__path__)
    if module.name not in ("base", "tpaw")
)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_has_one_objective_of_its_name(name):
    objective = settings(name)
    assert isinstance(objective, NamedObjective)
    assert isinstance(objective, Objective)
    assert objective.name == name
    for field in type(objective).model_fields.values():
        assert field.description
    assert name in {case for case, _ in CASES}


def test_losses_stay_finite_far_from_the_reference():
    for name, fields in CASES:
        if fields.get("loss") in ("kliep", "lsif"):
            continue  # exponentials of a log-ratio have no bound
        logps = batch(4, 1, spread=1e4)
        assert settings(name, **fields)(logps).loss_B.isfinite().all(), name


def test_gsils_hinge_trains_a_target_after_it_lost_beta_minus_one_over_alpha():
    objective = settings("gsil", loss="hinge", alpha=0.01, beta=2.0)
    for lost, slope in ((0.0, 0.0), (99.0, 0.0), (101.0, -0.01)):
        target_B = torch.tensor([-lost], dtype=torch.float64, requires_grad=True)
        zero_B = torch.zeros(1, dtype=torch.float64)
        tokens_B = torch.ones(1, dtype=torch.int64)
        zero_BK = zero_B[:, None]
        pairs = PairLogps(target_B, zero_B, zero_BK, zero_BK, tokens_B, tokens_B)
        objective(pairs).loss_B.sum().backward()
        assert target_B.grad.item() == pytest.approx(slope)
