"""What a critic learns from: targets against the responses of the opponents to the same prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tpaw.critic.encoding import Encode
from tpaw.data.examples import Examples
from tpaw.data.token_ids import TokenIds
from tpaw.generation.responses import Responses
from tpaw.statistics.auc import Auc, auc_within_prompts

# Two lengths are alike if they differ by at most this share of the longer one.
LIKE_LENGTH = 0.05
# An AUC of the length alone as far from one half as this tells targets from responses.
TELLING_LENGTH = 0.1


def only_counts_tokens(of_like_length: Auc, of_length_alone: Auc) -> bool:
    """Whether nothing says that a critic knows more than how long targets are."""
    is_telling = abs(of_length_alone.value - 0.5) > TELLING_LENGTH
    return is_telling and not of_like_length.interval_95[0] > 0.5


class Comparisons(NamedTuple):
    """N targets, each with k responses to its prompt.

    Attributes:
        targets: what the critic reads of each target.
        responses: what it reads of each response: the first of every target, then the second, ….
        counts: whether a response is compared with its target, of shape (N, k). One that was
            truncated is not, nor one that equals its target.
        target_lengths: tokens, of shape (N,).
        response_lengths: tokens, of shape (N, k).
        prompts: a number for each target; equal prompts have equal numbers.
    """

    targets: list[TokenIds]
    responses: list[TokenIds]
    counts: NDArray[np.bool_]
    target_lengths: NDArray[np.int64]
    response_lengths: NDArray[np.int64]
    prompts: NDArray[np.int64]

    def pairs(self, rows: NDArray[np.int64]) -> list[tuple[TokenIds, TokenIds]]:
        """Each target of some rows with each response that it is compared with."""
        count = len(self.targets)
        return [
            (self.targets[row], self.responses[k * count + row])
            for row in rows
            for k in np.flatnonzero(self.counts[row])
        ]

    def matrix(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """Scores in the order of `responses` as (N, k)."""
        return scores.reshape(self.counts.shape[::-1]).T

    def auc(
        self,
        rows: NDArray[np.int64],
        targets: NDArray[np.float64],
        responses: NDArray[np.float64],
        *,
        of_like_length: bool = False,
    ) -> Auc:
        """The AUC of scores on some rows.

        Args:
            rows: the rows.
            targets: scores, of shape (N,).
            responses: scores, of shape (N, k).
            of_like_length: compare only where target and response are of like length.
        """
        counts = self.counts[rows]
        if of_like_length:
            one, other = self.target_lengths[rows][:, None], self.response_lengths[rows]
            counts = counts & (np.abs(one - other) <= LIKE_LENGTH * np.maximum(one, other))
        return auc_within_prompts(targets[rows], responses[rows], counts)

    def auc_of_length(self, rows: NDArray[np.int64]) -> Auc:
        """What the number of tokens alone tells: above 0.5, targets are longer."""
        lengths = self.target_lengths.astype(float), self.response_lengths.astype(float)
        return self.auc(rows, *lengths)


def comparisons(examples: Examples, responses: Sequence[Responses], encode: Encode) -> Comparisons:
    """Pair every target with the responses of all opponents.

    Args:
        examples: N examples.
        responses: k parts with one response to each example.
        encode: see `encoding.py`.
    """
    prompts, targets = examples.prompt_ids, examples.target_ids
    counts = np.empty((len(examples), len(responses)), dtype=bool)
    for k, part in enumerate(responses):
        for row, ids in enumerate(part.token_ids):
            is_whole = part.finish_reasons[row] == "stop"
            counts[row, k] = is_whole and not np.array_equal(ids, targets[row])
    return Comparisons(
        [encode(prompt, target) for prompt, target in zip(prompts, targets, strict=True)],
        [
            encode(prompt, response)
            for part in responses
            for prompt, response in zip(prompts, part.token_ids, strict=True)
        ],
        counts,
        np.asarray(targets.lengths),
        np.stack([np.asarray(part.token_ids.lengths) for part in responses], axis=1),
        examples.prompt_numbers,
    )


def split(prompts: NDArray[np.int64], share: float, seed: int) -> tuple[
    NDArray[np.int64], NDArray[np.int64]
]:  # fmt: skip
    """Rows to fit and rows to hold out. Rows with the same prompt stay together.

    Args:
        prompts: a number for each row's prompt.
        share: of the prompts that is held out; at least one is.
        seed: of the choice. It does not depend on the iteration: a critic that continues must not
            have seen what is held out.
    """
    distinct = np.unique(prompts)
    order = np.random.default_rng(seed).permutation(len(distinct))
    held = distinct[order[: max(round(share * len(distinct)), 1)]]
    is_held = np.isin(prompts, held)
    return np.flatnonzero(~is_held), np.flatnonzero(is_held)


def halves(
    prompts: NDArray[np.int64], held: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The held-out rows in two: those that decide which weights are kept, and those that measure.

    Rows with the same prompt stay together.
    """
    watched = np.isin(prompts[held], np.unique(prompts[held])[::2])
    return held[watched], held[~watched]
