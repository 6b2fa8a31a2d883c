"""docs/results: what is committed follows from its own per-seed numbers, and README quotes it."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from tpaw.report.study import study_report

ROOT = Path(__file__).parents[2]
STUDIES = sorted((ROOT / "docs" / "results").glob("*/study.json"))


@pytest.fixture(params=STUDIES, ids=lambda path: path.parent.name)
def folder(request):
    return request.param.parent


def load(folder):
    return json.loads((folder / "study.json").read_text(encoding="utf-8"))


def finals(study, condition, seeds):
    runs = study["conditions"][condition]["runs"]
    return np.array([runs[str(s)]["iterations"][-1][study["primary"]] for s in seeds])


def test_there_are_results():
    assert STUDIES


def test_comparisons_follow_from_the_runs(folder):
    study = load(folder)
    for found in study["comparisons"]:
        seeds = found["seeds"]
        difference = finals(study, found["condition"], seeds) - finals(
            study, study["baseline"], seeds
        )
        assert found["difference"] == pytest.approx(difference.mean())
        if len(seeds) == 1 or not difference.any():
            continue
        tested = stats.ttest_1samp(difference, 0)
        assert found["t_p_value"] == pytest.approx(tested.pvalue)
        assert found["interval_95"] == pytest.approx(list(tested.confidence_interval(0.95)))
        signs = np.array(list(itertools.product([-1, 1], repeat=len(seeds))))
        means = abs((signs * difference).mean(axis=1))
        as_large = (means >= abs(difference.mean()) * (1 - 1e-12)).mean()
        assert found["sign_flip_p_value"] == pytest.approx(as_large)


def test_the_report_is_that_of_the_numbers(folder):
    text = (folder / "report.md").read_text(encoding="utf-8")
    figures = [folder / name for name in re.findall(r"\]\((figures/.*?\.svg)\)", text)]
    assert bool(figures) == bool(load(folder)["measures"])
    assert all(path.is_file() and path.with_suffix(".png").is_file() for path in figures)
    assert text == study_report(load(folder), figures)


def test_nothing_of_a_machine_but_its_kind_is_in_them(folder):
    text = (folder / "study.json").read_text(encoding="utf-8")
    assert not re.search(r'"/(?!/)', text), "an absolute path"


def test_readme_quotes_them():
    study = load(ROOT / "docs" / "results" / "methods")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for condition in study["conditions"].values():
        found = condition["by_iteration"][-1]["accuracy"]
        low, high = found["interval_95"]
        assert f"| {found['mean']:.3f} [{low:.3f}, {high:.3f}] |" in readme
    for found in study["comparisons"]:
        low, high = found["interval_95"]
        assert f"| {found['difference']:+.3f} [{low:+.3f}, {high:+.3f}] |" in readme
    assert f"{len(study['seeds'])} seeds" in readme
