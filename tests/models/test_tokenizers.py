"""Damaged files of a tokenizer are named, whatever transformers raises for them."""

from __future__ import annotations

import json

import pytest
from builders import save_model

from tpaw.config.schema import ModelConfig
from tpaw.errors import InputError
from tpaw.models.tokenizers import load_tokenizer, stop_token_ids


def rewrite(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "tokenizer_config.json").write_text("3"),
        lambda folder: (folder / "tokenizer_config.json").write_text("{"),
        lambda folder: (folder / "tokenizer.json").write_text("[]"),
        lambda folder: rewrite(folder / "tokenizer.json", added_tokens="x"),
        lambda folder: rewrite(folder / "tokenizer.json", model={"type": "BPE", "merges": 3}),
        lambda folder: rewrite(folder / "tokenizer_config.json", model_max_length="x"),
    ],
    ids=["number", "json", "list", "added", "merges", "length"],
)
def test_a_damaged_tokenizer(tmp_path, damage):
    folder = save_model(tmp_path / "m")
    damage(folder)
    with pytest.raises(InputError, match=f"model.path: {folder}: no usable tokenizer"):
        load_tokenizer(ModelConfig(path=str(folder)))


@pytest.mark.parametrize("content", ["3", "{", "[]", '{"eos_token_id": "abc"}'])
def test_a_damaged_generation_config(tmp_path, content):
    folder = save_model(tmp_path / "m")
    config = ModelConfig(path=str(folder))
    tokenizer = load_tokenizer(config)
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(InputError, match=r"generation_config\.json"):
        stop_token_ids(config, tokenizer)
