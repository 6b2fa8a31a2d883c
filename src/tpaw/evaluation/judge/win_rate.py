"""The win rate and its interval. The interval is clustered by prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import t

from tpaw.evaluation.judge.match import Judged
from tpaw.evaluation.judge.outputs import Pair
from tpaw.statistics.over_items import Interval

SCORES = {"win": 1.0, "tie": 0.5, "loss": 0.0}
_ADDED = (1.0, 1.0, 0.0, 0.0)  # two wins and two losses; see `clustered_interval`


def clustered_interval(scores: Sequence[float], clusters: Sequence[str]) -> Interval:
    """Compute the 95 % interval of the mean of scores, where scores of one cluster are dependent.

    It is the cluster-robust t interval of a ratio estimator (Liang & Zeger 1986, with the factor
    G/(G−1) and G−1 degrees of freedom for G clusters). Before that, two wins and two losses are
    added as clusters of the mean size (Agresti & Coull 1998). So the width is never 0, even if all
    pairs are wins or all are ties.

    Args:
        scores: one score in [0, 1] for each pair, at least one.
        clusters: for each score, the name of its cluster.

    Returns:
        An interval within [0, 1].
    """
    names, of_cluster = np.unique(np.array(clusters), return_inverse=True)
    added_size = len(scores) / len(names)
    sizes = np.append(np.bincount(of_cluster), np.full(len(_ADDED), added_size))
    sums = np.append(np.bincount(of_cluster, scores), np.array(_ADDED) * added_size)
    mean = float(sums.sum() / sizes.sum())
    residuals = sums - mean * sizes
    groups = len(sizes)
    error = float(np.sqrt(groups / (groups - 1) * (residuals**2).sum()) / sizes.sum())
    half = float(t.ppf(0.975, groups - 1)) * error
    return Interval(max(mean - half, 0.0), min(mean + half, 1.0))


def win_rate(pairs: Sequence[Pair], judged: Sequence[Judged]) -> dict[str, Any]:
    """Compute the win rate of the first system, (wins + ½ ties) / valid pairs, and counts.

    Args:
        pairs: the pairs of responses.
        judged: the outcome of each pair, in the same order.

    Returns:
        Counts, `win_rate` in [0, 1] and its `interval_95`. Both are None if no pair is valid;
        `note` then says so.
    """
    outcomes = Counter(item.outcome for item in judged)
    valid = [
        (SCORES[item.outcome], pair.instruction)
        for pair, item in zip(pairs, judged, strict=True)
        if item.outcome in SCORES
    ]
    asked = [item for item in judged if item.orders is not None]
    results: dict[str, Any] = {
        "pairs": len(pairs),
        "prompts": len({pair.instruction for pair in pairs}),
        "wins": outcomes["win"],
        "losses": outcomes["loss"],
        "ties": {
            "identical": len(judged) - len(asked),
            "both_orders": sum(_verdicts(i) == ("neither", "neither") for i in asked),
            "disagreement": sum(
                i.outcome == "tie" and _verdicts(i) != ("neither", "neither") for i in asked
            ),
        },
        # Pairs for which the judge preferred the same position in both orders: a position bias.
        "disagreements": {
            "always_first_place": sum(_verdicts(i) == ("first", "second") for i in asked),
            "always_second_place": sum(_verdicts(i) == ("second", "first") for i in asked),
        },
        "invalid": outcomes["invalid"],
        "invalid_replies": dict(
            Counter(o.invalid for i in asked for o in i.orders or () if o.invalid)
        ),
        "win_rate": None,
        "interval_95": None,
    }
    if not valid:
        return results | {"note": "no pair has two valid verdicts, so there is no win rate"}
    scores, clusters = zip(*valid, strict=True)
    results["win_rate"] = float(np.mean(scores))
    results["interval_95"] = list(clustered_interval(scores, clusters))
    return results


def _verdicts(item: Judged) -> tuple[str | None, ...]:
    return tuple(order.verdict for order in item.orders or ())
