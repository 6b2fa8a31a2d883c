"""The bundled world: correct arithmetic, no leak, small, and as good as the recipe expects."""

from __future__ import annotations

import json
import re
from importlib.resources import files

import pytest
import torch
from transformers import AutoModelForCausalLM

from tpaw.config.schema import RunConfig
from tpaw.evaluation.exact_match import extract_answer, is_correct
from tpaw.generation.generator import SamplingParams
from tpaw.generation.hf import HFGenerator
from tpaw.pipeline.preflight import read_inputs
from tpaw.starter.problems import generate_problems, pattern

STARTER = files("tpaw") / "starter"


def rows(name):
    return [json.loads(line) for line in (STARTER / name).read_text().splitlines()]


def test_every_step_is_right_and_the_last_result_is_the_answer():
    for problem in generate_problems(500, seed=5):
        steps = re.findall(r"(\d+)([-+*/])(\d+)=(\d+)", problem.answer)
        assert len(steps) >= 2
        for a, sign, b, result in steps:
            a, b = int(a), int(b)
            expected = {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign]
            assert expected == int(result)
        assert extract_answer(problem.answer) == steps[-1][3]


def test_problems_follow_from_the_seed_and_never_repeat():
    first = generate_problems(300, seed=1)
    assert first == generate_problems(300, seed=1) != generate_problems(300, seed=2)
    questions = {problem.question for problem in first}
    assert len(questions) == 300
    assert not questions & {p.question for p in generate_problems(300, seed=2, exclude=questions)}


def test_the_bundled_rows_are_the_generators_and_held_out_rows_are_new():
    trained = generate_problems(8000, seed=0)
    assert [row["question"] for row in rows("train.jsonl")] == [p.question for p in trained[:1500]]
    heldout = {row["question"] for row in rows("heldout.jsonl")}
    tuning = {row["question"] for row in rows("tuning.jsonl")}
    assert len(heldout) == len(tuning) == 1200
    assert not (heldout | tuning) & {problem.question for problem in trained}
    assert not heldout & tuning


def test_no_problem_of_the_new_ones_is_a_training_problem_but_for_its_words():
    # By numbers and sentences alone: without the words of names, things, containers and verbs.
    def numbers_and_frame(question):
        words = ("more", "each", "times", "shares", "dollars", "Monday", "loose", "Then")
        return re.findall(r"\d+", question), tuple(w for w in words if w in question)

    heldout = [row["question"] for row in rows("heldout.jsonl")]
    new = [row["question"] for row in rows("heldout-new.jsonl")]
    trained = [problem.question for problem in generate_problems(8000, seed=0)]
    seen = {str(numbers_and_frame(question)) for question in trained}
    expected = [q for q in heldout if str(numbers_and_frame(q)) not in seen]
    assert new == expected
    assert 600 < len(new) < len(heldout)
    assert pattern("Ada finds 7 pens.") == pattern("Ben buys 7 eggs.") == "NAME GAINED 7 THINGS."


def test_the_bundle_is_small():
    model = sum(f.stat().st_size for f in (STARTER / "model").iterdir())
    assert model < 4 * 2**20


def test_the_model_is_unfinished_on_purpose():
    inputs = read_inputs(RunConfig.load("starter"))
    assert inputs.skipped == {"data": {}, "evaluate.data": {}}
    assert inputs.heldout_prompts_in_training() == 0
    heldout = inputs.heldout[:400]
    model = AutoModelForCausalLM.from_pretrained(str(STARTER / "model"), dtype=torch.float32)
    greedy = SamplingParams(0.0, 1.0, 0, 64, 256, inputs.stop_ids)
    completions = HFGenerator(model, 32768).generate(
        [example.prompt_ids for example in heldout], greedy, 0, lambda count: None
    )
    texts = [inputs.tokenizer.decode(c.token_ids, skip_special_tokens=True) for c in completions]
    correct = sum(is_correct(t, e.target_text) for t, e in zip(texts, heldout, strict=True))
    # 0.573 over all 1,200; four standard errors of 400.
    assert correct / 400 == pytest.approx(0.573, abs=0.1)
