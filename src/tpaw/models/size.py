"""The size of a model, from its configuration alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from tpaw.config.schema import ModelConfig
from tpaw.models.adapters import with_new_adapter
from tpaw.models.checks import BUILD_ERRORS, cannot_build, read_config
from tpaw.models.quantization import count_in_4_bits

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class ModelSize(NamedTuple):
    """What decides the size of a checkpoint.

    Attributes:
        parameters: number of parameters that are trained and saved. Tied weights count once.
        vocabulary: number of tokens.
        frozen: number of parameters of the base of adapters. They are in memory only.
        in_4_bits: number of the frozen parameters that `model.quantization` holds in 4 bits.
    """

    parameters: int
    vocabulary: int
    frozen: int = 0
    in_4_bits: int = 0


def model_size(model: ModelConfig, iterations: int = 1) -> ModelSize:
    """The size of what a run trains. It is built without memory for the weights.

    Args:
        model: the section `model` of the configuration. Its folder needs no weights.
        iterations: number of adapters that are stacked, where each iteration makes a new one.

    Raises:
        InputError: the model's configuration cannot be found or read.
    """
    import torch
    from transformers import AutoModelForCausalLM

    found = read_config(model)
    try:
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(
                found, trust_remote_code=model.trust_remote_code
            )
    except BUILD_ERRORS as error:
        raise cannot_build(model, error) from None
    if model.adapter is None:
        return size_of(built)
    in_4_bits = 0 if model.quantization is None else count_in_4_bits(built)
    stacked = iterations if model.adapter.each_iteration == "fresh" else 1
    adapted = with_new_adapter(built, model.adapter, model.adapter.rank * stacked)
    return size_of(adapted)._replace(in_4_bits=in_4_bits)


def size_of(model: PreTrainedModel | PeftModel) -> ModelSize:
    """The size of a model that is built or loaded."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    return ModelSize(trained, model.config.get_text_config().vocab_size, frozen)
