"""The lines of a study's charts, worked out by hand, and that both kinds of chart have them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tpaw.report.figures import draw_figures
from tpaw.report.html.study import write_study_page
from tpaw.report.series import Series, series_of, single_axis, values_of, x_label

RESULTS = Path(__file__).parents[2] / "docs" / "results"


def mean(value, half_width=None):
    interval = None if half_width is None else [value - half_width, value + half_width]
    return {"accuracy": {"mean": value, "interval_95": interval}}


def condition(*entries, method="tpaw", **settings):
    return {"method": method, "settings": settings, "by_iteration": list(entries)}


def test_by_iteration():
    conditions = {
        "a": condition(mean(0.5, 0.25), mean(0.75, 0.125)),
        "b": condition(mean(0.5, 0.25), mean(0.25)),
        "failed": condition(),
        "part": condition({}, mean(1.0, 0.5)),
    }
    study = {"conditions": conditions}
    assert single_axis(study) is None
    assert x_label(study) == "iteration"
    assert series_of(study, "accuracy") == [
        Series("a", [0, 1], [0.5, 0.75], (0.25, 0.625), (0.75, 0.875)),
        Series("b", [0, 1], [0.5, 0.25], (), ()),  # one point has no interval
        Series("failed", [], [], (), ()),
        Series("part", [1], [1.0], (0.5,), (1.5,)),
    ]


def test_conditions_of_different_lengths_end_at_one():
    one, two = condition(*[mean(0.5)] * 2), condition(*[mean(0.5)] * 3)
    study = {"conditions": {"one": one, "two": two, "start": condition(mean(0.5))}}
    assert x_label(study) == "share of the iterations"
    assert [line.x for line in series_of(study, "accuracy")] == [[0, 1], [0, 0.5, 1], [0]]


def test_by_setting():
    """In rising order, by the last iteration; a list of numbers counts by its first."""
    key = "train.learning_rate, critic.learning_rate"
    conditions = {
        "a": condition(mean(0.5), mean(0.75), **{key: [4.0, 1.0]}),
        "b": condition(mean(0.5), mean(0.25), **{key: 2.0}),
        "c": condition(mean(0.5), mean(1.0), method="spin", **{key: 4.0}),
        "failed": condition(method="spin", **{key: 8.0}),
    }
    study = {"conditions": conditions}
    assert single_axis(study) == key
    assert x_label(study) == "train.learning_rate"
    assert values_of(study, key) == [2.0, 4.0, 8.0]
    assert series_of(study, "accuracy") == [
        Series("tpaw", [2.0, 4.0], [0.25, 0.75], (), ()),
        Series("spin", [4.0], [1.0], (), ()),
    ]


@pytest.mark.parametrize("settings", [[{"a": 1, "b": 1}], [{"a": 1}, {"b": 1}], [{"a": "x"}], [{}]])
def test_no_single_axis(settings):
    conditions = {str(i): condition(**found) for i, found in enumerate(settings)}
    assert single_axis({"conditions": conditions}) is None


@pytest.mark.parametrize("name", ["methods", "gamma"])
def test_a_figure_and_a_page_show_the_same_points(name, tmp_path):
    study = json.loads((RESULTS / name / "study.json").read_text(encoding="utf-8"))
    figure = ElementTree.parse(draw_figures(study, tmp_path)[0]).getroot()
    # Lines are clipped to the axes, unlike the ticks; each of their points is a `use`.
    groups = [g for g in figure.iterfind(".//{*}g") if g.get("id", "").startswith("line2d_")]
    points = [g.findall("{*}g[@clip-path]/{*}use") for g in groups]
    drawn = [[-float(point.get("y")) for point in found] for found in points if found]
    write_study_page(tmp_path / "page.html", study)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    shown = text[text.index("<svg") : text.index("</svg>")]
    for line, heights in zip(series_of(study, study["primary"]), drawn, strict=True):
        found = re.findall(rf"<title>{line.name}, (\S+): (\S+) \[", shown)
        assert [float(x) for x, _ in found] == list(line.x)
        assert [float(y) for _, y in found] == [float(f"{v:.4g}") for v in line.y]
        if max(line.y) > min(line.y):
            scale = (max(heights) - min(heights)) / (max(line.y) - min(line.y))
            at = [min(heights) + scale * (v - min(line.y)) for v in line.y]
            assert heights == pytest.approx(at, abs=1e-3)
