"""Whole runs whose players are adapters over one base."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from builders import (
    contents,
    make_tokenizer,
    run_settings,
    save_adapter,
    save_model,
    stopped_at_step,
)
from messages import refused
from oracles import expected_logps
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import tpaw.pipeline.players
from tpaw.config.schema import ModelConfig, RunConfig
from tpaw.data.inputs import load_inputs
from tpaw.data.token_ids import TokenSequence
from tpaw.generation.responses import read_responses
from tpaw.models.fingerprint import adapter_fingerprint, fingerprint
from tpaw.models.initial import initial_player
from tpaw.models.loading import load_model
from tpaw.models.references import find_checkpoint, find_checkpoints
from tpaw.scoring.store import LogprobStore, sequence_key
from tpaw.selfplay import self_play
from tpaw.storage.artifacts import read_manifest, write_manifest
from tpaw.storage.run_directory import RunDirectory
from tpaw.training.trainer import TeamTrainer
from tpaw.training.triples import Triples

CPU = torch.device("cpu")


def with_adapters(model_folder, data_file, heldout_file, **adapter):
    settings = run_settings(model_folder, data_file, heldout_file) | {"iterations": 2}
    settings["model"] |= {"adapter": {"rank": 4} | adapter}
    settings["train"] |= {"learning_rate": 1e-2}
    return settings


@pytest.fixture(scope="module")
def played(tmp_path_factory, model_folder, data_file, heldout_file):
    """A run of two iterations; how often a base was loaded; the policies' tensors at each end."""
    config = RunConfig.load(with_adapters(model_folder, data_file, heldout_file))
    folder, loaded, seen = tmp_path_factory.mktemp("adapters") / "run", [], []
    with pytest.MonkeyPatch.context() as patch:
        load_base, save = tpaw.pipeline.players.load_base, TeamTrainer.save_model

        def counted(*args, **kwargs):
            loaded.append(load_base(*args, **kwargs))
            return loaded[-1]

        def noted(trainer, *args, **kwargs):
            frozen = (p for p in trainer.model.parameters() if not p.requires_grad)
            seen.append({p.data_ptr(): p.detach().clone() for p in frozen})
            return save(trainer, *args, **kwargs)

        patch.setattr(tpaw.pipeline.players, "load_base", counted)
        patch.setattr(TeamTrainer, "save_model", noted)
        last = self_play(config, folder)
    assert last.index == 2
    return RunDirectory(folder), config, loaded, seen


def log(run, i):
    return [json.loads(line) for line in run.training_log(i).open()]


def test_the_base_is_loaded_once_and_never_changes(played, model_folder):
    _, _, loaded, seen = played
    assert len(loaded) == 1
    original = load_file(model_folder / "model.safetensors")
    # It wears θ_2, which was evaluated last.
    base = {n: p for n, p in loaded[0].named_parameters() if "lora" not in n}
    assert len(base) == len(original)
    for name, weight in base.items():
        assert torch.equal(weight, original[name.replace(".base_layer", "")]), name
        assert not weight.requires_grad
    assert len(seen) >= 2
    for frozen in seen:  # the policies of both iterations are made of the same tensors
        assert frozen.keys() == {p.data_ptr() for p in base.values()}


def test_checkpoints_are_adapters_in_pefts_layout(played, model_folder):
    run, *_ = played
    for i in (1, 2):
        names = {path.name for path in run.checkpoint(i).iterdir()}
        assert names >= {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"}
        assert names >= {"generation_config.json", "manifest.json"}
        assert not names & {"model.safetensors", "config.json", "training_args.bin", "README.md"}
        weights = load_file(run.checkpoint(i) / "adapter_model.safetensors")
        assert {w.dtype for w in weights.values()} == {torch.float32}
        config = json.loads((run.checkpoint(i) / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (4, 8)
        assert config["base_model_name_or_path"] == str(model_folder)
        assert config["target_modules"] == sorted(config["target_modules"])
        assert AutoTokenizer.from_pretrained(run.checkpoint(i)).chat_template
    first, second = (load_file(run.checkpoint(i) / "adapter_model.safetensors") for i in (1, 2))
    assert first.keys() == second.keys()
    assert all(not torch.equal(first[name], second[name]) for name in first)


def test_a_player_is_the_base_and_its_adapter(played, model_folder):
    run, *_ = played
    base = fingerprint(model_folder)
    players = [c.player for c in find_checkpoints(str(run.root))]
    assert [p.index for p in players] == [0, 1, 2]
    assert {p.base_folder for p in players} == {str(model_folder)}
    assert [p.adapter_folder for p in players] == [
        None,
        str(run.checkpoint(1)),
        str(run.checkpoint(2)),
    ]
    assert players[0].fingerprint == base
    for player in players[1:]:
        folder = run.checkpoint(player.index)
        assert player.fingerprint == adapter_fingerprint(base, folder)
        assert read_manifest(folder)["base"] == base


def test_rewards_of_the_first_step_are_exactly_0(played):
    run, *_ = played
    for i in (1, 2):
        first = log(run, i)[0]
        assert first["rewards/target/player_0"] == 0
        assert first["rewards/generated/player_0"] == 0
        assert first["weights/target"] > 0
        assert log(run, i)[-1]["rewards/target/player_0"] != 0
    # θ_1 has moved away from θ_0, which has no adapter.
    assert log(run, 2)[0]["rewards/target/player_1"] != 0


def test_stored_log_probs_are_those_of_the_merged_model_one_row_at_a_time(played):
    run, config, *_ = played
    inputs = load_inputs(run.inputs, config)
    answers = read_responses(run.responses(2))
    for checkpoint in find_checkpoints(str(run.root))[:2]:
        merged = load_model(
            checkpoint.player, ModelConfig(path="x"), dtype=torch.float32, device=CPU
        )
        store = LogprobStore(run.logprobs(checkpoint.player.fingerprint))
        sequences = [
            TokenSequence(example.prompt_ids, ids)
            for example, response, _ in Triples(inputs.examples, [(1, answers)])[:4]
            for ids in (example.target_ids, response.token_ids)
        ]
        expected = expected_logps(merged.double(), sequences)
        found = store.logps([sequence_key(sequence) for sequence in sequences])
        assert torch.allclose(torch.from_numpy(found), expected, atol=1e-5)


@pytest.mark.parametrize("each", ["continue", "fresh"])
def test_stopped_and_resumed_it_gives_the_same_bytes(
    tmp_path, played, model_folder, data_file, heldout_file, each
):
    settings = with_adapters(model_folder, data_file, heldout_file, each_iteration=each)
    whole = played[0]
    if each == "fresh":
        settings["evaluate"] = {}
        whole = RunDirectory(tmp_path / "whole")
        self_play(RunConfig.load(settings), whole.root)
    config = RunConfig.load(settings)
    stopped_at_step(2, config, tmp_path / "stopped")
    saved = RunDirectory(tmp_path / "stopped").last_saved_step(1)
    names = {path.name for path in saved.iterdir()}
    assert "adapter_model.safetensors" in names
    assert "model.safetensors" not in names  # the base is not saved again
    self_play(config, tmp_path / "stopped")
    files = contents(whole.root)
    assert "iterations/2/checkpoint/adapter_model.safetensors" in files
    assert contents(tmp_path / "stopped") == files
    for i in (1, 2):
        assert log(whole, i) == log(RunDirectory(tmp_path / "stopped"), i)
    if each == "fresh":
        fresh_ranks_go_on_top(whole)


def fresh_ranks_go_on_top(run):
    first, second = (load_file(run.checkpoint(i) / "adapter_model.safetensors") for i in (1, 2))
    for name, weight in first.items():
        if "lora_A" in name:
            assert torch.equal(second[name][:4], weight)
            assert second[name].shape[0] == 8
        else:
            assert torch.equal(second[name][:, :4], weight)
            assert second[name][:, 4:].any()  # the new ranks have learned
    config = json.loads((run.checkpoint(2) / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 16)
    assert log(run, 2)[0]["rewards/target/player_0"] == 0


def test_weight_decay_does_not_reach_earlier_ranks(tmp_path, model_folder, data_file, heldout_file):
    base = save_adapter(tmp_path / "sft", model_folder)
    settings = with_adapters(model_folder, data_file, heldout_file, each_iteration="fresh")
    settings |= {"iterations": 1, "evaluate": {}}
    settings["model"]["path"] = str(base)
    settings["train"] |= {
        "optimizer": "adamw_torch",
        "training_arguments": {"weight_decay": 0.5},
        "activation_checkpointing": True,
    }
    self_play(RunConfig.load(settings), tmp_path / "run")
    run = RunDirectory(tmp_path / "run")
    before, after = (
        load_file(folder / "adapter_model.safetensors") for folder in (base, run.checkpoint(1))
    )
    for name, weight in before.items():
        ranks = after[name][:4] if "lora_A" in name else after[name][:, :4]
        assert torch.equal(ranks, weight)


def test_bf16_trains_fp32_adapters_over_a_bf16_base(
    tmp_path, model_folder, data_file, heldout_file, monkeypatch
):
    settings = with_adapters(model_folder, data_file, heldout_file)
    settings |= {"iterations": 1, "precision": "bf16", "evaluate": {}}
    settings["train"]["learning_rate"] = 1e-6  # bf16 weights would not move
    policies, train = [], TeamTrainer.train

    def noted(trainer, *args, **kwargs):
        policies.append({n: p.dtype for n, p in trainer.model.named_parameters()})
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        result = train(trainer, *args, **kwargs)
        moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
        assert moved == {n for n, p in trainer.model.named_parameters() if p.requires_grad}
        return result

    monkeypatch.setattr(TeamTrainer, "train", noted)
    self_play(RunConfig.load(settings), tmp_path / "run")
    [types] = policies
    assert {d for n, d in types.items() if "lora" in n} == {torch.float32}
    assert {d for n, d in types.items() if "lora" not in n} == {torch.bfloat16}


def test_an_sft_adapter_goes_on_or_is_merged(tmp_path, model_folder, data_file, heldout_file):
    sft = save_adapter(tmp_path / "sft", model_folder)
    settings = with_adapters(model_folder, data_file, heldout_file)
    settings |= {"iterations": 1, "evaluate": {}}
    settings["model"]["path"] = str(sft)
    last = self_play(RunConfig.load(settings), tmp_path / "run")
    run = RunDirectory(tmp_path / "run")
    start = find_checkpoint(f"{run.root}@0").player
    assert (start.base_folder, start.adapter_folder) == (str(model_folder), str(sft))
    assert last.base == start.base
    config = json.loads((run.checkpoint(1) / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model_folder)
    assert log(run, 1)[0]["rewards/target/player_0"] == 0

    settings["model"]["adapter"] = None
    whole = self_play(RunConfig.load(settings), tmp_path / "full")
    full = RunDirectory(tmp_path / "full")
    assert whole.base is None
    assert log(full, 1)[0]["rewards/target/player_0"] == 0
    assert AutoModelForCausalLM.from_pretrained(full.checkpoint(1)) is not None
    # Both start as the same player.
    assert log(full, 1)[0]["logps/target"] == pytest.approx(log(run, 1)[0]["logps/target"], 1e-5)


def test_an_adapter_of_a_base_in_4_bits_needs_that_base(
    tmp_path, model_folder, data_file, heldout_file
):
    sft = save_adapter(tmp_path / "sft", model_folder)
    base = fingerprint(model_folder)
    write_manifest(sft, {"base": base, "quantization": "nf4"})
    settings = with_adapters(model_folder, data_file, heldout_file)
    settings["model"] = {"path": str(sft)}
    with refused(sft, "nf4", "model.quantization", "tpaw export --merge"):
        self_play(RunConfig.load(settings), tmp_path / "run")


def test_an_adapter_that_cannot_be_merged_is_refused(
    tmp_path, model_folder, data_file, heldout_file
):
    prompts = save_adapter(tmp_path / "prompts", model_folder)
    file = prompts / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"peft_type": "PROMPT_TUNING"}))
    settings = with_adapters(model_folder, data_file, heldout_file)
    settings["model"] = {"path": str(prompts)}
    with refused(prompts, "PROMPT_TUNING", "LORA"):
        self_play(RunConfig.load(settings), tmp_path / "run")


def test_a_finished_run_is_read_without_its_base(tmp_path, model_folder, data_file, heldout_file):
    base = shutil.copytree(model_folder, tmp_path / "base")
    settings = with_adapters(base, data_file, heldout_file)
    settings |= {"iterations": 1, "evaluate": {}}
    settings["model"]["path"] = str(save_adapter(tmp_path / "sft", base))
    self_play(RunConfig.load(settings), tmp_path / "run")
    shutil.rmtree(base)
    shutil.rmtree(tmp_path / "sft")
    found = find_checkpoint(f"{tmp_path / 'run'}@1").player
    assert found.base_folder == str(base)


def test_another_base_in_the_place_of_the_runs_is_refused(played, tmp_path, data_file):
    run, config, *_ = played
    copy = shutil.copytree(run.root, tmp_path / "run")
    other = save_model(tmp_path / "other", seed=7)
    changed = config.model_copy(
        update={"model": config.model.model_copy(update={"path": str(other)})}
    )
    with refused(other, "θ_0"):
        initial_player(changed.model, RunDirectory(copy).initial_player_file)


@pytest.mark.parametrize("with_adapter", [True, False])
def test_an_adapter_of_another_base_ends_a_run_before_it_begins(
    tmp_path, model_folder, data_file, heldout_file, with_adapter
):
    wide = tmp_path / "wide"
    LlamaForCausalLM(
        LlamaConfig(
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=320,
        )
    ).save_pretrained(wide)
    make_tokenizer().save_pretrained(wide)
    sft = save_adapter(tmp_path / "sft", wide)
    file = sft / "adapter_config.json"
    own = json.loads(file.read_text())
    file.write_text(json.dumps(own | {"base_model_name_or_path": str(model_folder)}))
    settings = with_adapters(model_folder, data_file, heldout_file)
    settings["model"] = {"path": str(sft)} | ({"adapter": {"rank": 4}} if with_adapter else {})
    with refused("model.path", sft, model_folder):
        self_play(RunConfig.load(settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_method_sft(tmp_path, model_folder, data_file, heldout_file):
    settings = with_adapters(model_folder, data_file, heldout_file)
    settings |= {"method": "sft", "precision": "bf16", "iterations": 1}
    self_play(RunConfig.load(settings), tmp_path / "sft")
    weights = load_file(RunDirectory(tmp_path / "sft").checkpoint(1) / "adapter_model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32}
    assert all(w.any() for w in weights.values())


def test_a_checkpoint_answers_and_stands_alone(played, tmp_path, model_folder):
    run, *_ = played
    alone = find_checkpoint(str(run.checkpoint(2)))
    inside = find_checkpoint(f"{run.root}@2")
    assert alone.player.fingerprint == inside.player.fingerprint
    assert alone.player.base_folder == str(model_folder)
    ids = torch.arange(5, 30)[None]
    with torch.no_grad():
        first, second = (
            load_model(c.player, c.model, dtype=torch.float32, device=CPU)(input_ids=ids).logits
            for c in (alone, inside)
        )
    assert torch.equal(first, second)


def test_a_checkpoint_answers_and_is_compared(played, tmp_path, tpaw_):
    run, *_ = played
    code, _, err = tpaw_("answer", f"{run.root}@2", "-o", tmp_path / "answers")
    assert code == 0, err
    code, _, err = tpaw_("compare", f"{run.root}@0", f"{run.root}@2")
    assert code == 0, err


def test_export_writes_the_player_as_a_model(played, tmp_path, tpaw_):
    run, *_ = played
    code, _, err = tpaw_("export", f"{run.root}@2", "--merge", "-o", tmp_path / "model")
    assert code == 0, err
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    found = find_checkpoint(f"{run.root}@2")
    player = load_model(found.player, found.model, dtype=torch.float32, device=CPU)
    ids = torch.arange(5, 30)[None]
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, player(input_ids=ids).logits, atol=1e-5)


def test_with_a_base_in_4_bits(tmp_path, model_folder, data_file, heldout_file, tpaw_, monkeypatch):
    pytest.importorskip("bitsandbytes")
    settings = with_adapters(model_folder, data_file, heldout_file)
    settings["model"] |= {"quantization": "nf4"}
    settings["evaluate"] = {}
    config = RunConfig.load(settings)
    bases, load_base = [], tpaw.pipeline.players.load_base

    def counted(*args, **kwargs):
        bases.append(load_base(*args, **kwargs))
        return bases[-1]

    monkeypatch.setattr(tpaw.pipeline.players, "load_base", counted)
    self_play(config, tmp_path / "run")
    [base] = bases
    assert base.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8  # at the end as before
    run = RunDirectory(tmp_path / "run")
    assert log(run, 2)[0]["rewards/target/player_0"] == 0
    assert log(run, 2)[-1]["rewards/target/player_0"] != 0
    assert read_manifest(run.checkpoint(2))["quantization"] == "nf4"
    # The checkpoint alone, in the run, and as an ordinary model compute the same.
    code, _, err = tpaw_("export", f"{run.root}@2", "--merge", "-o", tmp_path / "model")
    assert code == 0, err
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    ids = torch.arange(5, 30)[None]
    found = [find_checkpoint(name) for name in (f"{run.root}@2", str(run.checkpoint(2)))]
    players = [load_model(c.player, c.model, dtype=torch.float32, device=CPU) for c in found]
    plain = load_model(found[0].player, ModelConfig(path="x"), dtype=torch.float32, device=CPU)
    with torch.no_grad():
        logits = [m(input_ids=ids).logits for m in (model, *players, plain)]
    assert torch.allclose(logits[0], logits[1], atol=1e-5)
    assert torch.equal(logits[1], logits[2])
    assert not torch.allclose(logits[0], logits[3], atol=1e-3)  # it is not the model in 16 bits
