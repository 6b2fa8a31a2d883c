"""The pages of studies and comparisons, against the numbers that they are made of."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from messages import complains

from tests.report.html.parsed import Parsed
from tpaw.report.html.charts import MOST_LINES
from tpaw.report.html.comparison import _different_ends
from tpaw.report.html.study import verdict, write_study_page

RESULTS = Path(__file__).parents[3] / "docs" / "results"


def study_of(name):
    return json.loads((RESULTS / name / "study.json").read_text(encoding="utf-8"))


def page_of(study, tmp_path):
    write_study_page(tmp_path / "study.html", study)
    return (tmp_path / "study.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["methods", "gamma", "learning-rates", "family", "worlds/counts"])
def test_a_study_shows_every_number_of_its_tables(name, tmp_path):
    study = study_of(name)
    text = page_of(study, tmp_path)
    shown = " ".join(Parsed(text).texts)
    for condition in study["conditions"].values():
        found = condition["by_iteration"][-1][study["primary"]]
        assert f"{found['mean']:.3f}" in shown
        for run in condition["runs"].values():
            assert f"{run['iterations'][-1][study['primary']]:.3f}" in shown
    for comparison in study["comparisons"]:
        assert f"{comparison['difference']:+.3f}" in shown
    charts = re.findall(r'<svg class="chart".*?</svg>', text, re.S)
    assert len(charts) >= len(study["measures"])
    assert all(chart.count('<polyline class="line') <= MOST_LINES for chart in charts)


def test_a_point_of_a_chart_has_its_value(tmp_path):
    study = study_of("methods")
    text = page_of(study, tmp_path)
    found = study["conditions"]["spin"]["by_iteration"][3]["accuracy"]
    low, high = found["interval_95"]
    assert f"spin, 3: {found['mean']:.4g} [{low:.4g}, {high:.4g}]" in text


def test_settings_stand_below_the_axis_in_their_order(tmp_path):
    study = study_of("gamma")
    values = sorted({c["settings"]["objective.gamma"] for c in study["conditions"].values()})
    text = page_of(study, tmp_path)
    first = text[text.index("<svg") : text.index("</svg>")]
    names = [float(n) for n in re.findall(r'y="173">([^<]*)</text>', first)]
    assert names == values


def test_the_verdict_names_the_best_and_how_sure_it_is():
    study = study_of("methods")
    first, second = verdict(study)
    last = {n: c["by_iteration"][-1]["accuracy"]["mean"] for n, c in study["conditions"].items()}
    best = max(last, key=last.get)
    assert best in first
    assert f"{last[best]:.3f}" in first
    [c] = [c for c in study["comparisons"] if c["condition"] == best]
    assert f"{c['difference']:+.3f} from {study['baseline']}" in second
    assert f"t-test {c['t_p_value_holm']:.2g}" in second
    for condition in study["conditions"].values():
        if condition is not study["conditions"][study["baseline"]]:
            condition["by_iteration"][-1]["accuracy"]["mean"] = 0.1
    assert verdict(study)[1] == "That is the baseline: no condition is above it."
    for condition in study["conditions"].values():
        condition["by_iteration"] = []
    assert verdict(study) == ["No run of this study has ended."]


def test_one_seed_has_no_test():
    assert not any("p after" in sentence for sentence in verdict(study_of("learning-rates")))


def test_report_of_the_folder_of_a_study(tpaw_, tmp_path):
    (tmp_path / "study.json").write_text(json.dumps(study_of("gamma")))
    code, out, _ = tpaw_("report", tmp_path)
    assert code == 0
    assert f"Report: {tmp_path / 'report.html'}" in out
    assert "<h1>gamma" in (tmp_path / "report.html").read_text(encoding="utf-8")
    for content, part in (("{", "cannot be read"), ("[]", "it has no"), ('{"name": 1}', "machine")):
        (tmp_path / "study.json").write_text(content)
        code, _, err = tpaw_("report", tmp_path)
        assert code != 0
        complains(err, "study.json", part, hide={"folder": tmp_path})


def test_a_study_that_was_edited_is_refused(tpaw_, tmp_path):
    study = study_of("gamma")
    broken = [{k: v for k, v in study.items() if k != key} for key in study]
    broken += [{**study, "conditions": value} for value in ({}, [], {"a": 1})]
    for content in broken:
        (tmp_path / "study.json").write_text(json.dumps(content))
        code, _, err = tpaw_("report", tmp_path)
        assert code == 2, err
        assert "study.json" in err
        assert "bug" not in err


def test_runs_of_one_name_are_told_apart():
    paths = [Path("/s/a/seed-0"), Path("/s/b/seed-0"), Path("/t/b/seed-1")]
    assert list(_different_ends(paths).values()) == ["a/seed-0", "b/seed-0", "b/seed-1"]
    assert _different_ends(paths[1:]) == {paths[1]: "seed-0", paths[2]: "seed-1"}
    assert _different_ends([Path("/x/run")]) == {Path("/x/run"): "run"}


def test_compare_writes_a_page(tpaw_, finished, tmp_path, monkeypatch):
    run, _ = finished
    monkeypatch.chdir(run.root.parent)
    names = [f"{run.root.name}@{i}" for i in (0, 4)]
    page = tmp_path / "comparison.html"
    code, out, _ = tpaw_("compare", *names, "--html", page)
    assert code == 0
    parsed = Parsed(page.read_text(encoding="utf-8"))
    data = json.loads(parsed.scripts["samples-data"])
    assert data["heldout"]["systems"] == names
    assert data["heldout"]["total"] == 10
    assert data["training"]["items"] == []
    texts = " ".join(parsed.texts)
    for value in re.findall(r"-?\d+\.\d{3} \[[^]]*\]", out):
        assert value in texts
    code, _, err = tpaw_("compare", *names, "--html", tmp_path / "none" / "x.html")
    assert code != 0
    complains(err, "--html", "cannot be written", hide={"folder": tmp_path})
