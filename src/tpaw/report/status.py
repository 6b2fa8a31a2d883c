"""The state of a run: which stages are finished, and which one is next."""

from __future__ import annotations

import contextlib
import json
import shlex

from tpaw.config.schema import RunConfig
from tpaw.report.alarms import is_worse
from tpaw.storage.artifacts import (
    PARTIAL_MANIFEST,
    is_published,
    read_files,
    read_listed_json,
    read_manifest,
)
from tpaw.storage.run_directory import RunDirectory


def done_and_next(run: RunDirectory, config: RunConfig) -> tuple[list[str], str | None]:
    """List the stages of a run.

    Args:
        run: the run directory.
        config: the run's configuration.

    Returns:
        The names of the finished stages, and the name of the next stage with its progress so far.
        The next stage is None if all are finished.
    """
    done: list[str] = []
    upcoming: str | None = None
    has_heldout = is_published(run.inputs) and read_manifest(run.inputs)["heldout_rows"] > 0
    for i in range(config.iterations + 1):
        for stage, is_done, note in _stages(run, i, config, has_heldout):
            if is_done and upcoming is None:
                done.append(stage)
            elif upcoming is None:
                upcoming = stage + note
    if upcoming is not None and ended_early(run, config) is not None:
        upcoming = None
    return done, upcoming


def ended_early(run: RunDirectory, config: RunConfig) -> str | None:
    """Why a run goes no further than its newest checkpoint; None if it does."""
    published = [i for i in range(config.iterations + 1) if is_published(run.checkpoint(i))]
    newest = max(published, default=0)
    if not config.evaluate.stop_when_worse or not 0 < newest < config.iterations:
        return None
    if not is_published(run.evaluation(newest)):
        return None
    found = read_listed_json(run.evaluation(newest), "results.json").get("exact_match")
    if found is None or not is_worse(found):
        return None
    return (
        f"The run ended after iteration {newest} of {config.iterations}: θ_{newest} is worse than "
        "θ_0 (evaluate.stop_when_worse). To go on: "
        f"tpaw run {shlex.quote(str(run.root))} --set evaluate.stop_when_worse=false"
    )


def _stages(
    run: RunDirectory, i: int, config: RunConfig, has_heldout: bool
) -> list[tuple[str, bool, str]]:
    """Return name, state and progress note of each stage of iteration i."""
    position = f"[{i}/{config.iterations}]"
    stages = []
    if i > 0:
        trained = is_published(run.checkpoint(i))
        if config.generates:
            generated = is_published(run.responses(i))
            name = f"{position} generate with θ_{i - 1}"
            stages.append((name, generated, _shards_note(run, i)))
        if config.method == "critic":
            name = f"{position} fit the critic"
            stages.append((name, is_published(run.iteration(i - 1).critic), ""))
        what = "train" if config.trains_by_sft else "score and train"
        stages.append((f"{position} {what} θ_{i}", trained, _steps_note(run, i)))
    if has_heldout:
        stages.append((f"{position} evaluate θ_{i}", is_published(run.evaluation(i)), ""))
    return stages


def _shards_note(run: RunDirectory, i: int) -> str:
    partial = run.responses(i) / PARTIAL_MANIFEST
    if not partial.exists():
        return ""
    return f" ({sum(shard['rows'] for shard in read_files(partial))} prompts done)"


def _steps_note(run: RunDirectory, i: int) -> str:
    """The last step that was logged, and the one that a stopped run would go on from."""
    saved = run.last_saved_step(i)
    notes = [f"from saved step {saved.name.rpartition('-')[2]}"] if saved else []
    with contextlib.suppress(OSError, ValueError, IndexError, KeyError, TypeError):
        lines = run.training_log(i).read_text(encoding="utf-8").splitlines()
        notes.insert(0, f"step {json.loads(lines[-1])['step']}")
    return f" ({', '.join(notes)})" if notes else ""
