"""Load a player on a device, with dropout disabled."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING

from tpaw.config.schema import ModelConfig
from tpaw.errors import ArtifactError, InputError
from tpaw.models.adapters import merged, require_peft, wear
from tpaw.models.fingerprint import weight_files
from tpaw.models.quantization import check_quantization, quantized_loading, use_one_kernel
from tpaw.team import Player

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# Tokens on which training and evaluation mode are compared.
TRIAL_TOKENS = 8
# Largest difference of a logit between the modes, relative to the largest logit. Kernels may round
# differently; a dropout probability of 0.01 gives more.
TRAINING_MODE_TOLERANCE = 1e-3


def load_model(
    player: Player, config: ModelConfig, *, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """Load a player in evaluation mode, with dropout disabled.

    A player that is an adapter is its base with the adapter on top. Without `adapter` and
    `quantization` in the configuration, the adapter is merged into the base, in fp32.

    Args:
        player: the player to load.
        config: the section `model` of the configuration.
        dtype: type of the weights in memory. Those of an adapter are always fp32.
        device: device of the weights.

    Raises:
        InputError: the player's folder does not exist or has no weights, or its pickled weights
            contain more than tensors.
        ArtifactError: some of the model's weights are missing from the folder.
    """
    import torch

    folder = player.adapter_folder
    if folder is None:
        return load_base(player, config, dtype=dtype, device=device)
    require_peft()
    if config.adapter is not None or config.quantization is not None:
        return wear(load_base(player, config, dtype=dtype, device=device), folder)
    model = merged(load_base(player, config, dtype=torch.float32, device=device), folder)
    cast_weights(model, dtype)
    return model


def load_base(
    player: Player, config: ModelConfig, *, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """Load the model of a player without its adapter; see `load_model`."""
    import torch
    from transformers import AutoModelForCausalLM

    for folder in (player.base_folder, player.path):
        if not Path(folder).is_dir():
            raise InputError(
                f"{folder}: the folder does not exist, but θ_{player.index} is needed; restore "
                "it, or for θ_0 set model.path"
            )
        weight_files(Path(folder))  # it says why there are none
    path = player.base_folder
    if config.quantization is not None:
        check_quantization(device)
    quantized = {} if config.quantization is None else quantized_loading(dtype, device)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.float32 if quantized else dtype,
            attn_implementation=config.attn_implementation,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=None if config.allow_pickle else True,
            output_loading_info=True,
            **quantized,
        )
    except pickle.UnpicklingError:  # torch runs no code from it
        raise InputError(
            f"{path}: its pickled weights are damaged, or contain code, which was not run; "
            "use another model"
        ) from None
    # transformers initializes missing weights at random and only warns about it.
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise ArtifactError(
            f"{path}: weights of the model are missing: {missing}; restore the complete model"
        )
    model.to(device)
    if quantized:  # the 4 bits are those of the weights in fp32, whatever the run computes in
        cast_weights(model, dtype)
    model.eval()
    use_one_kernel(model)
    disable_dropout(model)
    return model


def cast_weights(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights of a model in place. Buffers keep their type, as when a model is loaded."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def disable_dropout(model: torch.nn.Module) -> None:
    """Make a model compute in training mode what it computes in evaluation mode, in place.

    A log-ratio compares the log-probs of two forward passes, so a forward pass must not be random.
    Only modules change: the model's configuration is saved with every checkpoint, and it stays the
    user's.

    - A dropout probability becomes 0: that of each Dropout module, and each float attribute whose
      name contains "drop".
    - A router with jitter stays in evaluation mode. Its jitter stays as it is, because PhiMoE's
      router reads it in evaluation mode too: it decides which experts share a token.
    - Some models read a probability from their configuration in every forward pass (Falcon,
      Persimmon). If the modes still differ, the whole model stays in evaluation mode.
      Gradient checkpointing then has no effect.

    Args:
        model: a model of transformers, or one that PEFT has wrapped.
    """
    from torch.nn.modules.dropout import _DropoutNd

    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        floats = [name for name, value in vars(module).items() if isinstance(value, float)]
        for name in floats:
            if "drop" in name:
                setattr(module, name, 0.0)
        if any("jitter" in name for name in floats):
            _keep_in_evaluation_mode(module)
    if _training_mode_differs(model):
        _keep_in_evaluation_mode(model)


def _keep_in_evaluation_mode(module: torch.nn.Module) -> None:
    module.eval()
    # A bound method, so that a deep copy of the model is bound to the copy.
    module.train = MethodType(_unchanged, module)  # type: ignore[method-assign]


def _unchanged(module: torch.nn.Module, mode: bool = True) -> torch.nn.Module:
    """Replaces `Module.train` of one module."""
    return module


def _training_mode_differs(model: torch.nn.Module) -> bool:
    """Compare the logits of a few tokens in both modes. The model is left in the mode it was in."""
    import torch

    if is_sharded(model):
        return False
    was_training, device = model.training, next(model.parameters()).device
    ids = torch.ones((1, TRIAL_TOKENS), dtype=torch.int64, device=device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        trained, evaluated = (
            model.train(mode)(input_ids=ids, use_cache=False).logits.float()
            for mode in (True, False)
        )
    model.train(was_training)
    largest = (trained - evaluated).abs().max()
    return bool(largest > TRAINING_MODE_TOLERANCE * evaluated.abs().max())


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether some weights are elsewhere. Such a model runs only once it is wrapped."""
    from torch.distributed.tensor import DTensor

    return any(
        p.is_meta or isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters()
    )


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
