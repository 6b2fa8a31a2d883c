"""How well scores tell targets from responses to the same prompts: the area under the ROC curve.

Only a target and a response to the same prompt are compared, so a prompt that is scored high as a
whole changes nothing. The prompts are the independent units of the interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_Z = 1.959963984540054


class Auc(NamedTuple):
    """An area under the ROC curve.

    Attributes:
        value: the share of pairs in which the target has the higher score; equal scores count one
            half. NaN without pairs.
        interval_95: of the mean over prompts, normal; NaN with fewer than two prompts.
        pairs, prompts: how many were compared.
    """

    value: float
    interval_95: tuple[float, float]
    pairs: int
    prompts: int

    def as_json(self) -> dict[str, Any]:
        """As the values of a JSON file: null in place of NaN."""
        numbers = [None if math.isnan(x) else x for x in (self.value, *self.interval_95)]
        return self._asdict() | {"value": numbers[0], "interval_95": numbers[1:]}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Auc:
        """The inverse of `as_json`."""
        value, low, high = (
            math.nan if x is None else float(x) for x in (found["value"], *found["interval_95"])
        )
        return cls(value, (low, high), int(found["pairs"]), int(found["prompts"]))


def auc_within_prompts(
    targets: NDArray[np.float64], responses: NDArray[np.float64], counts: NDArray[np.bool_]
) -> Auc:
    """The AUC of scores within prompts: the mean over prompts of their shares of won pairs.

    Args:
        targets: scores of the targets, of shape (prompts,).
        responses: scores of the responses, of shape (prompts, samples).
        counts: which responses are compared, of shape (prompts, samples).
    """
    wins = (targets[:, None] > responses) + 0.5 * (targets[:, None] == responses)
    pairs = counts.sum(axis=1)
    used = pairs > 0
    shares = (wins * counts).sum(axis=1)[used] / pairs[used]
    if not len(shares):
        return Auc(math.nan, (math.nan, math.nan), 0, 0)
    mean = float(shares.mean())
    if len(shares) == 1:
        return Auc(mean, (math.nan, math.nan), int(pairs.sum()), 1)
    half = _Z * float(shares.std(ddof=1)) / math.sqrt(len(shares))
    return Auc(mean, (mean - half, mean + half), int(pairs.sum()), len(shares))
