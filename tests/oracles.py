"""Slow references that share no code with the package, and inputs that try them."""

from __future__ import annotations

import math

import numpy as np
import torch

from tpaw.data.token_ids import token_ids


def oracle(model, prompt, response):
    """log π(y|x), one unpadded float64 sequence, token by token; differentiable."""
    device = next(model.parameters()).device
    ids = torch.tensor([*prompt, *response], device=device)[None].long()
    logps = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0], dim=-1)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for position, token in enumerate(response, start=len(prompt)):
        total = total + logps[position - 1, int(token)]
    return total


def expected_logps(model, sequences):
    return torch.stack([oracle(model, *sequence) for sequence in sequences])


def ragged(count, seed, vocab_size=320, longest=40):
    """Random sequences; among them a prompt of one token and an empty response."""
    rng = np.random.default_rng(seed)
    sizes = [(int(rng.integers(1, longest)), int(rng.integers(0, longest))) for _ in range(count)]
    sizes[:3] = [(1, 5), (4, 0), (1, 1)]
    return [
        (token_ids(rng.integers(0, vocab_size, p)), token_ids(rng.integers(0, vocab_size, r)))
        for p, r in sizes
    ]


def ragged_team(players, seed, vocab_size=320):
    """Prompts, each with a target and a response of every player; the first are hostile."""
    rng = np.random.default_rng(seed)

    def ids(length):
        return token_ids(rng.integers(0, vocab_size, length))

    sequences = []
    for prompt_length, target_length in [(1, 6), (3, 1), (2, 5), (int(rng.integers(1, 30)), 9)]:
        prompt, target = ids(prompt_length), ids(target_length)
        generated = [ids(rng.integers(0, 25)) for _ in range(players)]
        if prompt_length == 2:
            generated[0] = target  # the opponent has learned it by heart
        if prompt_length == 3:
            generated[0] = ids(0)
        sequences += [(prompt, target), *((prompt, g) for g in generated)]
    return sequences


def paper_loss(policy_y, policy_gen, players, lam, eta, gamma, floor=0.01):
    """One triple in plain Python floats: equation by equation, no tensors, no tricks."""
    reward = [lam * (policy_y - y) for y, _ in players]
    reward_gen = [lam * (policy_gen - g) for _, g in players]
    alpha = [eta if p <= 0 else 1.0 for p in reward]
    weights = [math.exp(-gamma * (p - g)) for p, g in zip(reward, reward_gen, strict=True)]
    beta = [w / sum(weights) for w in weights]
    beta = [b if b >= floor else 0.0 for b in beta]
    beta = [b / sum(beta) for b in beta]
    terms = list(zip(alpha, reward, reward_gen, strict=True))
    losses = [math.log1p(math.exp(-(a * p - g))) for a, p, g in terms]
    slopes = [-1 / (1 + math.exp(a * p - g)) for a, p, g in terms]
    loss = sum(b * x for b, x in zip(beta, losses, strict=True))
    # dℓ/dt = -σ(-t); t = α·λ·(log π(y) − …) − λ·(log π(y_gen) − …), α and β held constant.
    grad_y = sum(b * s * a * lam for b, s, a in zip(beta, slopes, alpha, strict=True))
    grad_gen = sum(-b * s * lam for b, s in zip(beta, slopes, strict=True))
    return loss, grad_y, grad_gen, alpha, beta
