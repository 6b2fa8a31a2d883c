"""What the processes of a Ray cluster do beside their work, for tests; the cluster imports it."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import tpaw.pipeline.ray_group


def run_fsdp_group(facts, settings, *others):
    """The group, with FSDP2 switched on for CPUs. What was seen is written into a folder."""
    tpaw.pipeline.ray_group._train_in_group = train_by_fsdp
    try:
        tpaw.pipeline.ray_group.run_group(settings | {"facts": facts}, *others)
    finally:  # Ray gives this process other work later
        tpaw.pipeline.ray_group._train_in_group = ORIGINAL


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
        (folder / f"rank-{rank}.json").write_text(json.dumps(facts))
        if rank == 1 and state.global_step == 2 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return step_end(self, args, state, control, model=model, **kwargs)

    tpaw.training.iteration.training_arguments = arguments_for_cpus
    Recorder.on_step_end = noting
    ORIGINAL(settings)


ORIGINAL = tpaw.pipeline.ray_group._train_in_group
