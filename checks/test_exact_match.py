"""GSM8K's real test rows through lm-evaluation-harness, and its verdicts beside ours.

Needs data/gsm8k/{train,test}.jsonl.
"""

from __future__ import annotations

import random
import re

import lm_eval
import pytest
import yaml
from lm_eval.api.model import LM

import tpaw.evaluation.benchmarks.harness as harness
from tpaw.evaluation.benchmarks.suite import load_suite
from tpaw.evaluation.exact_match import extract_answer, is_correct


class Prepared(LM):
    """A model that says what it is told to, and remembers the prompts."""

    def __init__(self, completions):
        super().__init__()
        self.completions = completions
        self.prompts = []

    def generate_until(self, requests):
        self.prompts = [request.args[0] for request in requests]
        return self.completions

    def loglikelihood(self, requests):
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


@pytest.fixture(scope="module")
def gsm8k(shared, tmp_path_factory):
    """The harness's own gsm8k, 5-shot, over the files at hand."""
    folder = tmp_path_factory.mktemp("suite")
    data = shared / "data" / "gsm8k"
    task = {
        "include": f"{next(iter(lm_eval.__path__))}/tasks/gsm8k/gsm8k.yaml",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {part: str(data / f"{part}.jsonl") for part in ("train", "test")}
        },
    }
    (folder / "task.yaml").write_text(yaml.safe_dump(task))
    column = {"name": "GSM8K", "task": "task.yaml", "num_fewshot": 5}
    column["metric"] = "exact_match,strict-match"
    (folder / "suite.yaml").write_text(yaml.safe_dump({"name": "local", "tasks": [column]}))
    (loaded,) = harness.load_tasks(load_suite(str(folder / "suite.yaml"), trust=True))
    return loaded


def variants(answer, rng):
    """What a model might make of a reference answer."""
    text, _, number = answer.rpartition("#### ")
    other = str(int(number.replace(",", "")) + rng.choice([-10, -1, 1, 7]))
    grouped = f"{int(number.replace(',', '')):,}"
    return [
        answer,
        f"{text}#### {other}",
        f"{text}#### {grouped}",
        f"{text}#### {grouped}.",
        f"{text}#### {number}.0",
        f"{text}#### {number}..",
        f"{text}#### {number},",
        f"{text}#### ${number}",
        f"{text}#### -{number}",
        f"{text}####{number}",
        f"{text}####  {number}",
        f"{text}####\n{number}",
        f"{text}### {number}",
        f"{text}##### {number}",
        f"{text}#### {number} dollars",
        f"{text}#### about {number}",
        f"{text}#### {number}%\nSo it is {other}.",
        f"{text}#### {other}\n#### {number}",
        f"{text}#### {number}\n#### {other}",
        f"{text}#### nothing\n#### {number}",
        f"#### {number}\n{text}",
        f"{text}The answer is {number}.",
        text,
        "",
        "####",
        "#### ",
        "#### .",
        "#### -",
        f"{text}#### {number}\n\n",
        f"{text}#### {number}".upper(),
        re.sub(r"<<.*?>>", "", answer),
    ]


def test_verdicts_are_the_harness_own_item_by_item(gsm8k):
    rows = list(gsm8k.task.eval_docs)
    assert len(rows) == 1319
    rng = random.Random(0)
    kinds = len(variants(rows[0]["answer"], rng))
    for shift in (0, kinds // 2):  # each pass gives every kind to some forty rows
        completions = [
            variants(row["answer"], rng)[(shift + i) % kinds] for i, row in enumerate(rows)
        ]
        model = Prepared(completions)
        facts, items = harness.run_task(model, gsm8k, chat=False, fewshot_seed=1234)
        assert [item["completion"] for item in items] == completions
        for row, item in zip(rows, items, strict=True):
            ours = is_correct(item["completion"], row["answer"])
            assert item["correct"] == ours, (row["answer"][-30:], item["completion"][-60:])
        assert 0.1 < facts["value"] < 0.9
        assert facts["value"] == pytest.approx(sum(item["correct"] for item in items) / 1319)
    # Five solved examples, none of them the question.
    for prompt, row in zip(model.prompts, rows, strict=True):
        assert prompt.count("Question: ") == 6
        assert prompt.endswith(f"Question: {row['question']}\nAnswer:")


def test_every_reference_answer_is_right_and_can_be_read(gsm8k):
    for row in gsm8k.task.eval_docs:
        assert extract_answer(row["answer"]) == row["answer"].rpartition("#### ")[2].replace(
            ",", ""
        )
