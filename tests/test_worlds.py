"""The worlds: targets are what they should be, and what is written can be run."""

from __future__ import annotations

import json
import random

import pytest
import torch
from transformers import AutoTokenizer

from tpaw.config.schema import RunConfig
from tpaw.evaluation.checker import checker_of
from tpaw.pipeline.preflight import read_inputs
from worlds import (
    by_kind,
    counts,
    endings,
    few_answers,
    fork,
    longer_walks,
    noisy_walks,
    old_skills,
    unequal,
    walks,
)
from worlds.making import END, PAD, Row, character_tokenizer, make, small_model

WORLDS = [counts, endings, fork, longer_walks, noisy_walks, old_skills, unequal, walks]
ROWS = 2000


def rows_of(module):
    rng = random.Random(0)
    return [module.WORLD.draw(rng) for _ in range(ROWS)]


@pytest.mark.parametrize(
    ("module", "share"),
    [
        (counts, 1),
        (endings, 1),
        (fork, 0.4),
        (longer_walks, 1),
        (noisy_walks, 2 / 3),
        (old_skills, 1),
        (unequal, 1),
        (walks, 1),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_the_share_of_right_targets(module, share):
    right = [module.WORLD.is_right(*row, row.target) for row in rows_of(module)]
    assert sum(right) / ROWS == pytest.approx(share, abs=3 * (share * (1 - share) / ROWS) ** 0.5)


@pytest.mark.parametrize(
    ("module", "prompt", "target", "wrong"),
    [
        (walks, "29 to 46:", " +5=34 +9=43 +3=46", " +5=34 +9=43 +3=45"),
        (walks, "29 to 46:", " +9=38 +9=47 -1=46", " +9=38 +9=47 -1=47"),
        (walks, "29 to 30:", " +9=38 -9=29 +1=30", " +1=30"),  # a single step
        (longer_walks, "29 to 46:", " +5=34 +9=43 -2=41 +5=46", " +5=34 +9=43 +3=46"),
        (counts, "cabdaa:", "abababababababcd", "abababababababad"),
        (counts, "cabdaa:", "cdcdcdcdcdcdcdcd", "cdcdcdcdcdcdcd"),  # too short
        (fork, "kxqa:", "=aqxk", "=axqk"),
        (endings, "7 to 10:", " 7 8 9 10", " 7 8 10"),
        (unequal, "back kxqa:", "=aqxk", "=akqx"),
        (old_skills, "sort kxqa:", "=akqx", "=aqxk"),
    ],
)
def test_right_and_wrong_responses(module, prompt, target, wrong):
    assert module.WORLD.is_right(prompt, target, target)
    assert not module.WORLD.is_right(prompt, target, wrong)


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


def test_how_often_the_rare_kind_is_drawn(tmp_path):
    def share_of_sort(draw):
        rng = random.Random(0)
        return sum(draw(rng).prompt.startswith("sort ") for _ in range(ROWS)) / ROWS

    assert share_of_sort(unequal.WORLD.draw) == pytest.approx(0.05, abs=0.02)
    assert share_of_sort(unequal.WORLD.draw_heldout) == pytest.approx(0.5, abs=0.04)
    assert share_of_sort(old_skills.WORLD.draw) == pytest.approx(0.5, abs=0.04)
    assert share_of_sort(old_skills.WORLD.draw_row) == 1
    make(old_skills.WORLD._replace(rows=50), tmp_path, steps=2)
    kinds = {
        name: {json.loads(line)["prompt"][:4] for line in (tmp_path / f"{name}.jsonl").open()}
        for name in ("train", "heldout", "tuning")
    }
    assert kinds == {"train": {"sort"}, "heldout": {"back", "sort"}, "tuning": {"back", "sort"}}


@pytest.fixture(scope="module")
def policies():
    """π_1 and π_0: two untrained models."""
    tokenizer = character_tokenizer(walks.WORLD.characters)
    return [
        few_answers.Policy(small_model(tokenizer, seed, layers=1, width=32).eval(), tokenizer)
        for seed in (0, 1)
    ]


def test_the_log_prob_of_an_answer_is_the_sum_of_its_tokens(policies):
    rows = [*rows_of(walks)[:3], Row("7 to 8:", "")]
    policy = policies[0]
    slow = []
    for row in rows:
        prompt, target = (policy.tokenizer(text).input_ids for text in row)
        ids = [*prompt, *target, policy.tokenizer.eos_token_id]
        logps = policy.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        slow.append(sum(logps[i - 1, ids[i]].item() for i in range(len(prompt), len(ids))))
    assert policy.logps(rows).tolist() == pytest.approx(slow, rel=1e-5)


def test_which_answer_is_chosen(policies):
    first, base = policies
    prompts = ["1 to 4:", "1 to 6:"]
    right = [" +1=2 +1=3 +1=4", " +1=2 +2=4 +2=6"]
    answers = [[" +1=2", " +3=3 +1=4 +2=6"], right, [" +1=2 +1=3", "7"]]

    def chosen(choice):
        rows = few_answers.chosen_by(choice, prompts, answers, first, base)
        assert [row.prompt for row in rows] == prompts
        return [row.target for row in rows]

    def best(reward):
        columns = zip(*answers, strict=True)
        return [
            max(texts, key=lambda t: reward(Row(prompts[i], t))) for i, texts in enumerate(columns)
        ]

    assert chosen("any") == answers[0]
    assert chosen("right, if one is") == right
    assert chosen("log π_1") == best(lambda row: first.logps([row]).item())
    assert chosen("log π_1 − log π_0") == best(
        lambda row: (first.logps([row]) - base.logps([row])).item()
    )


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


def test_right_responses_by_kind(tmp_path, monkeypatch, capsys):
    rows = ["back a:", "sort b:", "sort c:", "back d:", "sort e:"]
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in rows))
    right = {  # seed, iteration: of each row
        (0, 0): [1, 0, 0, 0, 0], (0, 2): [1, 1, 0, 1, 0],
        (1, 0): [1, 0, 0, 0, 0], (1, 2): [1, 1, 1, 0, 0],
    }  # fmt: skip
    for (seed, iteration), found in right.items():
        run = tmp_path / "study" / "runs" / "tpaw" / f"seed-{seed}"
        folder = run / "iterations" / str(iteration) / "evaluation"
        folder.mkdir(parents=True)
        lines = [json.dumps({"id": f"{i}-x", "correct": bool(c)}) for i, c in enumerate(found)]
        for name in ("exact_match", "exact_match_at_1"):
            (folder / f"{name}.jsonl").write_text("\n".join(reversed(lines)))
        (run / "config.yaml").write_text(
            json.dumps({"iterations": 2, "evaluate": {"data": {"path": str(heldout)}}})
        )
    monkeypatch.setattr("sys.argv", ["by_kind", str(tmp_path / "study")])
    by_kind.main()
    start, last = capsys.readouterr().out.splitlines()
    assert start.startswith("θ_0: back, greedy 0.500 ± 0.000  sort, greedy 0.000 ± 0.000")
    # 2/2 and 1/2 of back, 1/3 and 2/3 of sort.
    assert last.startswith("tpaw: back, greedy 0.750 ± 0.354  sort, greedy 0.500 ± 0.236")
