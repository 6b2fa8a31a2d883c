"""Which response of a prompt becomes its target: the one that the critics like best."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tpaw.generation.responses import Responses

Agree = Literal["mean", "min"]
SCORES = "scores.npy"


def judged(scores: NDArray[np.float64], agree: Agree) -> NDArray[np.float64]:
    """The score of each response by several critics.

    The scores of a critic have no scale of their own, so each critic's are standardised first.

    Args:
        scores: of shape (critics, responses).
        agree: mean of the critics, or the least of them.
    """
    deviation = scores.std(axis=1, keepdims=True)
    standard = (scores - scores.mean(axis=1, keepdims=True)) / np.where(deviation > 0, deviation, 1)
    found: NDArray[np.float64] = standard.mean(axis=0) if agree == "mean" else standard.min(axis=0)
    return found


def best_of(
    scores: NDArray[np.float64], is_whole: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The best response to each prompt; the first one of equal ones.

    Args:
        scores: of shape (samples, prompts).
        is_whole: whether a response was not truncated, of the same shape. Truncated ones are never
            chosen.

    Returns:
        The prompts that have a whole response, and of each the number of its best one.
    """
    found = np.where(is_whole, scores, -np.inf).argmax(axis=0)
    kept = np.flatnonzero(is_whole.any(axis=0))
    return kept, found[kept]


def choose(
    scores: NDArray[np.float64], newest: Sequence[Responses], agree: Agree
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The best response to each prompt, as several critics see it; see `judged` and `best_of`.

    Args:
        scores: of shape (critics, samples × prompts).
        newest: parts with one response to each prompt.
        agree: see `judged`.
    """
    is_whole = are_whole(newest)
    return best_of(judged(scores, agree).reshape(is_whole.shape), is_whole)


def are_whole(parts: Sequence[Responses]) -> NDArray[np.bool_]:
    """Whether each response ended by itself, of shape (samples, prompts)."""
    return np.array([[reason == "stop" for reason in part.finish_reasons] for part in parts])


def write_scores(folder: Path, scores: NDArray[np.float64]) -> None:
    """Write the scores of responses, of shape (critics, responses)."""
    np.save(folder / SCORES, scores)


def read_scores(folder: Path) -> NDArray[np.float64]:
    """Read what `write_scores` wrote."""
    found: NDArray[np.float64] = np.load(folder / SCORES, allow_pickle=False)
    return found
