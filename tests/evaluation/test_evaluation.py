from __future__ import annotations

import math

import numpy as np
import pytest
from builders import make_tokenizer

from tpaw.data.examples import Example
from tpaw.data.token_ids import token_ids
from tpaw.errors import InputError
from tpaw.evaluation.checker import ByFunction, ByNumber, checker_of
from tpaw.evaluation.exact_match import extract_answer, has_answers, is_correct
from tpaw.evaluation.heldout import (
    exact_match_items,
    exact_match_results,
    logp_items,
    logp_results,
    several_samples_results,
)
from tpaw.generation.generator import Completion
from tpaw.statistics.over_items import mcnemar, wilson_interval


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("48/2 = 24\n#### 72", "72"),
        ("#### 1,080", "1080"),
        ("#### 1,080.50", "1080.50"),
        ("#### $1,080.50", None),
        ("#### -3", "-3"),
        ("#### 72.", "72"),
        ("####5", None),
        ("####  5", None),
        ("####5\n#### 6", "6"),
        ("#### 5\n#### 6", "5"),
        ("the answer is 72", None),
        ("#### none", None),
        ("### 7", None),
        ("", None),
    ],
)
def test_answers_of_gsm8k(text, answer):
    assert extract_answer(text) == answer


def test_a_missing_answer_is_never_correct():
    assert is_correct("so\n#### 1,000", "#### 1000")
    assert not is_correct("1000", "#### 1000")
    assert not is_correct("no answer", "no answer")


def examples(*targets):
    return [
        Example(str(i), token_ids([1]), token_ids([2] * (i + 1)), "p", t)
        for i, t in enumerate(targets)
    ]


def test_exact_match_counts_item_by_item():
    tokenizer = make_tokenizer()
    rows = examples("#### 1", "#### 2", "#### 3", "#### 4")
    assert has_answers(rows)
    assert not has_answers([])
    assert not has_answers(examples("#### 1", "two"))
    texts = [("#### 1", "stop"), ("#### 5", "stop"), ("hm", "length"), ("#### 4", "stop")]
    completions = [
        Completion(token_ids(tokenizer(text, add_special_tokens=False).input_ids), reason)
        for text, reason in texts
    ]
    items = exact_match_items(rows, completions, tokenizer.decode, ByNumber())
    assert [item["correct"] for item in items] == [True, False, False, True]
    assert [item["answer"] for item in items] == ["1", "5", None, "4"]
    assert [item["expected"] for item in items] == ["1", "2", "3", "4"]
    start = [item | {"correct": False} for item in items[:3]] + [items[3]]
    results = exact_match_results(items, start)
    assert (results["accuracy"], results["correct"], results["items"]) == (0.5, 2, 4)
    assert (results["no_answer"], results["truncated"]) == (1, 1)
    # Wilson's interval of 2 in 4: 1/2 ± z/2 / sqrt(4 + z²).
    half = 1.959963984540054 / 2 / math.sqrt(4 + 1.959963984540054**2)
    assert results["interval_95"] == pytest.approx([0.5 - half, 0.5 + half], abs=1e-9)
    assert results["versus_start"] == {"only_first": 0, "only_second": 1, "p_value": 1.0}


def test_several_samples_by_hand():
    def item(text, right, reason="stop"):
        return {"id": "0", "completion": text, "correct": right, "finish_reason": reason}

    found = several_samples_results(
        [
            [item("a", True), item("a", True), item("b", True), item("c", False)],
            [item("d", False), item("d", False), item("e", False, "length"), item("f", True)],
        ]
    )
    assert found == {
        "items": 2,
        "samples": 4,
        "correct": 4,
        "accuracy": 0.5,
        "distinct_correct": 1.5,  # a and b; f
        "truncated": 1,
    }


def test_a_function_of_the_users_decides(tmp_path, monkeypatch):
    (tmp_path / "my_checks.py").write_text(
        "def is_right(prompt, target, response):\n"
        "    return len(response) == len(target) + len(prompt)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    checker = checker_of("my_checks")
    [row] = examples("abc")  # its prompt is "p"
    assert [checker.is_right(row, text) for text in ("abcd", "#### 1", "abc")] == [
        True,
        False,
        False,
    ]
    assert checker.can_check([row])
    assert not checker.can_check([])
    assert checker.details(row, "abc") == {}
    assert isinstance(checker_of("exact_match"), ByNumber)
    with pytest.raises(InputError, match="checker: no_such_module: .*No module named"):
        checker_of("no_such_module")


def test_a_function_that_fails_is_named():
    [row] = examples("abc")
    for function, part in (
        (lambda prompt, target, response: 1, "returned 1 for example 0"),
        (lambda prompt, target, response: {}["x"], "failed on example 0 .KeyError"),
    ):
        with pytest.raises(InputError, match=f"checker: mine.checks: is_right {part}"):
            ByFunction("mine.checks", function).is_right(row, "abc")


def test_gap_and_margin_by_hand():
    rows = examples("a", "b")
    start = logp_items(rows, np.array([-10.0, -20.0]), np.array([-4.0, -30.0]))
    now = logp_items(rows, np.array([-8.0, -20.0]), np.array([-7.0, -31.0]))
    # Gaps: -6 and 10 at the start, -1 and 11 now.
    assert logp_results(start, start, 8) == {
        "target_logp": -15.0,
        "target_logp_per_token": -10.0,
        "gap": 2.0,
        "margin": 0.0,
        "nonpositive_gap_share": 0.5,
        "drift": 0.0,
    }
    found = logp_results(now, start, 8)
    assert (found["gap"], found["margin"]) == (5.0, 3.0)
    assert found["drift"] == 0.5  # −34 nats became −38, over 8 tokens
    # A gap of exactly 0 is not positive.
    even = logp_items(rows, np.array([-5.0, -5.0]), np.array([-5.0, -6.0]))
    assert logp_results(even, start, 8)["nonpositive_gap_share"] == 0.5


def test_wilsons_interval_by_its_formula():
    z = 1.959963984540054
    for k, n in ((0, 10), (7, 10), (10, 10), (700, 1000)):
        p = k / n
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        assert wilson_interval(k, n) == pytest.approx((centre - half, centre + half), abs=1e-9)


def test_mcnemars_exact_p_by_hand():
    same = mcnemar([True, False], [True, False])
    assert same == (0, 0, 1.0)
    # 1 against 5 discordant: 2 · (C(6,0) + C(6,1)) / 2^6 = 14/64.
    first = [True] + [False] * 5 + [True] * 4
    second = [False] + [True] * 5 + [True] * 4
    assert mcnemar(first, second) == (1, 5, pytest.approx(14 / 64))
    with pytest.raises(ValueError, match="argument 2"):
        mcnemar([True], [True, False])
