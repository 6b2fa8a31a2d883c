"""Read published evaluations: the held-out evaluation of a run, or the evaluation of a suite.

Both become measures. A measure has a score for each item, and the conditions of the evaluation.
`compare` refuses two measures whose conditions differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tpaw.errors import InputError
from tpaw.evaluation.items import Item, items_file, read_items
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
        is_binary: whether every score is 1 (right) or 0 (wrong).
        scores: by item id, in the order of the file. Log-probs are in nats.
        hashes: hashes of the documents, by item id. Empty for a run's own evaluation, because its
            item ids already hold a hash of the token ids of prompt and target.
        conditions: settings that must be equal in two measures to compare them, by name.
    """

    is_binary: bool
    scores: dict[str, float]
    hashes: dict[str, str]
    conditions: dict[str, Any]


class Evaluation(NamedTuple):
    """The evaluation of one system.

    Attributes:
        name: the reference of the system, such as RUN@3.
        folder: folder of the published evaluation.
        suite: name of the suite; None for a run's own held-out evaluation.
        measures: by name. For a run: `accuracy` if targets have answers, `target_logp` and `gap`
            (see `heldout.py`). For a suite: one measure for each task.
        score: the suite's average in percent; None for a run or a suite of one task.
        versions: package versions of the suite's evaluation, by package; empty for a run.
    """

    name: str
    folder: Path
    suite: str | None
    measures: dict[str, Measure]
    score: float | None
    versions: dict[str, str]


def find_evaluation(reference: str, suite: str | None = None) -> Evaluation:
    """Read the evaluation that a reference names.

    Args:
        reference: RUN, RUN@i or the folder of a published evaluation.
        suite: name of a suite. None means the held-out evaluation of a run, or any evaluation that
            the folder holds.

    Raises:
        InputError: there is no such evaluation, it belongs to another suite, or a score is not a
            finite number.
        ArtifactError: a file of the evaluation is damaged.
    """
    found = find_in_run(reference)
    if found is None:
        folder, name = Path(reference), reference
        if not is_published(folder) or not (folder / "results.json").is_file():
            raise InputError(
                f"{reference}: not found as a run, RUN@i or the folder of an evaluation; "
                f"such a folder holds {MANIFEST} and results.json"
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
        raise InputError(
            f"{folder}: cannot be read as an evaluation: {error!r}; evaluate again"
        ) from None
    if suite is not None and evaluation.suite != suite:
        held = f"the suite {evaluation.suite}" if evaluation.suite else "a run's own evaluation"
        raise InputError(f"{name}: holds {held}; --suite {suite} asks for another evaluation")
    return evaluation


def _read(name: str, folder: Path) -> Evaluation:
    results = read_json(folder / "results.json")
    if "suite" not in results:
        return Evaluation(name, folder, None, _of_run(folder), None, {})
    measures = {}
    for task, facts in results["tasks"].items():
        items = read_items(folder / items_file(task))
        # The hashes of the items replace the task's data hash: they allow any order of the items,
        # and an error can name the item that differs.
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
        raise InputError(
            f"{folder}: the evaluation of a run can only be read inside its run directory; "
            "name the run instead"
        )
    measures = {}
    if (folder / "exact_match.jsonl").is_file():
        config = run.load_config()
        budget = config.evaluate.max_new_tokens or config.generate.max_new_tokens
        items = read_items(folder / "exact_match.jsonl")
        measures["accuracy"] = Measure(
            True,
            _scores(folder, items, [item["correct"] for item in items]),
            {},
            {
                "max_new_tokens": budget,
                "max_length": config.max_length,
                "checker": config.checker,
            },
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
            raise InputError(f"{folder}: item {item_id!r} occurs twice; each id must be unique")
        if value is None or not math.isfinite(value):
            raise InputError(
                f"{folder}: item {item_id!r} has the score {value}; scores must be finite numbers"
            )
        scores[item_id] = float(value)
    if len(scores) < 2:
        raise InputError(f"{folder}: {len(scores)} items; a comparison needs two or more")
    return scores


def _initial_answers(run: RunDirectory) -> str:
    """Return the hash of θ_0's responses, which the gaps of the run are measured against."""
    files = read_files(run.evaluation(0) / MANIFEST)
    return next(str(f["sha256"]) for f in files if f["path"] == "initial_answers.parquet")


def _why_absent(run: RunDirectory, i: int, suite: str | None) -> str:
    if suite is not None and (removed := run.weights_removed(i)) is not None:
        return f"not evaluated on {suite}, and {removed}; compare another checkpoint"
    if suite is not None:
        return f"not evaluated on {suite}; run: tpaw evaluate {run.root}@{i} --suite {suite}"
    if is_published(run.inputs) and not read_manifest(run.inputs)["heldout_rows"]:
        return (
            "no evaluation: the run has no held-out records (evaluate.data); "
            "use --suite to compare on benchmarks"
        )
    return f"not evaluated yet; resume the run: tpaw run {run.root}"
