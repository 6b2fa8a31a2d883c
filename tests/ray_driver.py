"""What the processes of a Ray cluster do beside their work, for tests; the cluster imports it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from pathlib import Path
from typing import NamedTuple

import tpaw.pipeline.ray_group


def run_fsdp_group(facts, settings, *others):
    """The group, with FSDP2 switched on for CPUs. What was seen is written into a folder."""
    tpaw.pipeline.ray_group._train_in_group = train_by_fsdp
    try:
        tpaw.pipeline.ray_group.run_group(settings | {"facts": facts}, *others)
    finally:  # Ray gives this process other work later
        tpaw.pipeline.ray_group._train_in_group = ORIGINAL


def run_failing_group(*arguments):
    """The group, whose processes fail for a reason that nobody has foreseen."""
    tpaw.pipeline.ray_group._train_in_group = train_and_fail
    try:
        tpaw.pipeline.ray_group.run_group(*arguments)
    finally:
        tpaw.pipeline.ray_group._train_in_group = ORIGINAL


def train_and_fail(settings):
    import tpaw.pipeline.training

    tpaw.pipeline.training.train_and_publish = lambda *others: 1 / 0
    ORIGINAL(settings)


class FailingTask(NamedTuple):
    """A bug."""

    @contextlib.contextmanager
    def opened(self, holder):
        yield lambda shard, on_done: shard / 0

    def title(self, shard):
        return f"shard {shard}"


class DyingTask(NamedTuple):
    """The process that does a shard dies once at each shard. Results are ten times the shard."""

    folder: str

    @contextlib.contextmanager
    def opened(self, holder):
        def do(shard, on_done):
            mark = Path(self.folder, f"died-{shard}")
            if not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return 10 * shard

        yield do

    def title(self, shard):
        return f"shard {shard}"


class BrokenWorker:
    """A worker on a machine that lacks a package."""

    def __init__(self):
        import nowhere  # noqa: F401

    def ready(self):
        """Answer."""


def train_by_fsdp(settings):
    """Train as Ray Train asks for. Process 1 is killed once, after the first saved step."""
    import torch.distributed
    from distributed_driver import turn_fsdp_on

    import tpaw.training.iteration
    from tpaw.training.callbacks import Recorder

    folder = Path(settings["facts"])
    build, step_end = tpaw.training.iteration.training_arguments, Recorder.on_step_end

    def arguments_for_cpus(*args):
        arguments = build(*args)
        turn_fsdp_on(arguments)
        return arguments

    def noting(self, args, state, control, model=None, **kwargs):
        rank, mark = torch.distributed.get_rank(), folder / "killed"
        kinds = sorted({type(p.data).__name__ for p in model.parameters()})
        saved = [path.name for path in self.saved_steps.rglob("*.distcp")]
        facts = {"kinds": kinds, "saved": saved, "step": state.global_step}
        with (folder / f"rank-{rank}.jsonl").open("a") as file:
            file.write(json.dumps(facts) + "\n")
        if rank == 1 and state.global_step == 2 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return step_end(self, args, state, control, model=model, **kwargs)

    tpaw.training.iteration.training_arguments = arguments_for_cpus
    Recorder.on_step_end = noting
    ORIGINAL(settings)


ORIGINAL = tpaw.pipeline.ray_group._train_in_group
