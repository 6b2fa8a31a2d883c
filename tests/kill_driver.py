"""Runs a configuration in child processes, each killed with SIGKILL at a chosen point.

Called by a fork server with CONFIG OUTPUT POINT...

A point is PLACE:N, the Nth time that the child comes by the place. After the last point a child
runs to the end. Prints one line a child: "killed", or "exit CODE".
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers

import tpaw.evaluation.heldout
import tpaw.pipeline.critic_task
import tpaw.scoring.score
import tpaw.storage.removal
import tpaw.training.callbacks
from tpaw.config.schema import RunConfig
from tpaw.generation.slot_cache import SlotCache
from tpaw.selfplay import self_play
from tpaw.training.trainer import TeamTrainer

PLACES: dict[str, tuple[Any, str]] = {
    "publish": (os, "replace"),  # every publication is a rename: just before it
    "published": (os, "replace"),  # and just after it
    "generate": (SlotCache, "step"),  # a token for every row
    "score": (tpaw.scoring.score, "response_logps"),
    "train": (TeamTrainer, "compute_loss"),
    "step": (transformers.Trainer, "training_step"),  # of a trainer that is not ours
    "save": (transformers.Trainer, "_save_optimizer_and_scheduler"),
    "saved": (tpaw.training.callbacks, "write_manifest"),
    "judge": (tpaw.pipeline.critic_task, "scores_of"),
    "evaluate": (tpaw.evaluation.heldout, "exact_match_items"),
    "withdraw": (
        tpaw.storage.removal,
        "write_sealed",
    ),  # weights are removed: just before it counts
    "withdrawn": (tpaw.storage.removal, "write_sealed"),  # it counts, and the files are there
    "removed": (tpaw.storage.removal, "flush"),  # the files are gone
}
AFTER = ("published", "withdrawn")


def kill_at(place: str, count: int) -> None:
    owner, name = PLACES[place]
    original: Callable[..., Any] = getattr(owner, name)
    left = count

    def passing(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0 and place not in AFTER:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, passing)


def main() -> None:
    config_path, output, *points = sys.argv[1:]
    config = RunConfig.load(config_path)
    for point in [*points, ""]:
        # Nothing was computed in this process, so no thread pool is there to be lost in the fork.
        child = os.fork()
        if child == 0:
            if point:
                place, _, count = point.partition(":")
                kill_at(place, int(count))
            try:
                self_play(config, output)
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        print("killed" if killed else f"exit {os.waitstatus_to_exitcode(status)}", flush=True)


def evaluate_one_task() -> None:
    """Evaluate MODEL on SUITE into FOLDER; killed when the second task begins."""
    import tpaw.evaluation.benchmarks.harness as harness
    from tpaw.evaluation.benchmarks.run import evaluate_suite

    run_task, seen = harness.run_task, []

    def run_one(model: Any, task: Any, **options: Any) -> Any:
        if seen:
            os.kill(os.getpid(), signal.SIGKILL)
        seen.append(task)
        return run_task(model, task, **options)

    harness.run_task = run_one
    model, suite, folder = sys.argv[1:]
    evaluate_suite(model, suite, trust=True, output=Path(folder))
