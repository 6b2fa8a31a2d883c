"""A maximum of the likelihood is a fixed point of self-play: docs/concepts/why.md.

The policy can list all its sequences, so every expectation is exact. It cannot represent the data,
and it has the largest likelihood that it can have.
"""

from __future__ import annotations

import importlib
import itertools
import math

import pytest
import torch

from tpaw.objectives.base import PairLogps
from tpaw.objectives.tpaw import TeamObjective

LENGTH = 4
SEQUENCES = [
    ids
    for n in range(1, LENGTH + 1)
    for ids in itertools.product(range(3), repeat=n)
    if all(ids[:-1]) and (ids[-1] == 0 or n == LENGTH)  # 0 ends; the last may be cut
]


class Unigrams:
    """A policy that draws every token from the same three probabilities, whatever came before."""

    def __init__(self, probabilities):
        self.logits = torch.tensor(probabilities, dtype=torch.float64).log().requires_grad_()

    def logps(self):
        table = torch.log_softmax(self.logits, dim=0)
        return torch.stack([table[list(ids)].sum() for ids in SEQUENCES])


@pytest.fixture
def data():
    """Probabilities of all sequences that depend on more than the counts of their tokens."""
    generator = torch.Generator().manual_seed(0)
    return torch.softmax(3 * torch.randn(len(SEQUENCES), generator=generator).double(), dim=0)


@pytest.fixture
def likeliest(data):
    """The likeliest unigrams: the share of each token in the data."""
    pairs = zip(data.tolist(), SEQUENCES, strict=True)
    counts = [0.0] * 3
    for weight, ids in pairs:
        for token in ids:
            counts[token] += weight
    return Unigrams([count / sum(counts) for count in counts])


def expected_gradient(objective, policy, data, responses, players):
    """Of the loss over targets of the data and responses with these probabilities.

    Every player of the team is the policy itself, as after many iterations without a change.
    """
    logps = policy.logps()
    count = len(SEQUENCES)
    targets, answers = (
        grid.flatten() for grid in torch.meshgrid(*[torch.arange(count)] * 2, indexing="ij")
    )
    weights = (data[:, None] * responses[None]).flatten()
    lengths = torch.tensor([len(ids) for ids in SEQUENCES])
    known = logps.detach()[:, None].expand(count, players)
    pairs = PairLogps(
        logps[targets],
        logps[answers],
        known[targets],
        known[answers],
        lengths[targets],
        lengths[answers],
        logps[answers],
    )
    loss = (weights * objective(pairs).loss_B).sum()
    return torch.autograd.grad(loss, policy.logits)[0]


def settings(name, **fields):
    return importlib.import_module(f"tpaw.objectives.{name}").Settings(**fields)


FIXED = {
    "spin": (TeamObjective(0.1, 1.0, 0.0), 1),
    "tpaw": (TeamObjective(0.1, 6.0, 0.5), 3),
    "space": (settings("space", mu=3.0), 1),
    "alpha_spin": (settings("alpha_spin"), 2),
    "irft linear": (settings("irft", loss="linear"), 1),
    "spif_ls": (settings("spif_ls"), 1),
    "gsil": (settings("gsil", alpha=0.3), 1),  # with responses that are sampled
    "self_training": (settings("self_training", keep="all"), 0),
}


def test_the_policy_cannot_represent_the_data(data, likeliest):
    assert likeliest.logps().exp().sum().item() == pytest.approx(1)
    assert (likeliest.logps().exp() - data).abs().max() > 0.05
    gradient = torch.autograd.grad((data * likeliest.logps()).sum(), likeliest.logits)[0]
    assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("name", FIXED)
def test_the_likeliest_policy_stays_where_it_is(name, data, likeliest):
    objective, players = FIXED[name]
    sampled = likeliest.logps().detach().exp()
    gradient = expected_gradient(objective, likeliest, data, sampled, players)
    assert gradient.abs().max() < 1e-12
    # Any other policy moves, but for the one that only imitates itself.
    other = Unigrams([0.5, 0.3, 0.2])
    sampled = other.logps().detach().exp()
    gradient = expected_gradient(objective, other, data, sampled, players)
    assert (gradient.abs().max() > 1e-3) == (name != "self_training")


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("temperature", [0.5, 0.0])
def test_with_colder_responses_it_moves(name, temperature, data, likeliest):
    """Tokens are drawn at another temperature, as a generator draws them."""
    objective, players = FIXED[name]
    if temperature:
        shares = torch.softmax(likeliest.logits.detach() / temperature, dim=0)
    else:
        shares = torch.nn.functional.one_hot(likeliest.logits.argmax(), 3).double()
    responses = torch.tensor([math.prod(shares[list(ids)].tolist()) for ids in SEQUENCES])
    assert responses.sum().item() == pytest.approx(1)
    gradient = expected_gradient(objective, likeliest, data, responses.double(), players)
    assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize(("name", "players"), [("tspin", 0), ("spin_ipo", 1), ("spin_norm", 1)])
def test_losses_per_token_and_without_reference_move_it(name, players, data, likeliest):
    sampled = likeliest.logps().detach().exp()
    gradient = expected_gradient(settings(name), likeliest, data, sampled, players)
    assert gradient.abs().max() > 1e-3


def likeliest_of(k, logps):
    """Exact probabilities of the likeliest of k samples; equal ones share as they are sampled."""
    shares = logps.exp()
    values = logps.round(decimals=9)
    chosen = torch.zeros_like(shares)
    for value in values.unique():
        group, below = values == value, shares[values < value].sum()
        of_group = shares[group].sum()
        chosen[group] = shares[group] / of_group * ((below + of_group) ** k - below**k)
    return chosen


def test_the_likeliest_of_several_responses_moves_it_towards_what_it_finds_likely(data, likeliest):
    """Sharpening: the kept responses are no plain samples."""
    before = likeliest.logps().detach()
    assert likeliest_of(1, before) == pytest.approx(before.exp())
    chosen = likeliest_of(4, before)
    assert chosen.sum().item() == pytest.approx(1)
    objective = settings("self_training", keep="likeliest")
    gradient = expected_gradient(objective, likeliest, data, chosen, players=1)
    assert gradient.abs().max() > 1e-3
    with torch.no_grad():
        likeliest.logits -= 0.1 * gradient
    after = likeliest.logps().detach()
    # A sample of the new policy is one that the old policy finds likelier.
    assert (after.exp() * before).sum() > (before.exp() * before).sum() + 1e-3
    # Its price: targets become less likely.
    assert (data * after).sum() < (data * before).sum()
