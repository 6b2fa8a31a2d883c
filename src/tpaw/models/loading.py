"""A player in memory: its device, and no dropout."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tpaw.config.schema import ModelConfig
from tpaw.errors import ArtifactError, InputError
from tpaw.team import Player

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def load_model(
    player: Player, config: ModelConfig, *, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """Load a player, without dropout, in evaluation mode.

    Raises:
        InputError: the folder is not there.
        ArtifactError: the folder lacks some of the model's weights.
    """
    from transformers import AutoModelForCausalLM

    if not Path(player.path).is_dir():
        raise InputError(f"{player.path}: not there, but θ_{player.index} is needed")
    model, report = AutoModelForCausalLM.from_pretrained(
        player.path,
        dtype=dtype,
        attn_implementation=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
        output_loading_info=True,
    )
    # transformers fills absent weights with random ones, and says so in a warning only.
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise ArtifactError(f"{player.path}: lacks weights of the model: {missing}")
    disable_dropout(model)
    model.to(device)
    model.eval()
    return model


def disable_dropout(model: torch.nn.Module) -> None:
    """Set every dropout to 0: a log-ratio compares two forward passes, which must agree.

    Some models drop by way of a float that a function reads, and mixtures of experts may jitter
    their router; names are all that these have in common.
    """
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for holder in (*model.modules(), getattr(model, "config", None)):
        for name, value in list(vars(holder).items() if holder is not None else ()):
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(holder, name, 0.0)


def pick_device(setting: str) -> torch.device:
    """The device that `device:` asks for.

    Raises:
        InputError: cuda is asked for and not there.
    """
    import torch

    if setting == "cuda" and not torch.cuda.is_available():
        raise InputError("device: 'cuda' is not there; torch sees no CUDA device")
    use_cuda = setting == "cuda" or (setting == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if use_cuda else "cpu")
