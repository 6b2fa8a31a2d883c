"""Compute once what the runs of one seed share: inputs, θ_0's responses, log-probs and evaluation.

A shared run directory holds these files; it never trains. Each run begins with hard links to these
files. Stages skip published files, so no other code needs to know about sharing.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from tpaw.config.schema import RunConfig
from tpaw.errors import printable
from tpaw.runtime.interrupt import StopSignal
from tpaw.storage.artifacts import temporary_beside
from tpaw.storage.run_directory import RunDirectory, open_run

# Settings that affect the work before the first training.
_DECISIVE: Any = {
    "model": True,
    "data": True,
    "max_length": True,
    "generate": True,
    "score": True,
    "evaluate": True,
    "checker": True,
    "train": {"weights"},  # decides the precision of the weights when players are scored
    "seed": True,
    "precision": True,
    "device": True,
    "deterministic": True,
}


def shared_name(config: RunConfig) -> str:
    """Return the name of the shared run directory. Configurations with the same name share it."""
    decisive = config.model_dump(mode="json", include=_DECISIVE)
    decisive["pairs"] = config.method == "dpo"  # the inputs of DPO also hold rejected responses
    text = json.dumps(decisive, sort_keys=True)
    return f"seed-{config.seed}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def begin_shared(config: RunConfig, folder: Path) -> None:
    """Create the shared run directory, for `prepare_shared`.

    Args:
        config: the configuration of a run that shares the directory.
        folder: the shared run directory.

    Raises:
        RunLockedError: another process works on it.
    """
    run = RunDirectory(folder)
    # An existing directory may have the configuration of another run. Its decisive settings are
    # equal, so keep it.
    with open_run(folder, run.load_config() if run.has_begun() else config):
        pass


def is_prepared(folder: Path) -> bool:
    """Whether `prepare_shared` has finished."""
    return (folder / "prepared").exists()


def prepare_shared(folder: Path, stop: StopSignal) -> None:
    """Do all work before the first training: generate, evaluate and score with θ_0.

    Args:
        folder: the shared run directory; see `begin_shared`.
        stop: tells whether the user asked for a stop.

    Raises:
        Interrupted: the user asked for a stop; published files stay.
    """
    from tpaw.pipeline.stages import opened_stages

    config = RunDirectory(folder).load_config()
    with opened_stages(config, folder, stop) as stages:
        examples = stages.load_examples()
        start = stages.initial_player()
        stages.evaluate(start)
        if config.generates:
            stages.generate(start, examples, 0)
        if config.method == "self_play":
            # All responses: those that an objective keeps differ between the runs that share.
            stages.score(stages.published.triples(examples, [start]), [start], 0)
    (folder / "prepared").touch()


def begin_run(config: RunConfig, output: Path, shared: Path, name: str) -> None:
    """Create a run directory with links to the shared files.

    A run whose training has begun is not changed.

    Args:
        config: the run's configuration.
        output: the run directory.
        shared: the shared run directory.
        name: of the run, for people.

    Raises:
        InputError: `output` holds a run of another configuration.
        RunLockedError: another process works on the run.
    """
    with open_run(output, config, printable(name)) as run:
        if run.iterations_begun() > 0:
            return
        source = RunDirectory(shared)
        folders = [source.inputs, source.initial_player_file.parent, source.evaluation(0)]
        folders += [source.responses(1), *sorted((shared / "logprobs").glob("*"))]
        folders += sorted(source.suites(0).glob("*"))
        for folder in folders:
            target = run.root / folder.relative_to(shared)
            if folder.exists() and not target.exists():
                _link_folder(folder, target)


def _link_folder(folder: Path, target: Path) -> None:
    temporary = temporary_beside(target)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = temporary / path.relative_to(folder)
        name.parent.mkdir(parents=True, exist_ok=True)
        # A hard link is safe: published files are only replaced, never changed in place.
        try:
            os.link(path, name)
        except OSError:  # the file system has no hard links
            shutil.copy2(path, name)
    os.replace(temporary, target)
