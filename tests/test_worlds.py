"""The worlds: targets are what they should be, and what is written can be run."""

from __future__ import annotations

import json
import random

import pytest
from transformers import AutoTokenizer

from tpaw.config.schema import RunConfig
from tpaw.evaluation.checker import checker_of
from tpaw.pipeline.preflight import read_inputs
from worlds import counts, endings, fork, noisy_walks, walks
from worlds.making import END, PAD, character_tokenizer, make

WORLDS = [counts, endings, fork, noisy_walks, walks]
ROWS = 2000


def rows_of(module):
    rng = random.Random(0)
    return [module.draw(rng) for _ in range(ROWS)]


@pytest.mark.parametrize(
    ("module", "share"),
    [(counts, 1), (endings, 1), (fork, 0.4), (noisy_walks, 2 / 3), (walks, 1)],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_the_share_of_right_targets(module, share):
    right = [module.is_right(*row, row.target) for row in rows_of(module)]
    assert sum(right) / ROWS == pytest.approx(share, abs=3 * (share * (1 - share) / ROWS) ** 0.5)


@pytest.mark.parametrize(
    ("module", "prompt", "target", "wrong"),
    [
        (walks, "29 to 46:", " +5=34 +9=43 +3=46", " +5=34 +9=43 +3=45"),
        (walks, "29 to 46:", " +9=38 +9=47 -1=46", " +9=38 +9=47 -1=47"),
        (walks, "29 to 30:", " +9=38 -9=29 +1=30", " +1=30"),  # a single step
        (counts, "cabdaa:", "abababababababcd", "abababababababad"),
        (counts, "cabdaa:", "cdcdcdcdcdcdcdcd", "cdcdcdcdcdcdcd"),  # too short
        (fork, "kxqa:", "=aqxk", "=axqk"),
        (endings, "7 to 10:", " 7 8 9 10", " 7 8 10"),
    ],
)
def test_right_and_wrong_responses(module, prompt, target, wrong):
    assert module.is_right(prompt, target, target)
    assert not module.is_right(prompt, target, wrong)


@pytest.mark.parametrize("module", WORLDS, ids=lambda module: module.__name__)
def test_every_character_is_a_token_after_loading_too(module, tmp_path):
    """transformers loads the tokenizer of a Qwen2 as byte-level BPE, whatever was saved."""
    character_tokenizer(module.WORLD.characters).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.pad_token, tokenizer.eos_token) == (PAD, END)
    for row in rows_of(module)[:100]:
        text = row.prompt + row.target
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert len(ids) == len(text)
        assert tokenizer.decode(ids) == text
        assert len(row.target) < module.WORLD.longest  # its end has room too


def test_what_is_written_can_be_run(tmp_path):
    make(fork.WORLD._replace(rows=50), tmp_path, steps=2)
    config = RunConfig.load(str(tmp_path / "recipe.yaml"))
    inputs = read_inputs(config)
    assert len(inputs.examples) == 50
    assert len(inputs.heldout) == 600
    assert checker_of(config.checker).can_check(inputs.examples)
    prompts = [
        {json.loads(line)["prompt"] for line in (tmp_path / f"{name}.jsonl").open()}
        for name in ("train", "heldout", "tuning")
    ]
    assert not prompts[0] & prompts[1]
    assert not prompts[0] & prompts[2]
    assert not prompts[1] & prompts[2]
