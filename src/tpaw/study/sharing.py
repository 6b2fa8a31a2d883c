"""What the runs of one seed have in common is computed once: inputs, θ_0's answers and scores.

It lies in a run directory of its own, which never trains. A run begins by linking to it; stages
skip what is published, so nothing else knows of this.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from tpaw.config.schema import RunConfig
from tpaw.runtime.interrupt import StopSignal
from tpaw.storage.artifacts import TEMPORARY_PREFIX, remove_temporaries
from tpaw.storage.run_directory import RunDirectory, open_run

# Settings that have a say before the first training.
_DECISIVE: Any = {
    "model": True,
    "data": True,
    "max_length": True,
    "generate": True,
    "score": True,
    "evaluate": True,
    "train": {"weights"},  # players are scored with them
    "seed": True,
    "precision": True,
    "device": True,
    "deterministic": True,
}


def shared_name(config: RunConfig) -> str:
    """Configurations with the same name share; it is a folder's."""
    decisive = config.model_dump(mode="json", include=_DECISIVE)
    decisive["pairs"] = config.method == "dpo"  # whose inputs hold both answers
    text = json.dumps(decisive, sort_keys=True)
    return f"seed-{config.seed}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def begin_shared(config: RunConfig, folder: Path) -> None:
    """Make the run directory of what is shared, for `prepare_shared`.

    Raises:
        RunLockedError: another process is about it.
    """
    run = RunDirectory(folder)
    # Whoever began it, all who share it agree in what matters here.
    with open_run(folder, run.load_config() if run.has_begun() else config):
        pass


def is_prepared(folder: Path) -> bool:
    """Whether `prepare_shared` has come to its end."""
    return (folder / "prepared").exists()


def prepare_shared(folder: Path, stop: StopSignal) -> None:
    """Do all that comes before the first training."""
    from tpaw.pipeline.stages import opened_stages

    config = RunDirectory(folder).load_config()
    with opened_stages(config, folder, stop) as stages:
        examples = stages.load_examples()
        start = stages.initial_player()
        stages.evaluate(start)
        if config.method == "self_play":
            stages.generate(start, examples, 0)
            stages.score(stages.build_triples(examples, [start]), [start], 0)
    (folder / "prepared").touch()


def begin_run(config: RunConfig, output: Path, shared: Path) -> None:
    """Begin a run with links to what is shared; one that trains already is left alone.

    Raises:
        InputError: `output` holds a run of another configuration.
        RunLockedError: another process works on it.
    """
    with open_run(output, config) as run:
        if run.iterations_begun() > 0:
            return
        source = RunDirectory(shared)
        folders = [source.inputs, source.initial_player_file.parent, source.evaluation(0)]
        folders += [source.responses(1), *sorted((shared / "logprobs").glob("*"))]
        for folder in folders:
            target = run.root / folder.relative_to(shared)
            if folder.exists() and not target.exists():
                _link_folder(folder, target)
        remove_temporaries(run.root)


def _link_folder(folder: Path, target: Path) -> None:
    temporary = target.with_name(TEMPORARY_PREFIX + target.name)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = temporary / path.relative_to(folder)
        name.parent.mkdir(parents=True, exist_ok=True)
        # Published files are replaced and never written to, so one may have two names.
        try:
            os.link(path, name)
        except OSError:  # a file system without links
            shutil.copy2(path, name)
    os.replace(temporary, target)
