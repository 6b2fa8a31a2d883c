"""Find the checkpoint that a reference on the command line names.

RUN       the newest checkpoint of a run directory
RUN@3     θ_3 of the run; RUN@0 is the SFT model
MODEL     a model: a folder, a Hub id, or tpaw://starter/model
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tpaw.config.schema import ModelConfig
from tpaw.errors import InputError
from tpaw.models.adapter_files import (
    read_adapter_config,
    recorded_facts,
    refuse_another_base,
    settings_of,
)
from tpaw.models.fingerprint import ADAPTER_CONFIG, adapter_fingerprint, fingerprint
from tpaw.models.initial import find_base, initial_player, locate
from tpaw.models.tokenizers import load_tokenizer, stop_token_ids
from tpaw.storage.artifacts import is_published, read_manifest
from tpaw.storage.run_directory import RunDirectory, refuse_untrusted_code
from tpaw.team import Player

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Checkpoint(NamedTuple):
    """A player and how to load it.

    Attributes:
        name: name for display: RUN@i, or the name of the model.
        player: folder and fingerprint of the model.
        model: the section `model` of the run's configuration (its `path` is θ_0), or the defaults
            for a model without a run.
        run: the run that made the checkpoint, or None.
        tokenizer_folder: folder of the tokenizer.
    """

    name: str
    player: Player
    model: ModelConfig
    run: RunDirectory | None
    tokenizer_folder: str


def find_checkpoint(reference: str, *, trust: bool = False) -> Checkpoint:
    """Find one checkpoint, to load it.

    Args:
        reference: RUN, RUN@i or MODEL.
        trust: whether a run may ask for `model.trust_remote_code`.

    Raises:
        InputError: the reference names no checkpoint, its weights were removed, or its run asks for
            code without `trust`.
    """
    if (found := find_in_run(reference)) is not None:
        run, i = found
        if (removed := run.weights_removed(i)) is not None:
            whole = ", ".join(f"@{j}" for j in _published(run) if not run.weights_removed(j))
            raise InputError(
                f"{run.root}@{i}: {removed}; its responses, log-probs and evaluations are kept; "
                f"checkpoints with weights: {whole}"
            )
        return checkpoint_of(run, i, trust=trust)
    names = ("config.json", ADAPTER_CONFIG)
    if Path(reference).is_dir() and not any((Path(reference) / n).is_file() for n in names):
        raise InputError(
            f"{reference}: neither a run directory (no run.json) nor a model folder (no "
            "config.json)"
        )
    model = ModelConfig(path=reference)
    try:
        path, _ = locate(model, None)
        base = find_base(model, None, None)
    except (OSError, ValueError) as error:  # the Hub's client raises both
        raise InputError(
            f"{reference}: neither a local folder nor a model on the Hub: {error}"
        ) from None
    player, tokenizer = Player(0, str(path), fingerprint(path)), str(path)
    if base is not None:
        refuse_another_base(path, base.fingerprint, base.name)
        player = Player(0, str(path), adapter_fingerprint(base.fingerprint, path), base)
        # As the run that made it loads it.
        settings = settings_of(path, read_adapter_config(model) or {})
        quantization = recorded_facts(path).get("quantization") if settings else None
        model = model.model_copy(update={"adapter": settings, "quantization": quantization})
        if not (path / "tokenizer_config.json").is_file():
            tokenizer = base.path
    name = Path(reference).name  # the folder of a Hub model is named after its commit
    return Checkpoint(name, player, model, None, tokenizer)


def find_checkpoints(reference: str, *, trust: bool = False) -> list[Checkpoint]:
    """Find every checkpoint of a run, or one checkpoint.

    Args:
        reference: RUN for all its published checkpoints (θ_0 first), or RUN@i or MODEL for one.
            The weights of a run's checkpoint may be removed.
        trust: whether a run may ask for `model.trust_remote_code`.

    Raises:
        InputError: the reference names no checkpoint, or its run asks for code without `trust`.
    """
    run = RunDirectory(reference)
    if run.has_begun():
        return [checkpoint_of(run, i, trust=trust) for i in _published(run)]
    if (found := find_in_run(reference)) is not None:
        return [checkpoint_of(*found, trust=trust)]
    return [find_checkpoint(reference, trust=trust)]


def find_in_run(reference: str) -> tuple[RunDirectory, int] | None:
    """Find the run and the checkpoint index that a reference names.

    Args:
        reference: RUN, RUN@i or anything else.

    Returns:
        The run and i of θ_i, or None if the reference does not name a run.

    Raises:
        InputError: the run exists, but has no published θ_i.
    """
    folder, at, number = reference.rpartition("@")
    if at and re.fullmatch(r"\d+", number) and RunDirectory(folder).has_begun():
        run, i = RunDirectory(folder), int(number)
        if i not in (published := _published(run)):
            available = ", ".join(f"@{j}" for j in published)
            raise InputError(
                f"{run.root}@{i}: θ_{i} is not published in this run; available: {available}"
            )
        return run, i
    run = RunDirectory(reference)
    return (run, _published(run)[-1]) if run.has_begun() else None


def checkpoint_of(run: RunDirectory, i: int, *, trust: bool) -> Checkpoint:
    """Return θ_i of a run.

    Args:
        run: a run that has published θ_i.
        i: index of the checkpoint.
        trust: whether the run may ask for `model.trust_remote_code`.

    Raises:
        InputError: the run asks for code without `trust`.
    """
    model = run.load_config().model
    refuse_untrusted_code(model, run, trust=trust)
    name = f"{run.root.name}@{i}"
    base = None
    if i == 0 or model.adapter is not None:  # whose base is that of θ_0
        may_record = not run.uses_initial_player()
        player = initial_player(model, run.initial_player_file, may_record=may_record)
        base = player.base
    if i > 0:
        folder = run.checkpoint(i)
        player = Player(i, str(folder), read_manifest(folder)["fingerprint"], base)
    return Checkpoint(name, player, model, run, str(run.inputs / "tokenizer"))


def tokenizer_of(
    checkpoint: Checkpoint, model: ModelConfig
) -> tuple[PreTrainedTokenizerBase, tuple[int, ...]]:
    """Load the tokenizer of a checkpoint, with its stop tokens. Those of a run are in the run.

    Args:
        checkpoint: the checkpoint.
        model: the section `model` that it is used with.

    Returns:
        The tokenizer, and the token ids that end a response.

    Raises:
        InputError: there is no usable tokenizer, or no token that ends a response.
    """
    tokenizer = load_tokenizer(model, checkpoint.tokenizer_folder)
    if checkpoint.run is None:
        stop_ids = stop_token_ids(model, tokenizer)
    else:
        stop_ids = tuple(read_manifest(checkpoint.run.inputs)["stop_ids"])
    tokenizer.eos_token_id = stop_ids[0]
    return tokenizer, stop_ids


def _published(run: RunDirectory) -> list[int]:
    iterations = run.load_config().iterations
    return [0, *(i for i in range(1, iterations + 1) if is_published(run.checkpoint(i)))]
