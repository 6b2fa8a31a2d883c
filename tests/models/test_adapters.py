"""Adapters in memory: W + s·BA, from mathematics; one base whose tensors never move."""

from __future__ import annotations

import json

import pytest
import torch
from builders import make_model, save_adapter, save_model, score
from messages import refused
from oracles import expected_logps, ragged_team
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tpaw.config.schema import AdapterConfig, ModelConfig
from tpaw.logprobs.packing import PACKED_LAYOUT, packed_batch
from tpaw.logprobs.prepare import prepare_for_logprobs
from tpaw.logprobs.response import LogprobHead, response_logps
from tpaw.models.adapters import AdaptedBase, merged
from tpaw.models.loading import load_model
from tpaw.team import Base, Player

CPU = torch.device("cpu")
IDS = torch.arange(5, 40)[None]
SETTINGS = AdapterConfig(rank=4)


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("base") / "m")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, base_folder):
    folder = tmp_path_factory.mktemp("adapters")
    return [save_adapter(folder / str(seed), base_folder, seed=seed) for seed in (1, 2)]


@pytest.fixture
def base(base_folder):
    return AutoModelForCausalLM.from_pretrained(base_folder).eval()


def deltas(folder, scaling):
    """s·BA of each layer, in float64, from the files alone."""
    weights = {k: w.double() for k, w in load_file(folder / "adapter_model.safetensors").items()}
    prefix, end = "base_model.model.", ".lora_A.weight"
    layers = [name.removeprefix(prefix).removesuffix(end) for name in weights if end in name]
    assert layers
    return {
        layer: scaling
        * weights[f"{prefix}{layer}.lora_B.weight"]
        @ weights[f"{prefix}{layer}.lora_A.weight"]
        for layer in layers
    }


def with_deltas(base_folder, changes):
    """The model whose weights are W + ΔW, in float64."""
    model = AutoModelForCausalLM.from_pretrained(base_folder).double().eval()
    for layer, change in changes.items():
        model.get_submodule(layer).weight.data += change
    return model


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids.to(model.device), use_cache=False).logits.cpu()


def player(folder, base_folder):
    return Player(1, str(folder), "", Base(str(base_folder), "", str(base_folder)))


def test_an_adapter_adds_alpha_over_rank_times_ba(base, base_folder, adapters):
    expected = logits(with_deltas(base_folder, deltas(adapters[0], 8 / 4)))
    found = logits(AdaptedBase(base).put_on(str(adapters[0])))
    assert torch.allclose(found.double(), expected, atol=1e-5)
    assert not torch.allclose(found, logits(make_model()), atol=1e-2)


def test_all_linear_excludes_the_output_head(adapters):
    assert len(deltas(adapters[0], 1)) == 2 * 7
    assert not any("lm_head" in layer for layer in deltas(adapters[0], 1))


def test_the_tensors_of_the_base_are_the_same_storage_whoever_plays(base, adapters):
    before = {n: (p.data_ptr(), p.detach().clone()) for n, p in base.named_parameters()}
    alone = logits(base)
    host = AdaptedBase(base)
    found = [logits(host.put_on(folder and str(folder))) for folder in (*adapters, None)]
    assert not torch.allclose(found[0], found[1], atol=1e-2)
    assert torch.equal(found[2], alone)
    policy = host.policy(str(adapters[0]), SETTINGS, seed=1)
    inside = {p.data_ptr(): p for p in policy.parameters()}
    for pointer, values in before.values():
        assert torch.equal(inside[pointer], values)
        assert not inside[pointer].requires_grad
    host.take_off()
    after = {n: (p.data_ptr(), p.detach()) for n, p in base.named_parameters()}
    assert after.keys() == before.keys()
    assert all(after[n][0] == before[n][0] for n in before)
    assert all(torch.equal(after[n][1], before[n][1]) for n in before)


def test_a_new_adapter_changes_nothing_to_the_last_bit(base):
    alone, host = logits(base), AdaptedBase(base)
    weights = []
    for seed in (1, 1, 2):
        policy = host.policy(None, SETTINGS, seed=seed)
        assert torch.equal(logits(policy), alone)
        weights.append([p.detach().clone() for p in policy.parameters() if p.requires_grad])
    first, again, other = (torch.cat([w.flatten() for w in ws]) for ws in weights)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.count_nonzero() > 0  # A, or B would never get a gradient


def test_an_adapter_keeps_the_bits_of_fp32_over_a_bf16_base(base, adapters):
    saved = load_file(adapters[0] / "adapter_model.safetensors")
    assert any((w.bfloat16().float() != w).any() for w in saved.values())
    host = AdaptedBase(base.bfloat16())
    for model in (host.put_on(str(adapters[0])), host.policy(str(adapters[0]), SETTINGS, seed=0)):
        loaded = {n: p for n, p in model.named_parameters() if "lora" in n}
        assert len(loaded) == len(saved)
        for name, weight in loaded.items():
            key = f"base_model.model.{name.removeprefix('base_model.model.')}"
            assert torch.equal(weight, saved[key.replace(".default", "")])


FRESH = AdapterConfig(rank=4, each_iteration="fresh")


def trained_part(policy, rank):
    """Set what a new adapter has learned: the last ranks of B."""
    torch.manual_seed(9)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data[:, rank:] = torch.randn_like(parameter.data[:, rank:])


@pytest.mark.parametrize(("rank", "alpha"), [(4, 8), (2, 4), (3, 7)], ids=str)
def test_stacked_adapters_are_one_by_exact_concatenation(base, base_folder, tmp_path, rank, alpha):
    first = save_adapter(tmp_path / "first", base_folder, seed=3, r=rank, lora_alpha=alpha)
    policy = AdaptedBase(base).policy(str(first), FRESH, seed=5)
    before = logits(policy)
    # B₂ = 0: the player that it starts as.
    start = with_deltas(base_folder, deltas(first, alpha / rank))
    assert torch.allclose(before.double(), logits(start), atol=1e-5)
    trained_part(policy, rank)
    policy.save_pretrained(tmp_path / "both")
    config = json.loads((tmp_path / "both" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (rank + 4, 2 * (rank + 4))
    both, one = (
        {k: w.double() for k, w in load_file(folder / "adapter_model.safetensors").items()}
        for folder in (tmp_path / "both", first)
    )
    for layer, change in deltas(tmp_path / "both", 2).items():
        a, b = (f"base_model.model.{layer}.lora_{x}.weight" for x in "AB")
        second = 2 * both[b][:, rank:] @ both[a][rank:]
        expected = deltas(first, alpha / rank)[layer] + second
        assert torch.allclose(change, expected, rtol=1e-6, atol=1e-7)
        assert torch.equal(both[a][:rank], one[a])
        if alpha / rank == 2:  # the same scaling: nothing is even rounded
            assert torch.equal(both[b][:, :rank], one[b])
            assert torch.allclose(change, expected, rtol=1e-14, atol=1e-14)


def test_layers_that_the_earlier_adapter_lacks_start_at_0(base, base_folder, tmp_path):
    first = save_adapter(tmp_path / "first", base_folder, seed=3, target_modules=["q_proj"])
    policy = AdaptedBase(base).policy(str(first), FRESH, seed=5)
    start = with_deltas(base_folder, deltas(first, 2))
    assert torch.allclose(logits(policy).double(), logits(start), atol=1e-5)


def test_packed_log_probs_are_those_of_the_merged_model_one_row_at_a_time(
    base, base_folder, adapters
):
    sequences = ragged_team(3, seed=4)
    expected_S = expected_logps(with_deltas(base_folder, deltas(adapters[0], 2)), sequences)
    host = AdaptedBase(base)
    scored = score(host.put_on(str(adapters[0])), sequences)
    assert torch.allclose(torch.from_numpy(scored), expected_S, atol=1e-5)
    policy = host.policy(str(adapters[0]), SETTINGS, seed=0)
    assert prepare_for_logprobs(policy, 99) == (PACKED_LAYOUT, ())
    head = LogprobHead.attached_to(policy)
    assert head is not None
    found_S = response_logps(policy, packed_batch(sequences), head)
    assert torch.allclose(found_S, expected_S, atol=1e-5)
    found_S.sum().backward()
    assert all(p.grad is not None for n, p in policy.named_parameters() if "lora_B" in n)


def test_without_the_setting_an_adapter_is_merged_in_fp32_and_rounded_once(base_folder, adapters):
    whole = player(adapters[0], base_folder)
    plain = ModelConfig(path="x")
    exact = with_deltas(base_folder, deltas(adapters[0], 2))
    model = load_model(whole, plain, dtype=torch.float32, device=CPU)
    assert not any("lora" in name for name, _ in model.named_modules())
    assert torch.allclose(logits(model).double(), logits(exact), atol=1e-5)
    assert all(p.requires_grad for p in model.parameters())
    rounded = load_model(whole, plain, dtype=torch.bfloat16, device=CPU)
    for (name, found), wide in zip(rounded.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(found, wide.bfloat16()), name
    for (name, found), wide in zip(rounded.named_buffers(), model.buffers(), strict=True):
        assert torch.equal(found, wide), name
        assert found.dtype == wide.dtype


def test_with_the_setting_it_stays_an_adapter(base_folder, adapters):
    config = ModelConfig(path="x", adapter=SETTINGS)
    model = load_model(player(adapters[0], base_folder), config, dtype=torch.bfloat16, device=CPU)
    types = {p.dtype for n, p in model.named_parameters() if "lora" in n}
    assert types == {torch.float32}
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert not model.training


def test_dropout_of_an_adapter_is_off(base, base_folder, tmp_path):
    folder = save_adapter(tmp_path / "a", base_folder, lora_dropout=0.5)
    model = AdaptedBase(base).policy(str(folder), SETTINGS, seed=0)
    model.train()
    assert torch.equal(logits(model), logits(model))


def test_a_player_names_its_two_folders():
    base = Base("/base", "f", "org/base", "c0ffee")
    assert (Player(0, "/m", "f").base_folder, Player(0, "/m", "f").adapter_folder) == ("/m", None)
    start = Player(0, "/base", "f", base)
    assert (start.base_folder, start.adapter_folder) == ("/base", None)
    later = Player(1, "/a", "g", base)
    assert (later.base_folder, later.adapter_folder) == ("/base", "/a")


def test_a_base_that_is_gone_is_named(adapters, tmp_path):
    config = ModelConfig(path="x", adapter=SETTINGS)
    with refused(tmp_path / "gone"):
        load_model(player(adapters[0], tmp_path / "gone"), config, dtype=torch.float32, device=CPU)


def test_merged_is_the_base_with_deltas(base, base_folder, adapters):
    model = merged(base, str(adapters[1]))
    for layer, change in deltas(adapters[1], 2).items():
        original = make_model().cpu().get_submodule(layer).weight.double()
        assert torch.allclose(
            model.get_submodule(layer).weight.double(), original + change, atol=1e-6
        )
