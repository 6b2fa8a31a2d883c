"""Self-play with several players as one would write it first; a contender for team_step.py.

Every micro-batch is padded to its longest row, each triple has two rows of its own, logits are made
whole. "naive" forwards the policy and every player at every step. "precompute" forwards every
player over every triple beforehand, as the paper does: 18N sequences for 3N triples and 3 players.
The objective, the optimizer and the clipping are those of ours.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from contender import Settings, Training, flat_gradient, flat_weights, synchronize
from torch import Tensor, nn
from transformers import PreTrainedModel
from workload import LogpsPair, Triple

from tpaw.objectives.tpaw import team_loss


def sequence_logps(
    model: nn.Module, triples: Sequence[Triple], bf16: bool
) -> tuple[Tensor, Tensor]:
    """log π(y|x) and log π(y_gen|x), float64, with padding, a mask and whole logits."""
    device = next(model.parameters()).device
    rows = [np.concatenate([t.prompt, t.target]) for t in triples]
    rows += [np.concatenate([t.prompt, t.generated]) for t in triples]
    longest = max(map(len, rows))
    ids_BL = torch.zeros((len(rows), longest), dtype=torch.int64)
    attention_BL = torch.zeros_like(ids_BL)
    response_BL = torch.zeros((len(rows), longest), dtype=torch.bool)
    for i, row in enumerate(rows):
        ids_BL[i, : len(row)] = torch.from_numpy(row)
        attention_BL[i, : len(row)] = 1
        response_BL[i, len(triples[i % len(triples)].prompt) : len(row)] = True
    ids_BL, attention_BL = ids_BL.to(device), attention_BL.to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
        logits_BLV = model(input_ids=ids_BL, attention_mask=attention_BL, use_cache=False).logits
    logps_BLV = logits_BLV[:, :-1].float().log_softmax(dim=-1)
    logps_BL = logps_BLV.gather(2, ids_BL[:, 1:, None])[:, :, 0]
    logps_B = (logps_BL * response_BL[:, 1:].to(device)).double().sum(dim=1)
    target_B, generated_B = logps_B.chunk(2)
    return target_B, generated_B


def precompute(
    players: Sequence[PreTrainedModel],
    triples: Sequence[Triple],
    settings: Settings,
    micro_batch: int,
) -> tuple[LogpsPair, float]:
    """The log-probs of every triple under every player, and the seconds that took."""
    synchronize(players[0].device)
    began = time.perf_counter()
    parts = [
        _reference_logps(players, batch, settings.bf16) for batch in _cut(triples, micro_batch)
    ]
    target_NK, generated_NK = (torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True))
    return LogpsPair(target_NK, generated_NK), time.perf_counter() - began


def train(
    policy: PreTrainedModel,
    triples: Sequence[Triple],
    settings: Settings,
    micro_batch: int,
    *,
    logps: LogpsPair | None,
    players: Sequence[PreTrainedModel] = (),
) -> Training:
    """Train the policy in place.

    Args:
        logps: of `precompute`; without them the players are forwarded at every step.
    """
    policy.train()
    optimizer = torch.optim.RMSprop(policy.parameters(), lr=settings.learning_rate)
    found = Training(seconds=0.0, step_seconds=[])
    for _ in range(settings.epochs):
        for begin in range(0, len(triples), settings.batch):
            synchronize(policy.device)
            began = time.perf_counter()
            batch = triples[begin : begin + settings.batch]
            loss = 0.0
            for offset in range(0, len(batch), micro_batch):
                part = batch[offset : offset + micro_batch]
                if logps is None:
                    references = _reference_logps(players, part, settings.bf16)
                else:
                    rows = slice(begin + offset, begin + offset + len(part))
                    target, generated = (torch.from_numpy(column[rows]) for column in logps)
                    references = target.to(policy.device), generated.to(policy.device)
                target_B, generated_B = sequence_logps(policy, part, settings.bf16)
                team = team_loss(target_B, generated_B, *references, **settings.objective)
                share = team.loss_B.sum() / len(batch)
                share.backward()  # type: ignore[no-untyped-call]
                loss += float(share.detach())
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            if settings.watch and found.gradient is None:
                found.gradient = flat_gradient(policy)
            optimizer.step()
            optimizer.zero_grad()
            synchronize(policy.device)
            found.step_seconds.append(time.perf_counter() - began)
            found.losses.append(loss)
    policy.eval()
    found.seconds = sum(found.step_seconds)
    found.weights = flat_weights(policy) if settings.watch else None
    return found


def _reference_logps(
    players: Sequence[PreTrainedModel], triples: Sequence[Triple], bf16: bool
) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        pairs = [sequence_logps(player, triples, bf16) for player in players]
    target_BK, generated_BK = (torch.stack(part, dim=1) for part in zip(*pairs, strict=True))
    return target_BK, generated_BK


def _cut(triples: Sequence[Triple], micro_batch: int) -> Iterator[Sequence[Triple]]:
    for begin in range(0, len(triples), micro_batch):
        yield triples[begin : begin + micro_batch]
