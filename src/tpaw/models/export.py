"""Write a checkpoint as a folder for other programs: an ordinary model, or an adapter."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tpaw.errors import InputError
from tpaw.models.adapter_files import ADAPTER_WEIGHTS
from tpaw.models.adapters import merged, require_peft
from tpaw.models.loading import cast_weights, load_base
from tpaw.models.references import Checkpoint
from tpaw.models.tokenizers import load_tokenizer
from tpaw.storage.artifacts import MANIFEST, flush, is_published, temporary_beside, verify
from tpaw.storage.failures import require_space

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Dtype = Literal["fp32", "bf16", "fp16"]
MODEL_CARD = "README.md"
_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_GENERATION = "generation_config.json"


def export(
    checkpoint: Checkpoint, output: Path, dtype: Dtype, *, merge: bool, card: str | None = None
) -> None:
    """Write a checkpoint into a new folder, which is whole or absent.

    Args:
        checkpoint: the player, and how to load it.
        output: the folder. It must not exist, or be empty.
        dtype: of the weights that are written.
        merge: write an adapter as an ordinary model: its base with the adapter added to the
            weights, computed in fp32. A 4-bit base is dequantised, because the adapter was trained
            on it as it is. Without it, an adapter is written as an adapter.
        card: a model card, which is written as README.md.

    Raises:
        InputError: the folder has files.
        ArtifactError: the checkpoint is damaged.
        StorageError: the disk is too full.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"--output {output}: it exists already; choose a new or an empty folder")
    source = Path(checkpoint.player.path)
    if is_published(source):
        verify(source / MANIFEST)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(output)
    temporary.mkdir()
    try:
        if checkpoint.player.adapter_folder is not None and not merge:
            _write_adapter(source, temporary, dtype)
        else:
            _write_model(checkpoint, temporary, dtype)
        if card is not None:
            (temporary / MODEL_CARD).write_text(card, encoding="utf-8")
        for path in temporary.rglob("*"):
            flush(path)
        os.replace(temporary, output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    flush(output.parent)


def _write_adapter(source: Path, folder: Path, dtype: Dtype) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    for path in source.iterdir():
        if path.is_file() and path.name not in (MANIFEST, ADAPTER_WEIGHTS):
            shutil.copyfile(path, folder / path.name)
    wanted = getattr(torch, _NAMES[dtype])
    weights = {name: w.to(wanted) for name, w in load_file(source / ADAPTER_WEIGHTS).items()}
    save_file(weights, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def _write_model(checkpoint: Checkpoint, folder: Path, dtype: Dtype) -> None:
    import torch
    from transformers import GenerationConfig

    model, wanted = _whole(checkpoint), getattr(torch, _NAMES[dtype])
    size = sum(parameter.numel() for parameter in model.parameters()) * wanted.itemsize
    require_space(folder.parent, size, f"exporting {checkpoint.name}")
    cast_weights(model, wanted)
    model.generation_config = GenerationConfig()  # transformers refuses to save some
    model.save_pretrained(folder)
    load_tokenizer(checkpoint.model, checkpoint.tokenizer_folder).save_pretrained(folder)
    player = checkpoint.player
    homes = (Path(home) / _GENERATION for home in (player.path, player.base_folder))
    published = next((path for path in homes if path.is_file()), None)
    (folder / _GENERATION).unlink(missing_ok=True)
    if published is not None:
        shutil.copyfile(published, folder / _GENERATION)


def _whole(checkpoint: Checkpoint) -> PreTrainedModel:
    """The player in fp32 on the CPU, as one model without an adapter."""
    import torch

    player = checkpoint.player
    cpu = torch.device("cpu")
    model = load_base(player, checkpoint.model, dtype=torch.float32, device=cpu)
    if checkpoint.model.quantization is not None:
        model = model.dequantize()
    if player.adapter_folder is None:
        return model
    require_peft()
    return merged(model, player.adapter_folder)
