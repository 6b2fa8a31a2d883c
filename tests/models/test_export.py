"""Checkpoints as folders for other programs: whole or absent."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from builders import save_adapter, save_model
from messages import refused
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tpaw.models.export import export
from tpaw.models.references import find_checkpoint
from tpaw.storage.resources import resolve_path

IDS = torch.arange(5, 40)[None]


@pytest.fixture
def base(tmp_path):
    return save_model(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path, base):
    folder = save_adapter(tmp_path / "adapter", base)
    (folder / "generation_config.json").write_text('{"eos_token_id": [4, 7]}')
    return folder


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def test_merged_it_is_an_ordinary_model(adapter, base, tmp_path):
    export(find_checkpoint(str(adapter)), tmp_path / "out", "bf16", merge=True)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"model.safetensors", "config.json", "tokenizer.json", "generation_config.json"}
    assert not any("adapter" in name for name in names)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert model.generation_config.eos_token_id == [4, 7]
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    # Rounded once, from the sum in fp32.
    wanted = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    expected = wanted.merge_and_unload().state_dict()
    for name, weight in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(weight, expected[name].bfloat16()), name


@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_in_bf16_its_logits_differ_by_the_rounding_of_the_weights_alone(
    kind, finished, adapted, tmp_path
):
    """The policy is computed by transformers and PEFT; its weights are then rounded once."""
    run = {"whole": finished[0], "adapter": adapted}[kind]
    last = run.checkpoint({"whole": 4, "adapter": 1}[kind])
    if kind == "whole":
        policy = AutoModelForCausalLM.from_pretrained(last)
    else:
        base = AutoModelForCausalLM.from_pretrained(resolve_path("tpaw://starter/model"))
        policy = peft.PeftModel.from_pretrained(base, last).merge_and_unload()
    assert policy.dtype == torch.float32
    export(find_checkpoint(str(run.root)), tmp_path / "out", "bf16", merge=True)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {p.dtype for p in written.parameters()} == {torch.bfloat16}
    exact, found = logits(policy), logits(written.float())
    for parameter in policy.parameters():
        parameter.data = parameter.data.bfloat16().float()
    assert torch.equal(found, logits(policy))
    # A weight moves by 2^-9 of itself at most, and the logits by a little more.
    error = (found - exact).norm() / exact.norm()
    assert 0 < error < 20 * 2**-9


def test_a_model_without_a_run_has_no_model_card(tpaw_, base, finished, tmp_path):
    for name, reference in (("model", base), ("start", f"{finished[0].root}@0")):
        assert tpaw_("export", reference, "-o", tmp_path / name)[0] == 0
        assert not (tmp_path / name / "README.md").exists()


def test_without_merge_an_adapter_stays_one(adapter, base, tmp_path):
    export(find_checkpoint(str(adapter)), tmp_path / "out", "fp32", merge=False)
    saved, written = (
        load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "out")
    )
    assert saved.keys() == written.keys()
    assert all(torch.equal(saved[name], written[name]) for name in saved)
    model = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    player = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    assert torch.equal(logits(model), logits(player))


@pytest.mark.parametrize("merge", [False, True])
def test_a_whole_model_is_written_in_another_type(base, tmp_path, merge):
    export(find_checkpoint(str(base)), tmp_path / "out", "fp16", merge=merge)
    before, after = (load_file(f / "model.safetensors") for f in (base, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name].half()) for name in before)


def test_a_folder_with_files_is_refused_and_an_empty_one_is_used(base, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    export(find_checkpoint(str(base)), out, "fp32", merge=True)
    before = {path: path.read_bytes() for path in out.iterdir()}
    with refused("--output", out):
        export(find_checkpoint(str(base)), out, "bf16", merge=True)
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    with refused("--output", base / "config.json"):
        export(find_checkpoint(str(base)), base / "config.json", "bf16", merge=True)


def test_what_fails_leaves_nothing(adapter, tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise OSError("full")

    checkpoint = find_checkpoint(str(adapter))
    monkeypatch.setattr("tpaw.models.export.load_tokenizer", fails)  # after the weights
    with pytest.raises(OSError, match="full"):
        export(checkpoint, tmp_path / "out", "fp32", merge=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
