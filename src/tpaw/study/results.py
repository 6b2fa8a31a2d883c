"""What the runs of a study have shown, run by run; the statistics over them are elsewhere.

Measures of a checkpoint on the held-out rows: `accuracy` (greedy exact match, where targets have
answers), `target_logp_per_token` (nats), `gap` (log π(y) − log π(y_0), nats; y_0 is what θ_0 of
that seed answered, one fixed set for all conditions) and `nonpositive_gap_share`. Of its training:
`target_reward` and `reward_margin` over the last half of the steps, and the share of its opponents'
newest answers that were `identical` to the target.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tpaw.report.summary import summarise
from tpaw.storage.run_directory import RunDirectory
from tpaw.study.runner import StudyRun

# By condition and seed: `iterations` (from θ_0 on, measures by name), `curve` ([step, target
# reward] of the last iteration, where there is one) and `seconds`.
Results = Mapping[str, Mapping[int, Mapping[str, Any]]]

HELD_OUT = ("accuracy", "gap", "nonpositive_gap_share", "target_logp_per_token")
TRAINING = ("target_reward", "reward_margin", "identical")
MEASURES = HELD_OUT + TRAINING


def collect(runs: Sequence[StudyRun]) -> Results:
    """Everything that the runs which came to their end have shown."""
    results: dict[str, dict[int, Mapping[str, Any]]] = {}
    for run in runs:
        of_condition = results.setdefault(run.condition.name, {})
        if run.is_done():
            of_condition[run.seed] = _of_run(run)
    return results


def measures_in(results: Results) -> list[str]:
    """The measures that some checkpoint has, in their order."""
    found = {
        name
        for by_seed in results.values()
        for run in by_seed.values()
        for iteration in run["iterations"]
        for name in iteration
    }
    return [name for name in MEASURES if name in found]


def _of_run(run: StudyRun) -> dict[str, Any]:
    summary = summarise(RunDirectory(run.folder), run.config)
    iterations = [dict(_measures(entry)) for entry in summary["players"]]
    seconds = sum(sum(entry["seconds"].values()) for entry in summary["players"])
    return {
        "iterations": iterations,
        "curve": list(_curve(run)),
        "seconds": round(seconds, 1),
    }


def _measures(entry: dict[str, Any]) -> Iterator[tuple[str, float]]:
    evaluation = entry.get("evaluation", {})
    if "exact_match" in evaluation:
        yield "accuracy", evaluation["exact_match"]["accuracy"]
    for name in HELD_OUT[1:]:
        if name in evaluation.get("logps", {}):
            yield name, evaluation["logps"][name]
    training = entry.get("training", {})
    if "rewards/target" in training:
        yield "target_reward", training["rewards/target"]
        yield "reward_margin", training["rewards/margins"]
    if "responses" in entry:
        yield "identical", entry["responses"]["identical_share"]


def _curve(run: StudyRun) -> Iterator[list[float]]:
    log = RunDirectory(run.folder).training_log(run.config.iterations)
    for line in log.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if "rewards/target" in entry:
            yield [entry["step"], float(entry["rewards/target"])]
