"""The worlds: targets are what they should be, and what is written can be run."""

from __future__ import annotations

import json
import random
from collections import Counter
from itertools import pairwise

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
    few_targets,
    fork,
    longer_walks,
    noisy_walks,
    old_skills,
    unequal,
    walks,
)
from worlds.making import END, PAD, Row, character_tokenizer, make, small_model, without_end

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


def test_the_one_answer_to_a_drawn_prompt():
    for prompt, target in rows_of(endings):
        first, last = map(int, prompt.rstrip(":").split(" to "))
        assert target.split() == [str(number) for number in range(first, last + 1)]
        assert target.startswith(" ")
    for module in (unequal, old_skills):
        for prompt, target in rows_of(module):
            kind, letters = prompt.rstrip(":").split()
            assert target[0] == "="
            if kind == "back":
                assert list(target[1:]) == [letters[-i] for i in range(1, len(letters) + 1)]
            else:
                assert all(one <= other for one, other in pairwise(target[1:]))
                assert Counter(target[1:]) == Counter(letters)


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
    prompts = [row.prompt for row in rows_of(walks)[:6]]
    right = [row.target for row in rows_of(walks)[:6]]
    answers = [[row.target for row in rows_of(walks)[i : i + 6]] for i in range(6, 60, 6)]
    answers[4] = right

    def chosen(choice):
        rows = few_answers.chosen_by(choice, prompts, answers, first, base)
        assert [row.prompt for row in rows] == prompts
        return [row.target for row in rows]

    def best(reward):
        columns = zip(*answers, strict=True)
        return [
            max(texts, key=lambda t: reward(Row(prompts[i], t))) for i, texts in enumerate(columns)
        ]

    expected = {
        "any": answers[0],
        "right, if one is": right,
        "log π_1": best(lambda row: first.logps([row]).item()),
        "log π_1 − log π_0": best(lambda row: (first.logps([row]) - base.logps([row])).item()),
        "−log π_0": best(lambda row: -base.logps([row]).item()),
    }
    assert len(set(map(tuple, expected.values()))) == len(expected)  # each reward is another one
    del expected["−log π_0"]
    assert {choice: chosen(choice) for choice in few_answers.CHOICES} == expected


def test_what_few_answers_trains_and_on_what(tmp_path, monkeypatch):
    make(walks.WORLD._replace(rows=1, width=32, layers=1), tmp_path, steps=1)
    sizes = {"TARGETS": 5, "PROMPTS": 20, "HELDOUT": 10, "SAMPLES": 2, "STEPS_OF_SFT": 2}
    for name, size in (sizes | {"STEPS_OF_CHOSEN": 1}).items():
        monkeypatch.setattr(few_answers, name, size)
    calls, trained = [], few_answers.Policy.trained

    def training(self, rows, *given):
        calls.append((self, rows, given, trained(self, rows, *given)))
        return calls[-1][3]

    monkeypatch.setattr(few_answers.Policy, "trained", training)
    found = few_answers.measure(tmp_path, 3)
    assert len(found) == 3 + len(few_answers.CHOICES)
    (base, targets, given, first), (again, same, *_), *others = calls
    assert (len(targets), given) == (5, (2, few_answers.RATE_OF_SFT, 3))
    assert base is not first
    assert again is first
    assert same == targets
    prompts = [row.prompt for row in others[0][1]]
    assert len(prompts) == 20
    assert not set(prompts) & {row.prompt for row in targets}
    for policy, rows, given, _ in others:
        assert policy is first
        assert [row.prompt for row in rows] == prompts
        assert given == (1, few_answers.RATE_OF_CHOSEN, 3)


def test_what_is_written_can_be_run(tmp_path):
    # So few prompts that rows drawn at random would be held-out ones too.
    make(walks.WORLD._replace(rows=50), tmp_path, steps=2)
    config = RunConfig.load(str(tmp_path / "recipe.yaml"))
    inputs = read_inputs(config)
    assert len(inputs.examples) == 50
    assert len(inputs.heldout) == 600
    assert checker_of(config.checker).can_check(inputs.examples)
    prompts = [
        {json.loads(line)["prompt"] for line in (tmp_path / f"{name}.jsonl").open()}
        for name in ("train", "heldout", "tuning")
    ]
    drawn = without_end(walks.draw, seed=3)
    assert {next(drawn).prompt for _ in range(50)} & (prompts[1] | prompts[2])
    assert not prompts[0] & prompts[1]
    assert not prompts[0] & prompts[2]
    assert not prompts[1] & prompts[2]


def test_few_targets_starts_from_sft_on_its_own_rows(tmp_path, monkeypatch):
    noisy, folder = tmp_path / "noisy", tmp_path / "few"
    make(noisy_walks.WORLD._replace(rows=1, width=32, layers=1), noisy, steps=1)
    monkeypatch.setattr(few_targets, "STEPS_OF_SFT", 20)
    few_targets.make(noisy, folder)
    config = RunConfig.load(str(folder / "recipe.yaml"))
    assert len(read_inputs(config).examples) == few_targets.TARGETS
    rows = {
        name: [
            Row(line["prompt"], line["completion"])
            for line in map(json.loads, (folder / f"{name}.jsonl").open())
        ]
        for name in ("train", "heldout", "tuning")
    }
    assert all(walks.is_right(*row, row.target) for part in rows.values() for row in part)
    prompts = Counter(row.prompt for part in rows.values() for row in part)
    assert prompts.total() == len(prompts) == 200 + 600 + 600
    before, after = map(few_answers.Policy.of, (noisy, folder))
    assert after.logps(rows["train"]).mean() > before.logps(rows["train"]).mean() + 1


def test_right_responses_by_kind(tmp_path, monkeypatch, capsys):
    rows = ["back a:", "sort b:", "sort c:", "back d:", "sort e:"]
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in rows))
    right = {  # seed, iteration: of each row
        (0, 0): [1, 0, 0, 0, 0], (0, 2): [1, 1, 0, 1, 0],
        (1, 0): [1, 0, 0, 0, 0], (1, 2): [1, 1, 1, 0, 0],
        (2, 0): [1, 1, 1, 1, 1], (2, 1): [1, 1, 1, 1, 1],  # stopped after the first of two
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
    stopped, start, last = capsys.readouterr().out.splitlines()
    assert stopped == "left out, not all iterations: tpaw, seed-2"
    assert start.startswith("θ_0: back, greedy 0.500 ± 0.000  sort, greedy 0.000 ± 0.000")
    # 2/2 and 1/2 of back, 1/3 and 2/3 of sort.
    assert last.startswith("tpaw: back, greedy 0.750 ± 0.354  sort, greedy 0.500 ± 0.236")
