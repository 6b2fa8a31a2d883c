"""The gradients of the first step: those of SFT's targets, and those of the model's responses.

At θ_t every reward is 0 and every target weight η, so the gradient of TPAW's loss is
−λ/2 · (η ∇log π(y|x) − ∇log π(y_gen|x)). SFT's is −∇log π(y|x). What is signal in the first one is
SFT's, if the responses are samples at temperature 1 (docs/concepts/why.md).

Shape suffixes: B batches, C coordinates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from accelerate.utils import send_to_device
from numpy.typing import NDArray

from tpaw.data.token_ids import TokenSequence
from tpaw.logprobs.packing import PromptGroup
from tpaw.logprobs.response import LogprobHead, response_logps
from tpaw.runtime.progress import OnDone, ignore
from tpaw.scoring.score import ScoringModel
from tpaw.statistics.gradients import Signal, expected_cosine, expected_norm_ratio, signal_in

# So many coordinates are enough for a cosine: its error is below 1/sqrt(COORDINATES).
COORDINATES = 1_000_000
# Losses whose expected first step is SFT's with plain samples: see docs/concepts/why.md.
COVERED = ("tpaw", "space", "alpha_spin", "irft", "spif_ls", "gsil")


class FirstStep(NamedTuple):
    """The gradients of the first step.

    Attributes:
        sft: signal in SFT's gradient. A large p-value: the model has converged on these records, or
            there are too few of them.
        responses: signal in the gradient of the responses; 0 is expected at temperature 1.
        cosine: of the expected first step with SFT's; NaN where one of them has no signal.
        norm_ratio: norm of the expected first step divided by that of η times SFT's; NaN where one
            of them has no signal. It is 1 if the responses have none.
        cosine_of_batches: mean cosine of a single batch's step with its SFT gradient.
        norm_ratio_of_batches: of a batch, the norm of the responses' gradient divided by that of η
            times the targets'.
    """

    sft: Signal
    responses: Signal
    cosine: float
    norm_ratio: float
    cosine_of_batches: float
    norm_ratio_of_batches: float


def first_step(
    target_BC: NDArray[np.float64], generated_BC: NDArray[np.float64], eta: float
) -> FirstStep:
    """Compare the first step of an objective with SFT's.

    Args:
        target_BC: gradient of the mean log-prob of a batch's targets.
        generated_BC: the same of its responses.
        eta: how much more the objective weights a target than a response at the start.
    """
    step_BC = eta * target_BC - generated_BC
    norms = np.linalg.norm(step_BC, axis=1) * np.linalg.norm(target_BC, axis=1)
    cosines = (step_BC * target_BC).sum(axis=1) / np.where(norms > 0, norms, 1)
    squares = [float((part**2).sum()) for part in (generated_BC, eta * target_BC)]
    return FirstStep(
        signal_in(target_BC),
        signal_in(generated_BC),
        expected_cosine(step_BC, target_BC),
        expected_norm_ratio(step_BC, eta * target_BC),
        float(cosines.mean()),
        float(np.sqrt(squares[0] / squares[1])) if squares[1] > 0 else float("nan"),
    )


def batch_gradients(
    scorer: ScoringModel,
    batches: Sequence[Sequence[TokenSequence]],
    *,
    tokens_per_row: int,
    seed: int = 0,
    on_done: OnDone = ignore,
) -> NDArray[np.float64]:
    """∇ of each batch's mean log π(y|x), at some coordinates.

    Args:
        scorer: the model, with weights that require gradients.
        batches: the sequences of each batch.
        tokens_per_row: token budget of one forward and backward pass.
        seed: of the choice of coordinates, for a model with more than `COORDINATES` weights.
        on_done: called with the number of sequences after each pass.

    Returns:
        Of shape (batches, coordinates).
    """
    model, layout, precision, _ = scorer
    head = LogprobHead.attached_to(model)
    weights = [p for p in model.parameters() if p.requires_grad]
    device = weights[0].device
    chosen = _coordinates(weights, seed)
    rows = []
    for batch in batches:
        sizes = [PromptGroup.of(len(prompt), [len(response)]) for prompt, response in batch]
        for members in layout.assign(sizes, tokens_per_row, 1):
            packed = layout.collate([batch[i] for i in members])
            with precision.autocast():
                logps_S = response_logps(model, send_to_device(packed, device), head)
            (logps_S.sum() / len(batch)).backward()  # type: ignore[no-untyped-call]
            on_done(len(members))
        found = [
            torch.zeros(len(places), device=device) if p.grad is None else p.grad.flatten()[places]
            for p, places in zip(weights, chosen, strict=True)
        ]
        rows.append(torch.cat(found).double().cpu().numpy())
        model.zero_grad(set_to_none=True)
    return np.stack(rows)


def _coordinates(weights: Sequence[torch.nn.Parameter], seed: int) -> list[torch.Tensor]:
    """Places in each weight, the same share of each."""
    total = sum(p.numel() for p in weights)
    generator = torch.Generator().manual_seed(seed)
    places = []
    for p in weights:
        if total <= COORDINATES:
            places.append(torch.arange(p.numel(), device=p.device))
            continue
        count = max(round(COORDINATES * p.numel() / total), 1)
        places.append(torch.randint(p.numel(), (count,), generator=generator).to(p.device))
    return places
