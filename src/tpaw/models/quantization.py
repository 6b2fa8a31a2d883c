"""Bases in 4 bits (QLoRA), by bitsandbytes. Generation, scoring and training use the same one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tpaw.errors import InputError, first_line

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def require_bitsandbytes() -> None:
    """Refuse 4-bit weights without bitsandbytes. Nothing is imported: bitsandbytes would use a GPU.

    Raises:
        InputError: bitsandbytes is missing or too old.
    """
    from transformers.utils.versions import require_version

    try:
        require_version("bitsandbytes>=0.50")
    except ImportError as error:
        raise _needs_bitsandbytes(error) from None


def check_quantization(device: torch.device) -> None:
    """Refuse 4-bit weights where bitsandbytes cannot compute with them, by a small trial.

    Args:
        device: of the model.

    Raises:
        InputError: bitsandbytes is missing, too old, or fails on the device.
    """
    import torch

    key = "model.quantization: nf4"
    require_bitsandbytes()
    try:
        import bitsandbytes.functional as bnb
    except (ImportError, RuntimeError, OSError) as error:  # its libraries may not load
        raise _needs_bitsandbytes(error) from None
    weight = torch.ones(64, 64, device=device)
    try:
        packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        is_right = torch.equal(bnb.dequantize_4bit(packed, state), weight)
    except (RuntimeError, ValueError, NotImplementedError, AttributeError) as error:
        raise InputError(
            f"{key}: bitsandbytes cannot quantise on {device.type} ({first_line(error)}); remove "
            "the setting, or use another device"
        ) from None
    if not is_right:
        raise InputError(
            f"{key}: bitsandbytes gives wrong numbers on {device.type}; remove the setting, or use "
            "another device"
        )


def _needs_bitsandbytes(error: Exception) -> InputError:
    return InputError(
        "model.quantization: nf4: needs bitsandbytes: pip install 'tpaw[qlora]' "
        f"({first_line(error)})"
    )


def quantized_loading(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Arguments of `from_pretrained` that quantise the linear layers to NF4 when they are loaded.

    Args:
        dtype: of the computation and of all other weights.
        device: of the weights.
    """
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def count_in_4_bits(model: PreTrainedModel) -> int:
    """Number of the parameters that `quantized_loading` holds in 4 bits.

    transformers quantises the weights of linear layers. It leaves out the output head, and weights
    that are tied to the embeddings.

    Args:
        model: the same model, not quantised. Its weights may be on the meta device.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    kept = {id(module.weight) for module in embeddings if module is not None}
    weights = {
        id(module.weight): module.weight.numel()
        for module in model.modules()
        if type(module) in (torch.nn.Linear, Conv1D) and id(module.weight) not in kept
    }
    return sum(weights.values())


def use_one_kernel(model: torch.nn.Module) -> None:
    """Make 4-bit layers compute alike with and without gradients, in place.

    On a CPU with AVX512-BF16, bitsandbytes packs the weights of a layer again for inference. It
    then rounds otherwise than in training, and cannot go back to training.
    """
    for layer in _layers(model):
        layer.support_avx512bf16_for_cpu = False


@contextlib.contextmanager
def computing_in_fp32(model: torch.nn.Module) -> Iterator[None]:
    """Compute the products of 4-bit layers in fp32 for the time of the context, for a trial."""
    import torch

    dtypes = [(layer, layer.compute_dtype) for layer in _layers(model)]
    try:
        for layer, _ in dtypes:
            layer.compute_dtype = torch.float32
        yield
    finally:
        for layer, dtype in dtypes:
            layer.compute_dtype = dtype


def _layers(model: torch.nn.Module) -> list[Any]:
    # By what they have, so that bitsandbytes is not imported for ordinary models.
    return [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
