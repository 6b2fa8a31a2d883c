"""summary.json: the results of a run so far, collected from its published files."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from tpaw.config.schema import RunConfig
from tpaw.errors import ArtifactError
from tpaw.generation.responses import response_facts
from tpaw.report.alarms import alarms
from tpaw.report.critic import exploited
from tpaw.report.status import ended_early
from tpaw.storage.artifacts import (
    is_published,
    read_files,
    read_listed_json,
    read_manifest,
    read_sealed,
    write_json,
)
from tpaw.storage.removal import removed_by
from tpaw.storage.run_directory import RunDirectory
from tpaw.storage.seals import SEAL


def write_summary(run: RunDirectory, config: RunConfig) -> dict[str, Any]:
    """Write summary.json of a run, and return it; see `summarise`. The same content stays.

    A number that is not finite is text in the file, as in training.jsonl: JSON has no such number.
    """
    summary = summarise(run, config)
    written = _readable(summary)
    try:
        known = json.loads(run.summary_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = None
    if known != written:
        write_json(run.summary_file, written)
    return summary


def _readable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _readable(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_readable(part) for part in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def summarise(run: RunDirectory, config: RunConfig) -> dict[str, Any]:
    """Collect the results of a run.

    Args:
        run: the run directory.
        config: the run's configuration.

    Returns:
        The content of summary.json. `players` has one entry for each iteration; entry 0 is the SFT
        model. Results that do not exist yet are absent. An entry may hold `evaluation` (see
        `evaluation/heldout.py`), `responses` (counts of D_{i-1}), `server_drift` (see
        `scoring/drift.py`), `critic` (see `pipeline/critic_task.py`), `training` (means over the
        last half of the steps), `sequences_scored`, `suites` (scores of benchmark suites in
        percent, by suite, with those of each benchmark), `seconds` for each stage, and `checkpoint`
        (a path relative to the run) with `weights_removed_by`, the setting, if its weights were
        removed.
        `notes` names these checkpoints, each damaged training.jsonl, whose metrics are absent, and
        a checkpoint that exploits its critic. `alarms` is what `report/alarms.py` finds.

    Raises:
        ArtifactError: a manifest or a results.json is damaged.
    """
    notes: list[str] = []
    iterations = [_iteration(run, i, notes) for i in range(config.iterations + 1)]
    skipped = read_manifest(run.inputs)["skipped"] if is_published(run.inputs) else {}
    notes += _removed_weights(iterations)
    notes += exploited(iterations)
    done = sum("checkpoint" in entry for entry in iterations)
    ended = ended_early(run, config)
    notes += [] if ended is None else [ended]
    return {
        "method": config.method,
        "iterations_done": done,
        "iterations": config.iterations,
        "ended": ended,
        "skipped_rows": skipped,
        "players": iterations,
        "alarms": [alarm._asdict() for alarm in alarms(iterations)],
        "notes": notes,
    }


def _iteration(run: RunDirectory, i: int, notes: list[str]) -> dict[str, Any]:
    entry: dict[str, Any] = {"iteration": i}
    seconds: dict[str, float] = {}
    if i > 0 and is_published(run.responses(i)):
        facts = response_facts(run.responses(i))
        entry["responses"] = {
            "rows": facts["rows"],
            "tokens": facts["tokens"],
            "identical_share": facts["identical"] / facts["rows"],
            "truncated_share": facts["truncated"] / facts["rows"],
        }
        if "repeating" in facts:
            for key in ("repeating", "repeating_targets"):
                entry["responses"][f"{key}_share"] = facts[key] / facts["rows"]
        seconds["generate"] = facts["seconds"]
    if i > 0 and (drift := run.iteration(i - 1).server_drift).exists():
        entry["server_drift"] = {k: v for k, v in read_sealed(drift).items() if k != SEAL}
    if i > 0 and is_published(run.iteration(i - 1).critic):
        critic = read_listed_json(run.iteration(i - 1).critic, "results.json")
        entry["critic"] = critic
        seconds["critic"] = critic["seconds"]
    scored = _scored(run, i)
    if scored:
        entry["sequences_scored"] = sum(shard["sequences"] for shard in scored)
        seconds["score"] = round(sum(shard["seconds"] for shard in scored), 3)
    if i > 0 and is_published(run.checkpoint(i)):
        entry["checkpoint"] = run.checkpoint(i).relative_to(run.root).as_posix()
        if (by := removed_by(run.checkpoint(i))) is not None:
            entry["weights_removed_by"] = by
        manifest = read_manifest(run.checkpoint(i))
        seconds["train"] = manifest["seconds"]
        if "triples" in manifest:  # of an objective that trains on some responses alone
            names = ("triples", "responses", "right_share", "right_share_of_all")
            entry["kept"] = {name: manifest[name] for name in names if name in manifest}
        try:
            log = run.read_training_log(i)
            # A count, because JSON has no number that is not finite.
            entry["lines_not_finite"] = sum(
                not math.isfinite(float(line.get(name, 0)))
                for line in log
                for name in ("loss", "grad_norm")
            )
            entry["training"] = _late_means(log)
            # A step at a learning rate of 0 leaves the second one a first step too.
            if compared := [line for line in log if "first_step/difference" in line]:
                entry["first_step"] = {
                    name: max(float(line[f"first_step/{name}"]) for line in compared)
                    for name in ("difference", "limit")
                }
        except ArtifactError as error:  # nothing but these metrics needs the log
            notes.append(str(error))
    if is_published(run.evaluation(i)):
        entry["evaluation"] = read_listed_json(run.evaluation(i), "results.json")
        seconds["evaluate"] = entry["evaluation"]["seconds"]
    suites = sorted(run.suites(i).glob("*/manifest.json"))
    if suites:
        results = [read_listed_json(manifest.parent, "results.json") for manifest in suites]
        entry["suites"] = {found["suite"]: _suite_scores(found) for found in results}
        tasks = (task for found in results for task in found["tasks"].values())
        seconds["suites"] = round(sum(task["seconds"] for task in tasks), 3)
    entry["seconds"] = seconds
    return entry


def _removed_weights(iterations: Sequence[dict[str, Any]]) -> list[str]:
    """Return a sentence for each setting that has removed weights."""
    names: dict[str, list[str]] = {}
    for entry in iterations:
        if "weights_removed_by" in entry:
            names.setdefault(entry["weights_removed_by"], []).append(f"θ_{entry['iteration']}")
    return [
        f"The weights of {', '.join(found)} were removed by {by}. "
        "Responses, log-probs and evaluations are kept."
        for by, found in names.items()
    ]


def _suite_scores(results: dict[str, Any]) -> dict[str, Any]:
    return {
        "score": results["score"],
        "stderr": results["stderr"],
        "benchmarks": {
            name: {"score": column["score"], "stderr": column["stderr"]}
            for name, column in results["benchmarks"].items()
        },
    }


def _scored(run: RunDirectory, i: int) -> list[dict[str, Any]]:
    manifests = sorted((run.root / "logprobs").glob("*/manifest.json"))
    shards = [shard for manifest in manifests for shard in read_files(manifest)]
    return [shard for shard in shards if shard["stage"] == f"iteration-{i}"]


def _late_means(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Compute means of the metrics over the last half of the steps. A single line is too noisy."""
    steps = lines[-1]["step"]
    late = [(b["step"] - a["step"], b) for a, b in pairwise([{"step": 0}, *lines])]
    late = [(weight, line) for weight, line in late if line["step"] > steps / 2]
    total = sum(weight for weight, _ in late)
    return {
        name: sum(weight * float(line[name]) for weight, line in late) / total
        for name in late[-1][1]
        if name.startswith(("loss", "rewards/", "weights/", "logps/", "share/"))
    }
