"""Published evaluations, read item by item: a run's own, and those of a suite.

Both become measures: a score for each item, and the conditions under which it was taken. What
`compare` needs to know to refuse two measures is here; what it computes is there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tpaw.errors import InputError
from tpaw.evaluation.items import Item, read_items
from tpaw.models.references import find_in_run
from tpaw.storage.artifacts import (
    MANIFEST,
    is_published,
    read_files,
    read_json,
    read_manifest,
    verify,
)
from tpaw.storage.run_directory import RunDirectory

GAP = "gap"


class Measure(NamedTuple):
    """One score for each item.

    Attributes:
        is_binary: every score is 1 for right or 0 for wrong.
        scores: by item id, in the order of the file; nats for log-probs.
        hashes: of the items' documents, by id. Empty for a run's own evaluation, whose ids hold a
            hash of the prompt's and the target's token ids.
        conditions: by name, what must be the same in two measures that are compared.
    """

    is_binary: bool
    scores: dict[str, float]
    hashes: dict[str, str]
    conditions: dict[str, Any]


class Evaluation(NamedTuple):
    """What is known of one system.

    Attributes:
        name: the reference that names it.
        folder: the artifact.
        suite: the suite's name; None for a run's own held-out evaluation.
        measures: by name. Of a run: `accuracy` where targets have answers, `target_logp`, `gap`
            (see `heldout`). Of a suite: its tasks.
        score: the suite's own average in percent, where it has one over several tasks.
        versions: of the packages that made a suite's evaluation.
    """

    name: str
    folder: Path
    suite: str | None
    measures: dict[str, Measure]
    score: float | None
    versions: dict[str, str]


def find_evaluation(reference: str, suite: str | None = None) -> Evaluation:
    """The evaluation that a reference names: RUN, RUN@i or a published folder.

    Args:
        suite: a suite's name; None for what a run evaluates by itself, or what the folder holds.

    Raises:
        InputError: there is none, it is of another suite, or a score is not a finite number.
        ArtifactError: a file of it is damaged.
    """
    found = find_in_run(reference)
    if found is None:
        folder, name = Path(reference), reference
        if not is_published(folder) or not (folder / "results.json").is_file():
            raise InputError(
                f"{reference}: neither a run, nor RUN@i, nor an evaluation's folder "
                f"({MANIFEST} and results.json)"
            )
    else:
        run, i = found
        folder = run.evaluation(i) if suite is None else run.suite(i, suite)
        name = f"{run.root}@{i}"
        if not is_published(folder):
            raise InputError(f"{name}: {_why_absent(run, i, suite)}")
    verify(folder / MANIFEST)
    try:
        evaluation = _read(name, folder)
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise InputError(f"{folder}: not an evaluation that can be read: {error!r}") from None
    if suite is not None and evaluation.suite != suite:
        held = f"the suite {evaluation.suite}" if evaluation.suite else "a run's own evaluation"
        raise InputError(f"{name}: holds {held}, not --suite {suite}")
    return evaluation


def _read(name: str, folder: Path) -> Evaluation:
    results = read_json(folder / "results.json")
    if "suite" not in results:
        return Evaluation(name, folder, None, _of_run(folder), None, {})
    measures = {}
    for task, facts in results["tasks"].items():
        items = read_items(folder / "items" / f"{task}.jsonl")
        # The tasks' data hash is left to the items' own: they name the item, in any order.
        conditions = {key: facts[key] for key in ("metric", "num_fewshot", "version")}
        conditions["lm_eval"] = results["versions"]["lm_eval"]
        conditions |= {f"settings.{key}": value for key, value in results["settings"].items()}
        measures[task] = Measure(
            all("correct" in item for item in items),
            _scores(folder, items, [item["score"] for item in items]),
            {str(item["id"]): str(item["doc_hash"]) for item in items},
            conditions,
        )
    score = results["score"] if len(measures) > 1 else None
    return Evaluation(name, folder, results["suite"], measures, score, results["versions"])


def _of_run(folder: Path) -> dict[str, Measure]:
    run = RunDirectory(folder.absolute().parents[2])
    if not run.has_begun():
        raise InputError(f"{folder}: a run's own evaluation is read where it lies, in its run")
    measures = {}
    if (folder / "exact_match.jsonl").is_file():
        config = run.load_config()
        budget = config.evaluate.max_new_tokens or config.generate.max_new_tokens
        items = read_items(folder / "exact_match.jsonl")
        measures["accuracy"] = Measure(
            True,
            _scores(folder, items, [item["correct"] for item in items]),
            {},
            {"max_new_tokens": budget, "max_length": config.max_length},
        )
    items = read_items(folder / "logps.jsonl")
    targets = [item["target_logp"] for item in items]
    gaps = [item["target_logp"] - item["initial_answer_logp"] for item in items]
    measures["target_logp"] = Measure(False, _scores(folder, items, targets), {}, {})
    measures[GAP] = Measure(
        False, _scores(folder, items, gaps), {}, {"initial answers": _initial_answers(run)}
    )
    return measures


def _scores(
    folder: Path, items: Sequence[Item], values: Sequence[float | None]
) -> dict[str, float]:
    scores: dict[str, float] = {}
    for item, value in zip(items, values, strict=True):
        item_id = str(item["id"])
        if item_id in scores:
            raise InputError(f"{folder}: item {item_id!r} is there twice")
        if value is None or not math.isfinite(value):
            raise InputError(f"{folder}: item {item_id!r} has the score {value}")
        scores[item_id] = float(value)
    if len(scores) < 2:
        raise InputError(f"{folder}: {len(scores)} items; a comparison needs two or more")
    return scores


def _initial_answers(run: RunDirectory) -> str:
    """Hash of the answers that the run's gaps are measured against."""
    files = read_files(run.evaluation(0) / MANIFEST)
    return next(str(f["sha256"]) for f in files if f["path"] == "initial_answers.parquet")


def _why_absent(run: RunDirectory, i: int, suite: str | None) -> str:
    if suite is not None:
        return f"not evaluated on {suite}; do it with: tpaw evaluate {run.root}@{i} --suite {suite}"
    if is_published(run.inputs) and not read_manifest(run.inputs)["heldout_rows"]:
        return "no evaluation: the run has no held-out rows (evaluate.data); try --suite"
    return f"not evaluated yet; go on with: tpaw run {run.root}"
