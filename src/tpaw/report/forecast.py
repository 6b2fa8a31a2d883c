"""How long the rest of a run will take, from what its finished stages took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tpaw.config.plan import IterationPlan


def seconds_left(summary: Mapping[str, Any], plans: Sequence[IterationPlan]) -> float | None:
    """Seconds of work that the stages without a published result will take.

    A stage takes as long for each response, sequence, step or evaluation as in the iterations so
    far. A stage that runs counts as not begun. Benchmark suites are not counted.

    Args:
        summary: the content of summary.json.
        plans: who plays in each iteration; see `plan_run`.

    Returns:
        The seconds; None until each kind of stage that is left has been done once.
    """
    if summary["ended"] is not None:
        return 0.0
    left = 0.0
    found = [entry["seconds"] for entry in summary["players"]]
    for stage, amounts in _amounts(summary, plans).items():
        done = [(amount, s[stage]) for amount, s in zip(amounts, found, strict=True) if stage in s]
        rest = sum(
            amount for amount, s in zip(amounts, found, strict=True) if amount and stage not in s
        )
        if not rest:
            continue
        work = sum(amount for amount, _ in done)
        if not work:
            return None
        left += rest * sum(seconds for _, seconds in done) / work
    return left


def _amounts(summary: Mapping[str, Any], plans: Sequence[IterationPlan]) -> dict[str, list[int]]:
    """What each stage has to do, by checkpoint from θ_0 on."""
    is_evaluated = "evaluate" in summary["players"][0]["seconds"]
    return {
        "generate": [0, *(plan.to_generate for plan in plans)],
        "critic": [0, *(int(summary["method"] == "critic") for _ in plans)],
        "score": [0, *(plan.to_score for plan in plans)],
        "train": [0, *(plan.optimizer_steps for plan in plans)],
        "evaluate": [int(is_evaluated)] * (1 + len(plans)),
    }
