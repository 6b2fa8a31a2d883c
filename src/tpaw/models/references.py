"""What a command line calls a checkpoint.

RUN       the newest checkpoint of a run directory
RUN@3     its θ_3; RUN@0 is the SFT model
MODEL     a model: a folder, a hub id, or tpaw://starter/model
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from tpaw.config.schema import ModelConfig
from tpaw.errors import InputError
from tpaw.models.fingerprint import fingerprint
from tpaw.models.initial import initial_player, locate
from tpaw.storage.artifacts import is_published, read_manifest
from tpaw.storage.run_directory import RunDirectory
from tpaw.team import Player


class Checkpoint(NamedTuple):
    """A player, and how to load it.

    Attributes:
        name: for people: the run's or the model's name, and @i in a run.
        player: where its weights are, and their fingerprint.
        model: of the run's configuration, or the defaults; `path` is that of θ_0 in a run.
        run: the run it belongs to, if any.
        tokenizer_folder: the tokenizer that goes with it.
    """

    name: str
    player: Player
    model: ModelConfig
    run: RunDirectory | None
    tokenizer_folder: str


def find_checkpoint(reference: str) -> Checkpoint:
    """The checkpoint that a reference names.

    Raises:
        InputError: there is none of that name.
    """
    if (found := find_in_run(reference)) is not None:
        return _of_run(*found)
    if Path(reference).is_dir() and not (Path(reference) / "config.json").is_file():
        raise InputError(f"{reference}: neither a run directory (run.json) nor a model's folder")
    model = ModelConfig(path=reference)
    try:
        path, _ = locate(model, None)
    except (OSError, ValueError) as error:  # what the hub's client raises
        raise InputError(f"{reference}: neither here nor on the hub: {error}") from None
    player = Player(0, str(path), fingerprint(path))
    name = Path(reference).name  # of a hub id too, whose folder is called by its commit
    return Checkpoint(name, player, model, None, str(path))


def find_checkpoints(reference: str) -> list[Checkpoint]:
    """Every checkpoint of a run, θ_0 first; or the one that the reference names."""
    run = RunDirectory(reference)
    if run.has_begun():
        return [_of_run(run, i) for i in _published(run)]
    return [find_checkpoint(reference)]


def find_in_run(reference: str) -> tuple[RunDirectory, int] | None:
    """The run and the iteration that a reference names; None where it names no run.

    Raises:
        InputError: the run has no such checkpoint.
    """
    folder, at, number = reference.rpartition("@")
    if at and re.fullmatch(r"\d+", number) and RunDirectory(folder).has_begun():
        run, i = RunDirectory(folder), int(number)
        if i not in (published := _published(run)):
            there = ", ".join(f"@{j}" for j in published)
            raise InputError(f"{run.root}@{i}: not there (or not finished); there are {there}")
        return run, i
    run = RunDirectory(reference)
    return (run, _published(run)[-1]) if run.has_begun() else None


def _of_run(run: RunDirectory, i: int) -> Checkpoint:
    model = run.load_config().model
    name = f"{run.root.name}@{i}"
    if i == 0:
        player = initial_player(model, run.initial_player_file)
    else:
        folder = run.checkpoint(i)
        player = Player(i, str(folder), read_manifest(folder)["fingerprint"])
    return Checkpoint(name, player, model, run, str(run.inputs / "tokenizer"))


def _published(run: RunDirectory) -> list[int]:
    iterations = run.load_config().iterations
    return [0, *(i for i in range(1, iterations + 1) if is_published(run.checkpoint(i)))]
