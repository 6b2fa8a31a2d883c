"""What a chart of a study shows: a measure by iteration, or by the one setting that varies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Study = Mapping[str, Any]

_LABELS = {
    "accuracy": "accuracy",
    "gap": "log π(y) − log π(y₀), nats",
    "nonpositive_gap_share": "share of gaps ≤ 0",
    "target_logp_per_token": "log π(y) per token, nats",
    "target_reward": "target reward P(x, y)",
    "reward_margin": "margin P(x, y) − P(x, y_gen)",
    "identical": "share of answers equal to the target",
    "critic_auc": "AUC of the critic, targets against responses",
    "right_responses": "share of right responses to training prompts",
    "right_kept": "share of right responses of those that are kept",
}
SAMPLED_ACCURACY = "accuracy at T = "
"""Begins the name of a measure; the temperature follows."""
DIFFERENT_RIGHT = "different right ones of "
"""Begins the name of a measure; the number of samples and the temperature follow."""


class Series(NamedTuple):
    """One line of a chart.

    Attributes:
        name: for the legend.
        x, y: of each point; y is the mean over seeds. Both are empty if no run has the measure.
        low, high: the 95 % interval of each mean; empty if a point has none.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]

    @classmethod
    def of(cls, name: str, points: Sequence[tuple[float, Mapping[str, Any]]]) -> Series:
        """A line from each x and what study.json says of the mean there."""
        intervals = [found["interval_95"] for _, found in points]
        low, high = zip(*intervals, strict=True) if intervals and all(intervals) else ((), ())
        return cls(name, [x for x, _ in points], [found["mean"] for _, found in points], low, high)


def label_of(measure: str) -> str:
    """Return the label of a measure for figures and tables. A suite has its own name."""
    if measure.startswith((SAMPLED_ACCURACY, DIFFERENT_RIGHT)):
        return measure
    return _LABELS.get(measure, f"{measure}, %")


def series_of(study: Study, measure: str) -> list[Series]:
    """The lines of a measure: one for each method by `single_axis`, or for each condition.

    Args:
        study: the content of study.json.
        measure: one of its measures.
    """
    setting = single_axis(study)
    return (
        _by_iteration(study, measure) if setting is None else _by_setting(study, setting, measure)
    )


def x_label(study: Study) -> str:
    """What the x of `series_of` is."""
    if (setting := single_axis(study)) is not None:
        return setting.partition(",")[0]
    return "iteration" if has_one_length(study) else "share of the iterations"


def single_axis(study: Study) -> str | None:
    """Return the setting that varies, or None.

    There must be only one, and its values must be numbers or lists of numbers.
    """
    settings = [condition["settings"] for condition in study["conditions"].values()]
    keys = {key for of_condition in settings for key in of_condition}
    if len(keys) != 1:
        return None
    [key] = keys
    numbers = all(isinstance(_number(s[key]), int | float) for s in settings)
    return key if numbers else None


def values_of(study: Study, setting: str) -> list[float]:
    """The values of a setting in rising order, each once; those of failed runs too."""
    return sorted({_number(c["settings"][setting]) for c in study["conditions"].values()})


def has_one_length(study: Study) -> bool:
    """Whether all conditions with results have the same number of iterations."""
    return len({len(c["by_iteration"]) for c in study["conditions"].values()} - {0}) <= 1


def _by_iteration(study: Study, measure: str) -> list[Series]:
    """If the conditions have different numbers of iterations, x is the share of them."""
    is_share = not has_one_length(study)
    lines = []
    for name, condition in study["conditions"].items():
        entries = condition["by_iteration"]
        last = max(len(entries) - 1, 1) if is_share else 1
        points = [(t / last, e[measure]) for t, e in enumerate(entries) if e.get(measure)]
        lines.append(Series.of(name, points))
    return lines


def _by_setting(study: Study, setting: str, measure: str) -> list[Series]:
    """The last iteration by the value of the setting."""
    conditions = study["conditions"].values()
    lines = []
    for method in dict.fromkeys(c["method"] for c in conditions):
        points = [
            (_number(c["settings"][setting]), c["by_iteration"][-1][measure])
            for c in conditions
            # If every run of a condition failed, the condition has no iterations.
            if c["method"] == method and c["by_iteration"] and c["by_iteration"][-1].get(measure)
        ]
        lines.append(Series.of(method, sorted(points, key=lambda point: point[0])))
    return lines


def _number(value: Any) -> Any:
    """The value itself, or the first one if it is a list with one value per iteration."""
    return value[0] if isinstance(value, list) else value
