"""An architecture that cannot be used is refused before weights are loaded or anything written."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import transformers
from builders import make_tokenizer
from messages import DIFFERENCE, refused, says

from tpaw.config.schema import ModelConfig, RunConfig
from tpaw.models.reduced import VOCABULARY, reduced_model
from tpaw.pipeline.preflight import try_architecture
from tpaw.selfplay import self_play

BY_TRANSFORMERS = {"reason": re.compile(r"(?<=ValueError: ).*(?=\);)")}
SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "eos_token_id": 4,
}
CONFIGS = {
    "bert": lambda: transformers.BertConfig(**SIZES, intermediate_size=48),
    "reformer": lambda: transformers.ReformerConfig(
        vocab_size=320,
        hidden_size=32,
        attn_layers=["local", "lsh"],
        num_attention_heads=4,
        attention_head_size=8,
        axial_pos_embds=False,
        feed_forward_size=48,
        max_position_embeddings=256,
        is_decoder=True,
        num_buckets=4,
    ),
    "bloom": lambda: transformers.BloomConfig(
        vocab_size=320, hidden_size=32, n_layer=2, n_head=4, eos_token_id=4, pad_token_id=0
    ),
}


@pytest.fixture
def with_model(settings, tmp_path):
    """Gives the settings of a run with a random model of an architecture."""

    def make(kind):
        torch.manual_seed(0)
        folder = tmp_path / kind
        transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]()).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        return settings | {"model": {"path": str(folder)}}

    return make


@pytest.mark.parametrize("kind", ["bert", "reformer"])
def test_an_architecture_that_gives_wrong_log_probs_is_refused(kind, with_model, tmp_path):
    config = RunConfig.load(with_model(kind))
    output = tmp_path / "run"
    with refused("model.path", kind, hide=DIFFERENCE | BY_TRANSFORMERS):
        self_play(config, output)
    assert not output.exists()


def test_the_layout_and_its_reasons_are_known_without_weights(with_model, settings):
    packed = try_architecture(RunConfig.load(settings))
    assert len(packed) == 2
    says("\n".join(packed), "packed", "without holding the logits")
    padded = try_architecture(RunConfig.load(with_model("bloom")))
    says("\n".join(padded), "one sequence per row", "attention")


def test_a_reduced_model_has_a_layer_of_each_kind():
    config = transformers.Gemma3TextConfig(
        vocab_size=50_000,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        eos_token_id=49_999,
        pad_token_id=49_998,  # an embedding does not take one beyond its size
    )
    before = copy.deepcopy(config)
    state = torch.get_rng_state()
    model = reduced_model(config, ModelConfig(path="x"))
    assert model.config.layer_types == ["sliding_attention", "full_attention"]
    assert model.get_input_embeddings().weight.shape == (VOCABULARY, 32)
    assert not model.training
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert config.to_dict() == before.to_dict()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_reduced_model_has_two_layers_if_all_are_of_one_kind_and_three_of_three():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = transformers.Qwen2Config(vocab_size=320, num_hidden_layers=6, **sizes)
    model = reduced_model(config, ModelConfig(path="x"))
    assert model.config.layer_types == ["full_attention"] * 2
    assert len(model.model.layers) == 2
    kinds = ["full_attention", "sliding_attention", "chunked_attention"]
    config.layer_types = kinds * 2
    assert reduced_model(config, ModelConfig(path="x")).config.layer_types == kinds


def test_a_model_whose_layers_are_too_large_is_not_tried(monkeypatch, settings):
    monkeypatch.setattr("tpaw.models.reduced.MOST_WEIGHTS", 1000)
    [text] = try_architecture(RunConfig.load(settings))
    says(text, "not known")
