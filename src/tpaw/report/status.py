"""What is done in a run directory, and what is next."""

from __future__ import annotations

from tpaw.config.schema import RunConfig
from tpaw.storage.artifacts import PARTIAL_MANIFEST, is_published, read_json, read_manifest
from tpaw.storage.run_directory import RunDirectory


def done_and_next(run: RunDirectory, config: RunConfig) -> tuple[list[str], str | None]:
    """Lines on what is published, and the stage that comes next (None: all done)."""
    done: list[str] = []
    upcoming: str | None = None
    has_heldout = is_published(run.inputs) and read_manifest(run.inputs)["heldout_rows"] > 0
    for i in range(config.iterations + 1):
        for stage, is_done, note in _stages(run, i, config.method, has_heldout):
            if is_done and upcoming is None:
                done.append(stage)
            elif upcoming is None:
                upcoming = stage + note
    return done, upcoming


def _stages(
    run: RunDirectory, i: int, method: str, has_heldout: bool
) -> list[tuple[str, bool, str]]:
    stages = []
    if i > 0:
        trained = is_published(run.checkpoint(i))
        if method == "self_play":
            answered = is_published(run.responses(i))
            stages.append((f"θ_{i - 1} answers the prompts", answered, _shards_note(run, i)))
        what = "train" if method == "sft" else "score and train"
        stages.append((f"{what} θ_{i}", trained, _steps_note(run, i)))
    if has_heldout:
        stages.append((f"evaluate θ_{i}", is_published(run.evaluation(i)), ""))
    return stages


def _shards_note(run: RunDirectory, i: int) -> str:
    partial = run.responses(i) / PARTIAL_MANIFEST
    if not partial.exists():
        return ""
    shards = read_json(partial)["files"]
    return f" ({sum(shard['rows'] for shard in shards)} done)"


def _steps_note(run: RunDirectory, i: int) -> str:
    saved = run.last_saved_step(i)
    return f" (from saved step {saved.name.rpartition('-')[2]})" if saved else ""
