"""How long the rest of a run will take, from what its finished stages took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tpaw.config.plan import IterationPlan
from tpaw.runtime.progress import Bar

_UNITS = {"generate": "prompts", "critic": "steps", "score": "sequences", "train": "steps"}
"""Of the bar of each stage. An evaluation has several bars, so none says how far it is."""


class Running(NamedTuple):
    """The stage that runs now.

    Attributes:
        stage: its name.
        done: how much of its work is done, counted as in the plan.
    """

    stage: str
    done: float


def seconds_left(
    summary: Mapping[str, Any], plans: Sequence[IterationPlan], running: Running | None = None
) -> float | None:
    """Seconds of work that the stages without a published result will take.

    A stage takes as long for each response, sequence, step or evaluation as in the iterations so
    far. Benchmark suites are not counted.

    Args:
        summary: the content of summary.json.
        plans: who plays in each iteration; see `plan_run`.
        running: see `running_stage`. If it is not known, the stage counts as not begun.

    Returns:
        The seconds; None until each kind of stage that is left has been done once.
    """
    if summary["ended"] is not None:
        return 0.0
    left = 0.0
    found = [entry["seconds"] for entry in summary["players"]]
    for stage, amounts in _amounts(summary, plans).items():
        done = [(amount, s[stage]) for amount, s in zip(amounts, found, strict=True) if stage in s]
        rest: float = sum(
            amount for amount, s in zip(amounts, found, strict=True) if amount and stage not in s
        )
        if not rest:
            continue
        work = sum(amount for amount, _ in done)
        if not work:
            return None
        if running is not None and stage == running.stage:
            rest -= running.done
        left += rest * sum(seconds for _, seconds in done) / work
    return left


def running_stage(
    bar: Bar | None, summary: Mapping[str, Any], plans: Sequence[IterationPlan]
) -> Running | None:
    """The first stage without a published result, and how far it is.

    Args:
        bar: the one that runs now.
        summary, plans: see `seconds_left`.

    Returns:
        The stage; None if the bar does not say how far it is.
    """
    of_stages = _amounts(summary, plans).items()
    for i, entry in enumerate(summary["players"]):
        for stage, amounts in of_stages:
            if amounts[i] and stage not in entry["seconds"]:
                if bar is None or bar.unit != _UNITS.get(stage):
                    return None
                # A bar of scoring counts the sequences of one player.
                share = min(bar.done / bar.total, 1.0)
                return Running(stage, share * min(amounts[i], bar.total))
    return None


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
