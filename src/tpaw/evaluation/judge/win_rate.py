"""From outcomes to a win rate, with an interval that knows which pairs share a prompt."""

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
_ADDED = (1.0, 1.0, 0.0, 0.0)


def clustered_interval(scores: Sequence[float], clusters: Sequence[str]) -> Interval:
    """95 % interval of a mean of scores in [0, 1], of which some share a cluster.

    The cluster-robust t interval of a ratio estimator (Liang & Zeger 1986, with the factor
    G/(G−1) and G−1 degrees of freedom for G clusters), after two wins and two losses are added as
    clusters of the mean size (Agresti & Coull 1998). So it is never of width zero, all wins or all
    ties included, and stays within [0, 1].
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
    """Counts, and (wins + ½ ties) / valid pairs of the first system with its interval.

    Where no pair is valid there is no rate: it and its interval are null, and `note` says so.
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
        # Both times the answer that stood in the same place: what position alone decides.
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
