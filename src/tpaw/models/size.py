"""The size of a model, from its configuration alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from tpaw.config.schema import ModelConfig
from tpaw.models.checks import BUILD_ERRORS, cannot_build, read_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ModelSize(NamedTuple):
    """What decides the size of a checkpoint.

    Attributes:
        parameters: number of parameters that a checkpoint holds. Tied weights count once.
        vocabulary: number of tokens.
    """

    parameters: int
    vocabulary: int


def model_size(model: ModelConfig) -> ModelSize:
    """The size of a model on disk. It is built without memory for the weights.

    Args:
        model: the section `model` of the configuration. Its folder needs no weights.

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
    return size_of(built)


def size_of(model: PreTrainedModel) -> ModelSize:
    """The size of a model that is built or loaded."""
    return ModelSize(model.num_parameters(), model.config.get_text_config().vocab_size)
