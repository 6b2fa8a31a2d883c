from __future__ import annotations

import copy
import json
import re
import shutil

import pytest
import torch
import transformers
from builders import make_model, make_tokenizer, save_model
from messages import IN_BRACKETS, refused
from safetensors.torch import save_file
from transformers import BertConfig, Qwen2ForSequenceClassification, T5Config

from tpaw.config.schema import ModelConfig, RunConfig
from tpaw.errors import ArtifactError
from tpaw.models.checks import check_model, check_vocabulary, why_length_matters
from tpaw.models.fingerprint import fingerprint, weights_hash
from tpaw.models.initial import initial_player
from tpaw.models.loading import disable_dropout, load_model, pick_device
from tpaw.models.tokenizers import load_tokenizer, stop_token_ids
from tpaw.team import Player

CPU = torch.device("cpu")


def check(settings, path, **changes):
    settings = settings | changes
    settings["model"] = {"path": str(path)}
    config = RunConfig.load(settings)
    return check_model(config.model, config.max_length, is_trained=True)


def test_decoders_pass(settings, tmp_path):
    for kind in ("qwen2", "llama", "gpt2"):
        assert check(settings, save_model(tmp_path / kind, kind)).model_type == kind


def test_models_that_cannot_play(settings, tmp_path, model_folder):
    T5Config(architectures=["T5ForConditionalGeneration"]).save_pretrained(tmp_path / "t5")
    with refused(tmp_path / "t5", "model.path"):
        check(settings, tmp_path / "t5")
    config = make_model().config
    Qwen2ForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
    with refused("Qwen2ForSequenceClassification", "model.path"):
        check(settings, tmp_path / "classifier")
    BertConfig(architectures=["BertForMaskedLM"]).save_pretrained(tmp_path / "bert")
    with refused("BertForMaskedLM", "model.path"):
        check(settings, tmp_path / "bert")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with refused(tmp_path / "adapter", "model.path"):
        check(settings, tmp_path / "adapter")
    (tmp_path / "empty").mkdir()
    with refused(tmp_path / "empty", "config.json"):
        check(settings, tmp_path / "empty")
    with refused(tmp_path / "missing", "model.path", hide=IN_BRACKETS):
        check(settings, tmp_path / "missing")
    with refused("max_length", 300, 256):
        check(settings, model_folder, max_length=300)
    check(settings, model_folder, max_length=256)  # all of them may be used


def test_the_fingerprint_is_of_the_weights_and_not_of_their_place_or_shards(tmp_path):
    model = make_model(seed=1)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    shutil.copytree(tmp_path / "whole", tmp_path / "moved")
    same = {fingerprint(tmp_path / name) for name in ("whole", "sharded", "moved")}
    assert len(same) == 1
    with torch.no_grad():
        model.model.norm.weight[3] += 1e-6
    model.save_pretrained(tmp_path / "edited")
    make_model(seed=1).to(torch.bfloat16).save_pretrained(tmp_path / "other_dtype")
    assert fingerprint(tmp_path / "edited") not in same
    assert fingerprint(tmp_path / "other_dtype") not in same
    with refused(tmp_path):
        fingerprint(tmp_path)


def test_every_file_that_decides_results_is_part_of_the_fingerprint(tmp_path):
    folder = save_model(tmp_path / "model")
    before = fingerprint(folder)

    def after(name, change):
        copy = shutil.copytree(folder, tmp_path / "edited")
        text = (copy / name).read_text() if (copy / name).exists() else ""
        (copy / name).write_text(change(text))
        found = fingerprint(copy)
        shutil.rmtree(copy)
        return found

    def field(key, value):
        return lambda text: json.dumps(json.loads(text) | {key: value})

    edits = [
        ("config.json", field("rms_norm_eps", 0.5)),
        ("generation_config.json", field("eos_token_id", [4, 0])),
        ("tokenizer_config.json", field("eos_token", "<|pad|>")),
        ("tokenizer.json", lambda text: text.replace("<|user|>", "<|USER|>")),
        ("chat_template.jinja", lambda text: text + "!"),
        ("modeling_mine.py", lambda text: "x = 1"),
    ]
    assert len({before, *(after(*edit) for edit in edits)}) == 1 + len(edits)
    notes = [
        ("config.json", field("transformers_version", "4.0.0")),
        ("config.json", field("_name_or_path", "/elsewhere")),
        ("config.json", lambda text: json.dumps(json.loads(text), indent=7)),
        ("README.md", lambda text: "# A model"),
    ]
    assert {after(*note) for note in notes} == {before}


def test_names_types_and_shapes_are_part_of_the_fingerprint(tmp_path):
    same_bytes = {
        "a": {"x.weight": torch.zeros(2, 3)},
        "renamed": {"y.weight": torch.zeros(2, 3)},
        "reshaped": {"x.weight": torch.zeros(3, 2)},
        "retyped": {"x.weight": torch.zeros(2, 3, dtype=torch.int32)},
    }
    for name, tensors in same_bytes.items():
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    assert len({fingerprint(tmp_path / name) for name in same_bytes}) == 4


def test_pickled_weights_have_a_fingerprint_too(tmp_path):
    for name, value in (("a", 1.0), ("copy", 1.0), ("b", 2.0)):
        (tmp_path / name).mkdir()
        torch.save({"x.weight": torch.tensor([value])}, tmp_path / name / "pytorch_model.bin")
    a, copy, b = (fingerprint(tmp_path / name) for name in ("a", "copy", "b"))
    assert a == copy != b


def test_a_hub_id_is_recorded_with_its_commit_and_found_again(tmp_path, monkeypatch):
    commit = save_model(tmp_path / "0123abc")  # the hub's cache names a snapshot by its commit
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda path, revision, allow_patterns: str(commit)
    )
    config, record = ModelConfig(path="org/model", revision="main"), tmp_path / "players" / "0.json"
    player = initial_player(config, record)
    assert player == Player(0, str(commit), fingerprint(commit))
    assert json.loads(record.read_text())["revision"] == "0123abc"
    assert initial_player(config, record) == player


def test_the_initial_player_is_recorded_and_edited_weights_are_refused(tmp_path):
    folder = save_model(tmp_path / "model")
    config, record = ModelConfig(path=str(folder)), tmp_path / "run" / "players" / "0.json"
    record.parent.parent.mkdir()
    player = initial_player(config, record)
    assert player == Player(0, str(folder), fingerprint(folder))
    assert json.loads(record.read_text())["fingerprint"] == player.fingerprint
    assert initial_player(config, record) == player
    assert not load_model(player, config, dtype=torch.float32, device=CPU).training
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(json.dumps(json.loads(text) | {"rms_norm_eps": 0.5}))
    with refused(folder):
        initial_player(config, record)
    (folder / "config.json").write_text(text)
    # A run of an earlier version goes on under the fingerprint that it recorded.
    facts = json.loads(record.read_text())
    old = {key: facts[key] for key in ("index", "path", "revision")}  # without a checksum
    record.write_text(json.dumps(old | {"fingerprint": weights_hash(folder)}))
    assert initial_player(config, record).fingerprint == weights_hash(folder)
    record.write_text(json.dumps(facts))
    make_model(seed=9).save_pretrained(folder)
    with refused(folder):
        initial_player(config, record)
    shutil.rmtree(folder)
    absent = initial_player(config, record)
    assert absent.fingerprint == player.fingerprint
    with refused(folder, "θ_0"):
        load_model(absent, config, dtype=torch.float32, device=CPU)


def test_absent_weights_are_an_error_and_not_random_numbers(tmp_path):
    model = make_model("llama")
    state = {k: v for k, v in model.state_dict().items() if "layers.1.mlp" not in k}
    model.save_pretrained(tmp_path, state_dict=state)
    player = Player(0, str(tmp_path), "")
    with refused("model.layers.1.mlp", tmp_path, error=ArtifactError):
        load_model(player, ModelConfig(path="x"), dtype=torch.float32, device=CPU)


SMALL = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
DROPPING = {
    "gpt2": transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=99, resid_pdrop=0.5, attn_pdrop=0.5
    ),
    "llama": transformers.LlamaConfig(**SMALL, intermediate_size=32, attention_dropout=0.5),
    "opt": transformers.OPTConfig(**SMALL, ffn_dim=32, dropout=0.5, word_embed_proj_dim=32),
    "gpt_bigcode": transformers.GPTBigCodeConfig(
        n_embd=32, n_layer=2, n_head=4, vocab_size=99, attn_pdrop=0.5, resid_pdrop=0.5
    ),
    "bloom": transformers.BloomConfig(
        vocab_size=99,
        hidden_size=32,
        n_layer=2,
        n_head=4,
        hidden_dropout=0.5,
        attention_dropout=0.5,
    ),
    "falcon": transformers.FalconConfig(**SMALL, hidden_dropout=0.5, attention_dropout=0.5),
    "mixtral": transformers.MixtralConfig(
        **SMALL, intermediate_size=32, num_key_value_heads=2, router_jitter_noise=0.5
    ),
    # Its router reads the jitter in evaluation mode too.
    "phimoe": transformers.PhimoeConfig(
        **SMALL,
        intermediate_size=32,
        num_key_value_heads=2,
        num_local_experts=4,
        router_jitter_noise=0.3,
        input_jitter_noise=0.2,
        attention_dropout=0.5,
    ),
    # It reads the probability from its configuration in every forward pass.
    "persimmon": transformers.PersimmonConfig(**SMALL, intermediate_size=32, attention_dropout=0.5),
    "bart": transformers.BartConfig(
        vocab_size=99,
        d_model=32,
        decoder_layers=4,
        decoder_attention_heads=4,
        decoder_ffn_dim=32,
        decoder_layerdrop=0.5,
        is_decoder=True,
        is_encoder_decoder=False,
    ),
}


@pytest.mark.parametrize("family", DROPPING)
def test_training_mode_computes_what_the_untouched_model_computes_in_evaluation_mode(family):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(DROPPING[family])
    ids = torch.arange(20)[None]
    expected = model.eval()(ids).logits
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)
    before, state = model.config.to_dict(), torch.random.get_rng_state()
    disable_dropout(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.config.to_dict() == before
    for module in (model, copy.deepcopy(model)):
        assert torch.equal(module.train()(ids).logits, expected)
        assert torch.equal(module.eval()(ids).logits, expected)


@pytest.mark.parametrize("family", ["gpt2", "phimoe"])
def test_a_checkpoint_keeps_the_configuration_of_the_model_it_started_from(family, tmp_path):
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(DROPPING[family]).save_pretrained(tmp_path / "0")
    player = Player(0, str(tmp_path / "0"), "")
    model = load_model(player, ModelConfig(path="x"), dtype=torch.float32, device=CPU)
    model.save_pretrained(tmp_path / "1")
    start, trained = (json.loads((tmp_path / i / "config.json").read_text()) for i in ("0", "1"))
    kept = {key: value for key, value in start.items() if "drop" in key or "jitter" in key}
    assert 0.5 in kept.values()
    assert {key: trained[key] for key in kept} == kept


def test_rope_of_one_kind_of_layers_counts_too():
    rope = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    rope |= {"full_attention": {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0}}
    config = transformers.Gemma3TextConfig(rope_parameters=rope, max_position_embeddings=64)
    assert why_length_matters(config, 64) is None
    assert "beyond 64 tokens, the dynamic RoPE" in why_length_matters(config, 65)


def test_rope_that_depends_on_the_batch_is_refused(settings, tmp_path):
    folder = save_model(tmp_path / "m", "llama")
    config = json.loads((folder / "config.json").read_text())
    for kind in ("dynamic", "longrope"):
        rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 1e4}
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4} if kind == "longrope" else {}
        rope |= {"original_max_position_embeddings": 128}
        (folder / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
        check(settings, folder, max_length=128)
        with refused("max_length", 200, 128, kind):
            check(settings, folder, max_length=200)


def test_damaged_weights_are_refused_before_anything_is_written(settings, tmp_path):
    folder = save_model(tmp_path / "m")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-500])
    with refused("model.safetensors"):
        check(settings, folder)
    weights.write_bytes(b"nonsense" + whole[8:])
    with refused("model.safetensors"):
        check(settings, folder)
    weights.unlink()
    with refused(folder):
        check(settings, folder)


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


REASON = {"reason": re.compile(r"(?<=\().*(?=\))")}


@pytest.mark.parametrize("text", ["[]", "3", "{", "{}", '{"model_type": "nope"}'])
def test_a_config_that_transformers_cannot_read(settings, tmp_path, text):
    folder = save_model(tmp_path / "m")
    (folder / "config.json").write_text(text)
    with refused(folder, "config.json", hide=REASON):
        check(settings, folder)


def test_a_config_of_a_wrong_type(settings, tmp_path):
    folder = save_model(tmp_path / "m")
    edit_config(folder, vocab_size="many")
    with refused(folder, "config.json", hide=REASON):
        check(settings, folder)
    edit_config(folder, vocab_size=320, num_attention_heads=0)
    with refused(folder, "config.json", hide=REASON):
        check(settings, folder)


def test_weights_of_other_shapes_than_the_config(settings, tmp_path):
    folder = save_model(tmp_path / "m")
    edit_config(folder, intermediate_size=48)
    with refused(folder, "mlp.down_proj.weight", "(32, 64)", "(32, 48)"):
        check(settings, folder)


def test_a_config_with_fewer_tokens_than_the_weights(settings, tmp_path):
    folder = save_model(tmp_path / "m")
    edit_config(folder, vocab_size=100)
    with refused(folder, "embed_tokens.weight", "(320, 32)", "(100, 32)"):
        check(settings, folder)


def test_weights_that_are_missing_are_found_before_they_are_loaded(settings, tmp_path):
    model = make_model("llama")
    state = {k: v for k, v in model.state_dict().items() if "layers.1.mlp" not in k}
    model.save_pretrained(tmp_path / "m", state_dict=state)
    with refused("model.layers.1.mlp", tmp_path):
        check(settings, tmp_path / "m")


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq"])
def test_quantised_weights(settings, tmp_path, method, monkeypatch):
    folder = save_model(tmp_path / "m")
    how = {"quant_method": method, "load_in_4bit": True, "bits": 4, "group_size": 128}
    edit_config(folder, quantization_config=how)
    with refused(folder, "quantised", method):
        check(settings, folder)
    monkeypatch.setattr(
        transformers.quantizers.quantizer_bnb_4bit, "is_bitsandbytes_available", lambda: False
    )
    with refused(folder, "quantised", hide=REASON):
        check_model(ModelConfig(path=str(folder)))


def test_pickled_weights_need_permission(settings, tmp_path):
    folder = save_model(tmp_path / "m", "llama")
    torch.save(make_model("llama").state_dict(), folder / "pytorch_model.bin")
    check(settings, folder)  # beside safetensors, nobody reads them
    (folder / "model.safetensors").unlink()
    with refused(folder, "model.allow_pickle"):
        check(settings, folder)
    player = Player(0, str(folder), "")
    with pytest.raises(OSError, match="safetensors"):
        load_model(player, ModelConfig(path="x"), dtype=torch.float32, device=CPU)
    allowed = ModelConfig(path=str(folder), allow_pickle=True)
    check_model(allowed, is_trained=True)
    model = load_model(player, allowed, dtype=torch.float32, device=CPU)
    assert torch.equal(model.lm_head.weight, make_model("llama").cpu().lm_head.weight)
    code = b"cposix\nsystem\n(S'touch %s'\ntR." % bytes(tmp_path / "touched")
    (folder / "pytorch_model.bin").write_bytes(code)
    with refused(folder, "not run"):
        load_model(player, allowed, dtype=torch.float32, device=CPU)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("header", ["[]", '{"x": []}', '{"x": {"data_offsets": 3}}'])
def test_a_safetensors_header_of_another_form(settings, tmp_path, header):
    folder = save_model(tmp_path / "m")
    content = len(header).to_bytes(8, "little") + header.encode()
    (folder / "model.safetensors").write_bytes(content)
    with refused("model.safetensors"):
        check(settings, folder)


def test_a_model_without_a_limit_of_positions(settings, tmp_path):
    folder = tmp_path / "xlnet"
    config = transformers.XLNetConfig(vocab_size=320, d_model=32, n_layer=2, n_head=4, d_inner=64)
    assert config.max_position_embeddings == -1
    transformers.XLNetLMHeadModel(config).save_pretrained(folder)
    check(settings, folder)


def test_a_vocabulary_that_is_too_small(model_folder):
    model = ModelConfig(path=str(model_folder))
    found = check_model(model)
    check_vocabulary(model, found, 319)
    with refused(model_folder, 320):
        check_vocabulary(model, found, 320)


def test_an_attention_that_is_not_there(settings, model_folder):
    for name in ("foo", "flash_attention_2"):
        settings["model"] = {"path": str(model_folder), "attn_implementation": name}
        with refused(
            "model.attn_implementation", name, hide={"reason": re.compile("(?<=used: ).*")}
        ):
            check_model(RunConfig.load(settings).model)


def test_an_unreadable_generation_config_is_not_taken_for_an_absent_one(tmp_path):
    folder = save_model(tmp_path / "m")
    (folder / "generation_config.json").write_text("{")
    config = ModelConfig(path=str(folder))
    with refused(folder, "generation_config.json", hide={"reason": re.compile("(?<=json: ).*")}):
        stop_token_ids(config, load_tokenizer(config))


def test_stop_tokens_are_the_tokenizers_and_the_generation_configs(tmp_path):
    folder = save_model(tmp_path / "m")
    config = ModelConfig(path=str(folder))
    assert stop_token_ids(config, load_tokenizer(config)) == (4,)
    published = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(published | {"eos_token_id": [4, 0]}))
    assert stop_token_ids(config, load_tokenizer(config)) == (4, 0)
    chosen = ModelConfig(path=str(folder), eos_token="<|bos|>")
    assert stop_token_ids(chosen, load_tokenizer(chosen)) == (5, 4, 0)
    with refused("model.eos_token", "<nope>"):
        load_tokenizer(ModelConfig(path=str(folder), eos_token="<nope>"))


def test_no_end_of_sequence_token_at_all(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    config = ModelConfig(path=str(tmp_path))
    with refused("model.eos_token"):
        stop_token_ids(config, load_tokenizer(config))


def test_a_folder_without_a_tokenizer(tmp_path):
    make_model().save_pretrained(tmp_path)
    with refused(tmp_path):
        load_tokenizer(ModelConfig(path=str(tmp_path)))


def test_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto").type == "cpu"
    with refused("device", "cuda"):
        pick_device("cuda")


def test_a_loaded_model_has_no_dropout_in_training_mode(tmp_path):
    """SFT trains what is loaded; no trainer of ours switches its dropout off."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(DROPPING["gpt2"])
    model.save_pretrained(tmp_path)
    ids = torch.arange(20)[None]
    loaded = load_model(
        Player(0, str(tmp_path), "f"),
        ModelConfig(path=str(tmp_path)),
        dtype=torch.float32,
        device=CPU,
    )
    assert not loaded.training
    assert torch.equal(loaded.train()(ids).logits, model.eval()(ids).logits)
