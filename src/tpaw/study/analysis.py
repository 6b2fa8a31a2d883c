"""Compute the statistics of a study from the results of its runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tpaw.statistics.over_items import holm
from tpaw.statistics.over_seeds import over_seeds, seed_difference, too_few_seeds
from tpaw.study.config import Condition
from tpaw.study.results import MEASURES, Results, measures_in


def analyse(
    conditions: Sequence[Condition], results: Results, baseline: str | None
) -> dict[str, Any]:
    """Compute statistics over seeds.

    Args:
        conditions: the conditions of the study.
        results: see `results.collect`.
        baseline: name of the condition that the others are compared with; None means the first.

    Returns:
        Plain values for study.json. `conditions` holds, by name, the `runs` and `by_iteration`:
        mean, standard deviation and interval over seeds of each measure. `comparisons` compares
        each other condition with the baseline after the last iteration, on the seeds that both
        have. The compared measure is `primary`, which does not depend on the results: accuracy if
        the runs have it, else the first suite, else the gap. Holm's correction covers all
        comparisons, separately for both kinds of p-value.
    """
    measures = measures_in(results)
    others = (name for name in measures if name not in MEASURES)
    primary = "accuracy" if "accuracy" in measures else next(others, "gap")
    first = baseline or conditions[0].name
    return {
        "measures": measures,
        "primary": primary,
        "baseline": first,
        "conditions": {
            condition.name: {
                "method": condition.method,
                "settings": dict(condition.settings),
                "by_iteration": _by_iteration(results[condition.name], measures),
                "runs": results[condition.name],
            }
            for condition in conditions
        },
        "comparisons": _comparisons(results, first, primary),
    }


def _by_iteration(
    runs: Mapping[int, Mapping[str, Any]], measures: Sequence[str]
) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    for iterations in zip(*(run["iterations"] for run in runs.values()), strict=True):
        entry = {}
        for measure in measures:
            values = [found[measure] for found in iterations if measure in found]
            if values:
                entry[measure] = over_seeds(values)._asdict()
        entries.append(entry)
    return entries


def _comparisons(results: Results, baseline: str, measure: str) -> list[dict[str, Any]]:
    found = []
    for name, runs in results.items():
        seeds = sorted(set(runs) & set(results[baseline]))
        if name == baseline or not seeds:
            continue
        last = [
            [of[seed]["iterations"][-1][measure] for seed in seeds]
            for of in (results[baseline], runs)
        ]
        found.append({"condition": name, "seeds": seeds} | _plain(seed_difference(*last)))
    for kind in ("t_p_value", "sign_flip_p_value"):
        tested = [comparison for comparison in found if comparison[kind] is not None]
        adjusted = holm([comparison[kind] for comparison in tested])
        for comparison, p_value in zip(tested, adjusted, strict=True):
            comparison[f"{kind}_holm"] = p_value
    for comparison in found:
        comparison["caution"] = too_few_seeds(len(comparison["seeds"]), len(found))
    return found


def _plain(difference: Any) -> dict[str, Any]:
    plain = difference._asdict()
    del plain["seeds"]
    return plain  # type: ignore[no-any-return]
