"""Which samples are shown where not all of them fit."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tpaw.report.html.samples import KINDS, within_budget, without_template


def sample(rng, number):
    kinds = [k for k in range(len(KINDS)) if rng.random() < 0.02 + 0.1 * k]
    return {"id": str(number), "kinds": kinds, "text": "é" * int(rng.integers(1, 300))}


@pytest.mark.parametrize("seed", range(5))
def test_every_kind_gets_its_share_and_no_more_bytes_are_used(seed):
    rng = np.random.default_rng(seed)
    items = [sample(rng, number) for number in range(2000)]
    chosen = within_budget(items, 60_000)
    size = sum(len(json.dumps(item, ensure_ascii=False).encode()) for item in chosen)
    assert 58_000 < size <= 60_000
    numbers = [int(item["id"]) for item in chosen]
    assert numbers == sorted(set(numbers))
    shown = [sum(k in item["kinds"] for item in chosen) for k in range(len(KINDS))]
    there = [sum(k in item["kinds"] for item in items) for k in range(len(KINDS))]
    fair = len(chosen) // (len(KINDS) + 1)
    for k in range(len(KINDS)):
        assert shown[k] >= min(there[k], fair - 1), (k, shown, there)


def test_all_are_shown_where_they_fit_and_none_where_none_does():
    rng = np.random.default_rng(0)
    items = [sample(rng, number) for number in range(50)]
    assert within_budget(items, 10**6) == items
    assert within_budget(items, 10) == []
    assert within_budget([], 10) == []


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        ("<u>Hi?<e><a>", "Hi?"),
        ("<s>Be short.<e><u>Hi?<e><a>", "<s>Be short.<e><u>Hi?<e><a>"),
        ("Hi?", "Hi?"),
        ("<u>Hi?", "<u>Hi?"),
        ("<u><e><a>", ""),
        ("<e><a>", "<e><a>"),
    ],
)
def test_a_user_turn_is_shown_without_its_template(prompt, shown):
    assert without_template(prompt, "<u>", "<e><a>") == shown


def test_a_template_whose_ends_overlap_in_a_prompt_did_not_make_it():
    assert without_template("aba", "ab", "ba") == "aba"
    assert without_template("Hi?", "", "") == "Hi?"
