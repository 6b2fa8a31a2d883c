"""Collect the results of the runs of a study. `analysis.py` computes the statistics.

Measures of a checkpoint on the held-out records:

- `accuracy`: exact match of greedy responses, in [0, 1], if targets have answers.
- `accuracy at T = …`: the same of responses that are sampled at this temperature.
- `different right ones of k at T = …`: of k sampled responses to a prompt, the mean number of
  different right ones.
- `target_logp_per_token`: nats.
- `gap`: log π(y) − log π(y_0), nats. y_0 is the response of θ_0 with the same seed. It is the same
  for all conditions with the same settings of `generate`.
- `nonpositive_gap_share`: share of the gaps that are not positive, in [0, 1].

- `SUITE` and `SUITE: BENCHMARK`: the scores of each suite of `evaluate.suites` and of its
  benchmarks, in percent.

Measures of its training:

- `target_reward`, `reward_margin`: means over the last half of the steps, in nats × λ.
- `identical`: share of the responses of the newest opponent that equal the target, in [0, 1].
- `critic_auc`: of method critic, on prompts that had no part in its fit.
- `right_responses`, `right_kept`: where a method keeps some of the responses and right ones can be
  told, the share of right ones of all and of the kept. Of method critic on prompts that had no part
  in its fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tpaw.errors import ArtifactError
from tpaw.report.series import DIFFERENT_RIGHT, SAMPLED_ACCURACY
from tpaw.report.summary import summarise
from tpaw.runtime.progress import note
from tpaw.storage.run_directory import RunDirectory
from tpaw.study.runner import StudyRun

# Results of each run, by condition and seed: `iterations` (measures by name, for θ_0, θ_1, …),
# `curve` (pairs of step and target reward in the last iteration, each the mean of
# `train.log_every` steps; may be empty) and `seconds`.
Results = Mapping[str, Mapping[int, Mapping[str, Any]]]

HELD_OUT = ("accuracy", "gap", "nonpositive_gap_share", "target_logp_per_token")
TRAINING = (
    "target_reward", "reward_margin", "identical", "critic_auc", "right_responses", "right_kept",
)  # fmt: skip
MEASURES = HELD_OUT + TRAINING


def collect(runs: Sequence[StudyRun]) -> Results:
    """Collect the results of all finished runs. A condition without a finished run is empty."""
    results: dict[str, dict[int, Mapping[str, Any]]] = {}
    for run in runs:
        of_condition = results.setdefault(run.condition.name, {})
        if run.is_done():
            of_condition[run.seed] = _of_run(run)
    return results


def measures_in(results: Results) -> list[str]:
    """Return the measures that at least one checkpoint has: `MEASURES`, then all others."""
    found = dict.fromkeys(
        name
        for by_seed in results.values()
        for run in by_seed.values()
        for iteration in run["iterations"]
        for name in iteration
    )
    return [*(name for name in MEASURES if name in found), *(n for n in found if n not in MEASURES)]


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
    for temperature, sampled in evaluation.get("sampled_exact_match", {}).items():
        yield f"{SAMPLED_ACCURACY}{temperature}", sampled["accuracy"]
        if "distinct_correct" in sampled:
            name = f"{DIFFERENT_RIGHT}{sampled['samples']} at T = {temperature}"
            yield name, sampled["distinct_correct"]
    for name in HELD_OUT[1:]:
        if name in evaluation.get("logps", {}):
            yield name, evaluation["logps"][name]
    training = entry.get("training", {})
    if "rewards/target" in training:
        yield "target_reward", training["rewards/target"]
        yield "reward_margin", training["rewards/margins"]
    if "responses" in entry:
        yield "identical", entry["responses"]["identical_share"]
    yield from _of_the_kept(entry)
    for name, suite in entry.get("suites", {}).items():
        yield name, suite["score"]
        if len(suite["benchmarks"]) > 1:
            for benchmark, column in suite["benchmarks"].items():
                yield f"{name}: {benchmark}", column["score"]


def _of_the_kept(entry: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Of a method that keeps some of the responses: how it chooses."""
    critic, kept = entry.get("critic", {}), entry.get("kept", {})
    found = {
        "critic_auc": critic.get("auc", {}).get("value"),
        "right_responses": critic.get("right_share_heldout", kept.get("right_share_of_all")),
        "right_kept": critic.get("best_right_share_heldout", kept.get("right_share")),
    }
    yield from ((name, value) for name, value in found.items() if value is not None)


def _curve(run: StudyRun) -> Iterator[list[float]]:
    try:
        lines = RunDirectory(run.folder).read_training_log(run.config.iterations)
    except ArtifactError as error:
        note(f"{run.name}: {error}")
        return
    for entry in lines:
        # The last entry may be the mean of fewer steps. It would look like a jump of the curve.
        is_whole = entry["step"] % run.config.train.log_every == 0
        if "rewards/target" in entry and is_whole:
            yield [entry["step"], float(entry["rewards/target"])]
