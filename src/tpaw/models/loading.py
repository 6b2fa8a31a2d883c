"""Load a player on a device, with dropout disabled."""

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
    """Load a player in evaluation mode, with dropout disabled.

    Args:
        player: the player to load.
        config: the section `model` of the configuration.
        dtype: type of the weights in memory.
        device: device of the weights.

    Raises:
        InputError: the player's folder does not exist.
        ArtifactError: some of the model's weights are missing from the folder.
    """
    from transformers import AutoModelForCausalLM

    if not Path(player.path).is_dir():
        raise InputError(
            f"{player.path}: the folder does not exist, but θ_{player.index} is needed; restore "
            "it, or for θ_0 set model.path"
        )
    model, report = AutoModelForCausalLM.from_pretrained(
        player.path,
        dtype=dtype,
        attn_implementation=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
        use_safetensors=None if config.allow_pickle else True,
        output_loading_info=True,
    )
    # transformers initializes missing weights at random and only warns about it.
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise ArtifactError(
            f"{player.path}: weights of the model are missing: {missing}; restore the complete "
            "model"
        )
    disable_dropout(model)
    model.to(device)
    model.eval()
    return model


def disable_dropout(model: torch.nn.Module) -> None:
    """Set every dropout probability and router jitter to 0, in place.

    A log-ratio compares the log-probs of two forward passes, so a forward pass must not be random.
    Some models store a probability as a float attribute instead of a Dropout module. This function
    sets every float attribute whose name contains "drop" or "jitter" to 0, in the modules and in
    the model's configuration.
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
    """The torch device for the setting `device`.

    Args:
        setting: auto, cpu or cuda.

    Raises:
        InputError: the setting is cuda, but torch sees no CUDA device.
    """
    import torch

    if setting == "cuda" and not torch.cuda.is_available():
        raise InputError("device: cuda: torch sees no CUDA device; set device to auto or cpu")
    use_cuda = setting == "cuda" or (setting == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if use_cuda else "cpu")
