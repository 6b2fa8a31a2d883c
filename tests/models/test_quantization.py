"""A base in 4 bits: one set of numbers in every stage, and the fast ways stay in use."""

from __future__ import annotations

import pytest
import torch
from builders import make_model, save_adapter, save_model, score
from oracles import expected_logps, ragged_team

from tpaw.config.schema import AdapterConfig, ModelConfig
from tpaw.generation.batching import Batching, choose_batching
from tpaw.logprobs.packing import PACKED_LAYOUT
from tpaw.logprobs.prepare import prepare_for_logprobs
from tpaw.models.adapters import AdaptedBase
from tpaw.models.loading import load_base
from tpaw.models.quantization import check_quantization, computing_in_fp32, count_in_4_bits
from tpaw.pipeline.space import BYTES_OF_NF4
from tpaw.team import Player

bitsandbytes = pytest.importorskip("bitsandbytes")

CPU = torch.device("cpu")
CONFIG = ModelConfig(path="x", adapter=AdapterConfig(rank=4), quantization="nf4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("base") / "m", "llama")


def loaded(folder, dtype):
    return load_base(Player(0, str(folder), ""), CONFIG, dtype=dtype, device=CPU)


def test_this_machine_can_do_it():
    check_quantization(CPU)


def test_linear_layers_have_4_bits_and_the_rest_the_dtype_of_the_run(folder):
    model = loaded(folder, torch.bfloat16)
    types = {name: p.dtype for name, p in model.named_parameters()}
    assert types.pop("lm_head.weight") == torch.bfloat16
    assert {t for n, t in types.items() if "proj" in n} == {torch.uint8}
    assert {t for n, t in types.items() if "proj" not in n} == {torch.bfloat16}
    up = model.model.layers[0].mlp.up_proj
    assert up.compute_dtype == torch.bfloat16
    assert up.weight.numel() * 2 == up.in_features * up.out_features


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_it_is_known_beforehand_what_has_4_bits(tmp_path, kind):
    model = loaded(save_model(tmp_path / "m", kind), torch.bfloat16)
    packed = sum(p.numel() for p in model.parameters() if p.dtype == torch.uint8)
    assert count_in_4_bits(make_model(kind)) == 2 * packed > 0


def test_a_layer_in_4_bits_has_the_bytes_that_the_plan_counts():
    packed, state = bitsandbytes.functional.quantize_4bit(
        torch.randn(512, 1024), quant_type="nf4", compress_statistics=True
    )
    held = sum(x.nbytes for x in (packed, state.absmax, state.state2.absmax))
    assert held == BYTES_OF_NF4 * 512 * 1024


def test_scoring_equals_the_dequantised_model_one_row_at_a_time(folder, tmp_path):
    adapter = save_adapter(tmp_path / "a", folder)
    sequences = ragged_team(3, seed=4)
    found = score(AdaptedBase(loaded(folder, torch.float32)).put_on(str(adapter)), sequences)
    plain = AdaptedBase(loaded(folder, torch.float32).dequantize()).put_on(str(adapter))
    expected_S = expected_logps(plain.double(), sequences)
    assert torch.allclose(torch.from_numpy(found), expected_S, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_rows_are_packed_and_prompts_share_a_batch(folder, dtype):
    model = loaded(folder, dtype)
    assert prepare_for_logprobs(model, 99) == (PACKED_LAYOUT, ())
    assert choose_batching(model) == (Batching.CONTINUOUS, ())
    assert model.model.layers[0].mlp.up_proj.compute_dtype == dtype


def test_a_trial_computes_the_products_of_4_bit_layers_in_fp32(folder):
    layer = loaded(folder, torch.bfloat16).model.layers[0].mlp.up_proj
    weight = loaded(folder, torch.float32).dequantize().model.layers[0].mlp.up_proj.weight
    x = torch.randn(9, 32)
    exact = x @ weight.T
    with torch.no_grad():
        assert not torch.allclose(layer(x), exact, atol=1e-4)
        with computing_in_fp32(layer):
            assert torch.allclose(layer(x), exact, atol=1e-6)
        assert layer.compute_dtype == torch.bfloat16


def test_inference_and_training_compute_alike(folder):
    host = AdaptedBase(loaded(folder, torch.bfloat16))
    ids = torch.arange(5, 40)[None]
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        played = host.put_on(None)(input_ids=ids, use_cache=False).logits
    policy = host.policy(None, AdapterConfig(rank=4), seed=0).train()
    with torch.autocast("cpu", torch.bfloat16):
        trained = policy(input_ids=ids, use_cache=False).logits
    assert torch.equal(played, trained)
    trained.float().sum().backward()
    grads = [p.grad for n, p in policy.named_parameters() if "lora_B" in n]
    assert all(grad is not None and grad.any() for grad in grads)
