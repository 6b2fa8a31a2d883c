"""A small random model of an architecture, to try what the architecture can do.

Whether rows can be packed, and whether a model is causal, does not depend on its weights. So this
is known before any weights are downloaded or loaded.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from tpaw.config.schema import ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Tokens of its vocabulary.
VOCABULARY = 256
# A larger one would need too much time and memory; 2 GB in fp32.
MOST_WEIGHTS = 500_000_000


def reduced_model(found: PreTrainedConfig, model: ModelConfig) -> PreTrainedModel | None:
    """Build a model with a layer of each kind, a small vocabulary and random fp32 weights, on CPU.

    Args:
        found: the configuration of the model; it stays as it is.
        model: the section `model` of the configuration.

    Returns:
        The model in evaluation mode; None if one layer of each kind is too large.
    """
    import torch
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"trust_remote_code": model.trust_remote_code}
    if model.attn_implementation is not None:
        options["attn_implementation"] = model.attn_implementation

    def build(config: PreTrainedConfig) -> PreTrainedModel:
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), **options)

    config = _reduced(found)
    with torch.device("meta"):  # allocates no memory for the weights
        try:
            meta = build(config)
        except Exception:  # the configuration does not allow fewer layers or tokens
            config = found
            meta = build(config)
    if sum(parameter.numel() for parameter in meta.parameters()) > MOST_WEIGHTS:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        reduced = build(config).float().eval()
        for parameter in reduced.parameters():
            # Small weights would hide what a layer does.
            if parameter.dim() > 1:
                parameter.data.normal_(std=parameter.shape[-1] ** -0.5)
    return reduced


def _reduced(found: PreTrainedConfig) -> PreTrainedConfig:
    config = copy.deepcopy(found)
    text = config.get_text_config()
    kinds = {
        name: list(dict.fromkeys(getattr(text, name, None) or ()))
        for name in ("layer_types", "mlp_layer_types")
        if name in vars(text)
    }
    layers = max(2, *map(len, kinds.values())) if kinds else 2
    if layers < getattr(text, "num_hidden_layers", 0):
        text.num_hidden_layers = layers
        for name, found_kinds in kinds.items():
            if found_kinds:
                missing = layers - len(found_kinds)
                setattr(text, name, found_kinds + found_kinds[-1:] * missing)
    text.vocab_size = min(text.vocab_size, VOCABULARY)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        text_id = getattr(text, name, None)
        if isinstance(text_id, int) and text_id >= VOCABULARY:
            setattr(text, name, 0)
    return config
