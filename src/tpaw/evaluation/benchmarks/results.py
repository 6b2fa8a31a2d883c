"""What is kept of a task: the outcome of every item, and what they come to."""

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
    """Of what the harness reports on a task, its metrics by "metric,filter"."""
    return {
        key: _number(value)
        for key, value in results.items()
        if "," in key and "_stderr," not in key
    }


def task_facts(
    name: str, column: SuiteTask, version: Any, metrics: Metrics, items: Sequence[Item]
) -> dict[str, Any]:
    """What results.json says of a task.

    `value` is the harness's own aggregate; `stderr` that of the items' mean, in percent;
    `interval_95` (Wilson) is of `value`, where every item is right or wrong.

    Raises:
        InputError: the harness reports no such metric.
    """
    value = statistics.fmean(_known(metrics, key, name) for key in column.metric_keys)
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
    """One item a document, in their order; the harness has one for each filter of it.

    Args:
        samples: as the harness logs them.
        keys: the metrics, "metric,filter", whose mean is the item's score.
        kind: of the task's output, by the harness's name.
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
    # Whatever a task has for a target, and the harness's numpy numbers, as JSON.
    return [json.loads(json.dumps(items[i], default=_plain)) for i in sorted(items)]


def _number(value: Any) -> float | None:
    """A metric of one item; the mean of a list; None where it is no number (F1 has a pair)."""
    if isinstance(value, bool | int | float | np.bool_ | np.number):
        return float(value)
    if isinstance(value, list) and value and all(_number(v) is not None for v in value):
        return statistics.fmean(float(v) for v in value)
    return None


def _known(metrics: Metrics, key: str, name: str) -> float:
    value = metrics.get(key)
    if value is None:
        raise InputError(f"{name}: the harness reports no number as {key}")
    return value


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)
