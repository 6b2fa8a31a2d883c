"""Adapters on disk: their base, whether they fit it, and which settings train them further."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
import transformers.utils.versions
from builders import make_model, make_tokenizer, save_adapter, save_model
from messages import IN_BRACKETS, refused
from transformers import LlamaConfig, LlamaForCausalLM

from tpaw.config.schema import AdapterConfig, ModelConfig, RunConfig
from tpaw.models.adapter_files import base_of, settings_of
from tpaw.models.checks import check_model, read_config
from tpaw.models.fingerprint import adapter_fingerprint, fingerprint
from tpaw.models.initial import initial_player
from tpaw.models.quantization import check_quantization
from tpaw.models.references import find_checkpoint
from tpaw.models.tokenizers import load_tokenizer, stop_token_ids
from tpaw.storage.artifacts import read_sealed, write_manifest


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("base") / "m")


@pytest.fixture
def adapter(tmp_path, base):
    return save_adapter(tmp_path / "adapter", base)


def edit(folder, name="adapter_config.json", **changes):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def check(path, adapter=None, **settings):
    return check_model(ModelConfig(path=str(path), adapter=adapter, **settings), is_trained=True)


SAME = AdapterConfig(rank=4, alpha=8)


def test_an_adapter_over_a_model_is_a_model(adapter, base):
    assert check(adapter).model_type == "qwen2"
    assert check(adapter, SAME).model_type == "qwen2"
    model = ModelConfig(path=str(adapter))
    found = base_of(model)
    assert found is not None
    assert found.path == str(base)
    assert base_of(ModelConfig(path=str(base))) is None
    assert read_config(model).model_type == "qwen2"
    # The tokenizer and the stop tokens are those of the base, unless the adapter has its own.
    assert load_tokenizer(model).chat_template == make_tokenizer().chat_template
    assert stop_token_ids(model, load_tokenizer(model)) == (4,)
    make_tokenizer(chat=False).save_pretrained(adapter)
    assert load_tokenizer(model).chat_template is None


def test_a_base_may_be_relative_to_the_working_directory_or_to_the_adapter(
    adapter, base, tmp_path, monkeypatch
):
    model = ModelConfig(path=str(adapter))
    shutil.copytree(base, tmp_path / "elsewhere" / "m")
    edit(adapter, base_model_name_or_path="m")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert base_of(model).path == "m"
    edit(adapter, base_model_name_or_path="../elsewhere/m")
    monkeypatch.chdir(base)
    assert base_of(model).path == str(tmp_path / "elsewhere" / "m")
    player = initial_player(model, tmp_path / "players" / "0.json")
    assert player.base_folder == str(tmp_path / "elsewhere" / "m")


@pytest.mark.parametrize(
    "name", [None, "/nowhere/m", "./nowhere", "a/b/c"], ids=["none", "absolute", "dot", "deep"]
)
def test_a_base_that_does_not_exist(adapter, name):
    edit(adapter, base_model_name_or_path=name)
    with refused("model.path", adapter, "base_model_name_or_path"):
        check(adapter)


def test_a_damaged_adapter(adapter, tmp_path):
    other = shutil.copytree(adapter, tmp_path / "other")
    (other / "adapter_model.safetensors").unlink()
    with refused(other, "adapter_model.safetensors"):
        check(other)
    (adapter / "adapter_config.json").write_text("[")
    with refused(adapter, hide=IN_BRACKETS):
        check(adapter)
    (adapter / "adapter_config.json").write_text("[]")
    with refused(adapter):
        check(adapter)


def test_an_adapter_over_an_adapter(adapter, tmp_path):
    upper = shutil.copytree(adapter, tmp_path / "upper")
    edit(upper, base_model_name_or_path=str(adapter))
    with refused(upper, adapter):
        check(upper)


def wider(folder, **changes):
    """Another model of the same kind."""
    sizes = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**(sizes | changes))).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "changes",
    [{"hidden_size": 48}, {"num_hidden_layers": 3}, {"num_hidden_layers": 1}],
    ids=["wider", "deeper", "shallower"],
)
def test_an_adapter_of_another_base_is_refused_by_its_shapes(tmp_path, changes):
    own = wider(tmp_path / "own")
    folder = save_adapter(tmp_path / "adapter", own, target_modules=["q_proj", "down_proj"])
    check(folder)
    # Names without the number of a layer fit any depth, and PEFT would not complain.
    other = wider(tmp_path / "other", **changes)
    edit(folder, base_model_name_or_path=str(other), target_modules=["q_proj", "down_proj"])
    with refused(folder, other, "lora_"):
        check(folder)


def test_an_adapter_of_another_base_of_the_same_shape_is_refused_by_its_manifest(
    adapter, base, tmp_path
):
    write_manifest(adapter, {"base": fingerprint(base)})
    check(adapter)
    other = save_model(tmp_path / "other", seed=1)
    edit(adapter, base_model_name_or_path=str(other))
    write_manifest(adapter, {"base": fingerprint(base)})
    with refused(adapter, other, fingerprint(other)[:12]):
        check(adapter)
    with refused(adapter, other):
        initial_player(ModelConfig(path=str(adapter)), tmp_path / "0.json")
    with refused(adapter, other):
        find_checkpoint(str(adapter))


def test_the_fingerprint_covers_base_and_adapter_and_not_where_they_are(adapter, base, tmp_path):
    def of(folder):
        return initial_player(ModelConfig(path=str(folder)), tmp_path / "p" / "0.json").fingerprint

    first = of(adapter)
    assert read_sealed(tmp_path / "p" / "0.json")["base"]["fingerprint"] == fingerprint(base)
    moved = shutil.copytree(base, tmp_path / "moved")
    edit(adapter, base_model_name_or_path=str(moved), peft_version="0", inference_mode=False)
    assert of(adapter) == first
    edit(adapter, lora_alpha=9)
    assert adapter_fingerprint(fingerprint(base), adapter) != first
    other = save_model(tmp_path / "other", seed=1)
    edit(adapter, lora_alpha=8, base_model_name_or_path=str(other))
    with refused(adapter, "θ_0"):  # it is not the model that the run began with
        of(adapter)


@pytest.mark.parametrize(
    "settings",
    [
        AdapterConfig(rank=8, alpha=16),
        AdapterConfig(rank=4, alpha=4),
        AdapterConfig(rank=4, target_modules=("q_proj",)),
    ],
    ids=["rank", "alpha", "targets"],
)
def test_an_adapter_goes_on_only_with_its_own_settings(adapter, settings):
    with refused("model.adapter", adapter, "rank 4, alpha 8"):
        check(adapter, settings)


def test_a_new_adapter_goes_on_top_of_one_with_other_settings(adapter, base, tmp_path):
    check(adapter, AdapterConfig(rank=8, alpha=2, each_iteration="fresh"))
    narrow = save_adapter(tmp_path / "narrow", base, target_modules=["q_proj"])
    check(narrow, AdapterConfig(each_iteration="fresh"))
    with refused("target_modules", adapter):
        check(adapter, AdapterConfig(target_modules=("q_proj",), each_iteration="fresh"))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("dora", {"use_dora": True}),
        ("rslora", {"use_rslora": True}),
        ("ranks", {"rank_pattern": {"q_proj": 2}}),
        ("bias", {"bias": "lora_only"}),
        ("head", {"modules_to_save": ["lm_head"]}),
    ],
    ids=["dora", "rslora", "ranks", "bias", "head"],
)
def test_more_than_lora_is_merged_and_not_trained_further(tmp_path, base, name, settings):
    folder = save_adapter(tmp_path / name, base, **settings)
    check(folder)
    saved = json.loads((folder / "adapter_config.json").read_text())
    assert settings_of(folder, saved) is None
    with refused("model.adapter", folder):
        check(folder, SAME)


def test_the_settings_of_an_adapter_are_those_that_train_it_further(adapter):
    saved = json.loads((adapter / "adapter_config.json").read_text())
    settings = settings_of(adapter, saved)
    assert (settings.rank, settings.scaling) == (4, 2.0)
    check(adapter, settings)
    assert find_checkpoint(str(adapter)).model.adapter == settings


@pytest.mark.parametrize("target", ["k_prj", "embed_tokens", "lm_head"])
def test_targets_must_be_linear_layers_of_the_model(base, target):
    with refused("model.adapter.target_modules", target, hide=IN_BRACKETS):
        check(base, AdapterConfig(target_modules=("q_proj", target)))


def test_targets_may_be_named(base):
    check(base, AdapterConfig(target_modules=("q_proj", "layers.1.mlp.down_proj")))


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("model.adapter.dropout", {"model": {"adapter": {"dropout": 0.1}}}),
        ("model.quantization", {"model": {"quantization": "nf4"}}),
        (
            "train.weights",
            {"model": {"adapter": {}}, "train": {"weights": "split"}, "precision": "bf16"},
        ),
        ("model.adapter.rank", {"model": {"adapter": {"rank": 0}}}),
        ("model.adapter.each_iteration", {"model": {"adapter": {"each_iteration": "merge"}}}),
    ],
    ids=["dropout", "quantization", "split", "rank", "each"],
)
def test_settings_that_do_not_fit_together(settings, key, changes):
    with refused(key):
        RunConfig.load(settings, changes)


def test_alpha_is_twice_the_rank_unless_it_is_given():
    assert AdapterConfig(rank=8).scaling == 2
    assert AdapterConfig(rank=8, alpha=4).scaling == 0.5


def test_without_peft(settings, base, monkeypatch):
    def absent(requirement):
        raise ImportError(f"no {requirement}")

    monkeypatch.setattr(transformers.utils.versions, "require_version", absent)
    with refused("tpaw[lora]"):
        check(base, SAME)
    with refused("tpaw[qlora]"):
        check_quantization(torch.device("cpu"))


def test_a_device_on_which_bitsandbytes_fails(monkeypatch):
    functional = pytest.importorskip("bitsandbytes.functional")

    def fails(*args, **kwargs):
        raise NotImplementedError("no kernel")

    monkeypatch.setattr(functional, "quantize_4bit", fails)
    with refused("model.quantization", "cpu", "no kernel"):
        check_quantization(torch.device("cpu"))
    monkeypatch.undo()
    monkeypatch.setattr(functional, "dequantize_4bit", lambda packed, state: torch.zeros(64, 64))
    with refused("model.quantization", "cpu"):
        check_quantization(torch.device("cpu"))


def test_an_adapter_of_gpt2_with_its_transposed_layers(tmp_path):
    make_model("gpt2").save_pretrained(tmp_path / "m")
    make_tokenizer().save_pretrained(tmp_path / "m")
    check(tmp_path / "m", AdapterConfig(rank=4))
    folder = save_adapter(tmp_path / "a", tmp_path / "m")
    check(folder, SAME)
    assert peft.PeftConfig.from_pretrained(folder).r == 4
