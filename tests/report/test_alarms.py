"""Each alarm, provoked and narrowly not; and where a person sees it."""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

from tpaw.generation.responses import read_responses, repeats_itself
from tpaw.report.alarms import Alarm, alarms
from tpaw.report.summary import write_summary
from tpaw.storage.run_directory import RunDirectory

VERSUS_START = {"only_first": 5, "only_second": 25, "p_value": 0.0003}
GOOD = [
    {
        "iteration": 0,
        "evaluation": {
            "exact_match": {"accuracy": 0.5, "versus_start": VERSUS_START},
            "logps": {"target_logp": -20.0, "margin": 0.0, "drift": 0.0},
        },
    },
    {
        "iteration": 1,
        "responses": {
            "rows": 100, "tokens": 3000, "identical_share": 0.2, "truncated_share": 0.01,
            "repeating_share": 0.02, "repeating_targets_share": 0.01,
        },
        "first_step": {"difference": 1e-8, "limit": 1e-4},
        "training": {"rewards/target": 0.1, "rewards/margins": 0.4, "loss": 0.6, "grad_norm": 2.0},
        "evaluation": {
            "exact_match": {"accuracy": 0.6, "versus_start": VERSUS_START},
            "logps": {"target_logp": -19.0, "margin": 2.0, "drift": 0.05},
        },
    },
]  # fmt: skip
GOOD.append({**copy.deepcopy(GOOD[1]), "iteration": 2})


def changed(path, value, at=2):
    """The good run, but for one value; `path` is written with dots."""
    players = copy.deepcopy(GOOD)
    *keys, last = path.split(".")
    place = players[at]
    for key in keys:
        place = place[key]
    place[last] = value
    return players


def names(players):
    return [(alarm.name, alarm.iteration) for alarm in alarms(players)]


def test_a_good_run_has_none():
    assert alarms(GOOD) == []


@pytest.mark.parametrize(
    ("name", "path", "too_much", "just_right"),
    [
        ("truncated", "responses.truncated_share", 0.101, 0.1),
        ("identical", "responses.identical_share", 0.501, 0.5),
        ("length", "responses.tokens", 4001, 4000),
        ("length", "responses.tokens", 1999, 2001),
        ("target reward", "training.rewards/target", -1e-9, 0.0),
        ("saturated", "training.rewards/margins", 5.01, 5.0),
        ("not finite", "lines_not_finite", 1, 0),
        ("repeating", "responses.repeating_share", 0.111, 0.1099),
        ("first step", "first_step.difference", 5.1e-5, 4.9e-5),
        ("drift", "evaluation.logps.drift", 0.201, 0.2),
    ],
)
def test_each_is_provoked_and_narrowly_not(name, path, too_much, just_right):
    assert names(changed(path, too_much)) == [(name, 2)]
    assert names(changed(path, just_right)) == []


def test_at_the_threshold_of_margins_the_gradient_is_a_fiftieth():
    """The gradient of log(1 + e^−m) is 1 / (1 + e^m), and 1/2 at the start."""
    assert 2 / (1 + math.exp(5.0)) < 0.02


def test_worse_than_the_sft_model_needs_a_test_that_says_so():
    for only_first, only_second, expected in (
        (20, 5, [("worse", 2)]),  # exact binomial test: p = .004
        (14, 5, []),  # p = .064
        (15, 5, [("worse", 2)]),  # p = .041
        (5, 20, []),
    ):
        p_value = binomtest(only_first, only_first + only_second).pvalue
        test = {"only_first": only_first, "only_second": only_second, "p_value": p_value}
        exact = {"accuracy": 0.5 + (only_second - only_first) / 100, "versus_start": test}
        assert names(changed("evaluation.exact_match", exact)) == expected


def test_targets_that_get_less_likely_while_the_margin_grows():
    assert names(changed("evaluation.logps.target_logp", -21.01)) == [("less likely", 2)]
    assert names(changed("evaluation.logps.target_logp", -20.99)) == []
    players = changed("evaluation.logps.target_logp", -25.0)
    players[2]["evaluation"]["logps"]["margin"] = -1.0
    assert names(players) == []


def test_a_drift_that_does_not_grow_is_none():
    players = changed("evaluation.logps.drift", 0.3, at=1)
    assert names(players) == [("drift", 1)]
    players[2]["evaluation"]["logps"]["drift"] = 0.29
    assert names(players) == [("drift", 1)]
    players[2]["evaluation"]["logps"]["drift"] = 0.31
    assert names(players) == [("drift", 2)]


def test_targets_that_repeat_themselves_are_no_reason():
    players = changed("responses.repeating_share", 0.5)
    players[2]["responses"]["repeating_targets_share"] = 0.41
    assert names(players) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("abc", False),  # no sequence of four
        ("abcdefgh", False),
        ("abababab", True),  # five sequences, two of them different
        ("aaaaa", False),  # two sequences, one of them different: half
        ("aaaaaa", True),
        ("abcdabcdabcd", True),  # nine, four different
        ("abcdefabcdef", False),  # nine, six different
    ],
)
def test_what_repeats_itself(text, expected):
    ids = np.array([ord(c) for c in text], dtype=np.int32)
    assert repeats_itself(ids) is expected


def test_a_run_counts_what_repeats_itself_and_logs_its_first_step(finished):
    run, _ = finished
    summary = json.loads(run.summary_file.read_text())

    def repeats(ids):
        ids = ids.tolist()
        ngrams = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
        return sum(ngram in ngrams[:i] for i, ngram in enumerate(ngrams)) > len(ngrams) / 2

    for entry in summary["players"][1:]:
        found = [repeats(r.token_ids) for r in read_responses(run.responses(entry["iteration"]))]
        assert entry["responses"]["repeating_share"] == pytest.approx(np.mean(found))
        assert 0 <= entry["first_step"]["difference"] < entry["first_step"]["limit"] == 1e-4
        log = run.read_training_log(entry["iteration"])
        found = [line["first_step/difference"] for line in log if "first_step/limit" in line]
        assert max(found) == entry["first_step"]["difference"]
        # The first step has a learning rate of 0, because of the warm-up.
        assert [line["step"] for line in log if "first_step/difference" in line] == [1, 2]


def test_only_the_newest_of_each_name_is_shown():
    players = changed("responses.truncated_share", 0.5, at=1)
    players[2]["responses"]["truncated_share"] = 0.7
    [alarm] = alarms(players)
    assert alarm.iteration == 2
    assert "70% of the responses of θ_1" in alarm.text
    assert alarm.advice


def test_entries_without_results_have_none():
    assert alarms([{"iteration": 0}, {"iteration": 1}]) == []
    assert alarms([{"iteration": 0}, *GOOD[1:]]) == []


def test_a_person_sees_it_everywhere(finished, tpaw_):
    """The run of the tests has answers that reach the limit."""
    run, _ = finished
    summary = json.loads(run.summary_file.read_text())
    found = [Alarm(**alarm) for alarm in summary["alarms"]]
    [truncated] = [alarm for alarm in found if alarm.name == "truncated"]
    assert truncated.text in run.report_file.read_text(encoding="utf-8")
    _, out, _ = tpaw_("status", str(run.root))
    assert "".join(truncated.line().split()) in "".join(out.split())
    assert RunDirectory(run.root).summary_file.exists()


def test_the_documentation_has_every_threshold():
    text = (Path(__file__).parents[2] / "docs/reference/alarms.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| **")]
    assert {row[0].strip().strip("*") for row in rows} == {
        "truncated", "identical", "length", "target reward", "saturated", "not finite", "worse",
        "less likely", "repeating", "first step", "drift",
    }  # fmt: skip


def test_a_gradient_that_is_not_finite_is_an_alarm_and_the_summary_is_written(
    finished, tmp_path, monkeypatch
):
    run, config = RunDirectory(shutil.copytree(finished[0].root, tmp_path / "run")), finished[1]
    read = RunDirectory.read_training_log

    def with_inf(self, i):
        return [line | {"grad_norm": "inf", "loss": "nan"} for line in read(self, i)]

    monkeypatch.setattr(RunDirectory, "read_training_log", with_inf)
    summary = write_summary(run, config)
    written = json.loads(run.summary_file.read_text())
    assert written["players"][1]["training"]["loss"] == "nan"
    assert written["players"][1]["lines_not_finite"] > 0
    assert written["alarms"] == summary["alarms"]
    assert "not finite" in [alarm["name"] for alarm in summary["alarms"]]
    assert math.isnan(summary["players"][1]["training"]["loss"])
