"""The results of one task: its items and its entry in results.json."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tpaw.errors import InputError
from tpaw.evaluation.benchmarks.suite import SuiteTask, task_score
from tpaw.evaluation.items import Item
from tpaw.statistics.over_items import wilson_interval

Metrics = Mapping[str, float | None]


def reported_metrics(results: Mapping[str, Any]) -> Metrics:
    """Select the metrics from the harness's results of a task.

    Returns:
        Values by "metric,filter", without the standard errors. None if a value is not a number.
    """
    return {
        key: _number(value)
        for key, value in results.items()
        if "," in key and "_stderr," not in key
    }


def task_facts(
    name: str, column: SuiteTask, version: Any, metrics: Metrics, items: Sequence[Item]
) -> dict[str, Any]:
    """Build a task's entry in results.json.

    Args:
        name: the harness's name of the task.
        column: the entry of the suite that the task belongs to.
        version: version of the task.
        metrics: see `reported_metrics`.
        items: see `item_outcomes`.

    Returns:
        `value`: the harness's own aggregate, in [0, 1]. `score`: see `task_score`, in percent.
        `stderr`: standard error of the mean over the items, in percent, or None. `interval_95`:
        Wilson interval of `value`; present only if every item is right or wrong. The other fields
        describe the task.

    Raises:
        InputError: the harness does not report the metric of the column, or its value is not in
            [0, 1].
    """
    value = statistics.fmean(_known(metrics, key, name) for key in column.metric_keys)
    if not -1e-9 <= value <= 1 + 1e-9:
        raise InputError(
            f"{name}: metric: {' + '.join(column.metric_keys)}: {value:g}: not a share between 0 "
            "and 1, so it has no score in percent; choose another metric"
        )
    lower_bound = column.lower_bound_of(name)
    scores = [item["score"] for item in items]
    error = None
    if len(scores) > 1 and None not in scores:
        error = 100 * statistics.stdev(scores) / math.sqrt(len(scores)) / (1 - lower_bound)
    facts = {
        "benchmark": column.name,
        "metric": " + ".join(column.metric_keys),
        "num_fewshot": column.num_fewshot,
        "version": version,
        "items": len(items),
        "value": value,
        "lower_bound": lower_bound,
        "score": task_score(value, lower_bound),
        "stderr": error,
        "data_hash": hashlib.sha256("".join(i["doc_hash"] for i in items).encode()).hexdigest(),
        "metrics": dict(metrics),
    }
    if all("correct" in item for item in items):
        correct = sum(item["correct"] for item in items)
        facts["interval_95"] = list(wilson_interval(correct, len(items)))
    return facts


def item_outcomes(
    samples: Sequence[Mapping[str, Any]], keys: Sequence[str], kind: str
) -> list[Item]:
    """Build one item for each document. The harness has one sample for each document and filter.

    Args:
        samples: the samples that the harness logs.
        keys: the metrics, "metric,filter". Their mean is the score of an item.
        kind: the harness's output type, such as "generate_until".

    Returns:
        The items, in the order of the documents. They hold `correct` only if every score is 0 or 1.
    """
    items: dict[int, Item] = {}
    for sample in samples:
        item = items.setdefault(
            sample["doc_id"],
            {"id": sample["doc_id"], "doc_hash": sample["doc_hash"], "metrics": {}},
        )
        responses = [response for request in sample["resps"] for response in request]
        if kind == "generate_until":
            item["completion"] = responses[0]
        else:
            item["resps"] = responses
        item["target"] = sample["target"]
        for metric in sample["metrics"]:
            item["metrics"][f"{metric},{sample['filter']}"] = _number(sample[metric])
    for item in items.values():
        values = [item["metrics"][key] for key in keys]
        item["score"] = None if None in values else statistics.fmean(values)
        if len(keys) == 1 and item["score"] in (0, 1):
            item["correct"] = bool(item["score"])
    if not all("correct" in item for item in items.values()):
        for item in items.values():
            item.pop("correct", None)
    # A target may be any object, and the harness uses numpy numbers. Convert both to JSON types.
    return [json.loads(json.dumps(items[i], default=_plain)) for i in sorted(items)]


def _number(value: Any) -> float | None:
    """Convert a metric of one item to a number.

    Returns:
        The number, the mean of a list of numbers, or None for anything else (F1 has a pair) and for
        NaN and infinity.
    """
    if isinstance(value, bool | int | float | np.bool_ | np.number):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, list) and value and all(_number(v) is not None for v in value):
        return statistics.fmean(float(v) for v in value)
    return None


def _known(metrics: Metrics, key: str, name: str) -> float:
    value = metrics.get(key)
    if value is None:
        raise InputError(
            f"{name}: metric: {key}: the harness reports no number for it; choose another metric"
        )
    return value


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)
