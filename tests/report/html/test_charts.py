"""Charts: where points lie, gaps, intervals, and texts that stay texts."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from tpaw.report.html.charts import HEIGHT, LEFT, MOST_POINTS, RIGHT, WIDTH, Line, chart


def svg(figure):
    return ElementTree.fromstring(re.search(r"<svg.*</svg>", str(figure), re.S)[0])


def points(element):
    return [tuple(map(float, pair.split(","))) for pair in element.get("points").split()]


def of_class(root, name):
    return [e for e in root.iter() if name in e.get("class", "").split()]


def ticks_of(root, anchor):
    """The numbers beside an axis, by their coordinate."""
    axis = "y" if anchor == "end" else "x"
    return {
        float(e.get(axis)): float(e.text.rstrip(" %").replace(",", ""))
        for e in of_class(root, "tick")
        if e.get("text-anchor") == anchor and re.fullmatch(r"-?[\d.,e+-]+( %)?", e.text)
    }


@pytest.mark.parametrize(
    ("y", "as_percent"),
    [
        ([0.573, 0.665, 0.702, 0.738], True),
        ([-3.2e-5, 1.1e-5, 4e-6, 0.0], False),
        ([1200.0, 53000.0, 100000.0, 7.0], False),
        ([33.11, 33.15, 33.08, 33.08], False),
        ([2.0, 2.0, 2.0, 2.0], False),
    ],
)
def test_a_point_lies_where_the_ticks_say(y, as_percent):
    x = [0, 1, 2, 4]
    root = svg(chart("t", [Line("a", x, y)], x_label="x", as_percent=as_percent))
    [line] = of_class(root, "line")
    heights, values = zip(*sorted(ticks_of(root, "end").items()), strict=True)
    heights = [height - 3 for height in heights]  # the text is centred on its tick
    slope, offset = np.polyfit(heights, values, 1)
    drawn = [slope * py + offset for _, py in points(line)]
    scale = 100 if as_percent else 1
    span = max(values) - min(values)
    assert drawn == pytest.approx([scale * v for v in y], abs=0.02 * span)
    assert len(set(values)) == len(values)  # no two ticks have the same text
    px = [p for p, _ in points(line)]
    assert px == pytest.approx([LEFT + (WIDTH - LEFT - RIGHT) * v / 4 for v in x], abs=0.1)
    assert all(0 <= py <= HEIGHT for _, py in points(line))


def test_what_is_not_finite_leaves_a_gap_and_is_counted():
    y = [1.0, math.nan, 2.0, 3.0, math.inf, -math.inf]
    figure = chart("t", [Line("a", range(6), y)], x_label="x", with_points=True)
    root = svg(figure)
    assert [len(points(line)) for line in of_class(root, "line")] == [2, 2]  # a lone one is a dot
    assert len(of_class(root, "point")) == 3
    assert "3 values are not finite" in str(figure)
    assert "not finite" not in str(chart("t", [Line("a", [0], [1.0])], x_label="x"))


def test_nothing_but_nan_is_drawn_as_nothing():
    figure = chart("t", [Line("a", [0, 1], [math.nan, math.nan])], x_label="x")
    assert not of_class(svg(figure), "line")
    assert "2 values are not finite" in str(figure)


def test_an_interval_and_its_text():
    line = Line("greedy", [0, 1], [0.5, 0.6], [0.4, 0.5], [0.6, 0.8])
    root = svg(chart("t", [line], x_label="i", as_percent=True, with_points=True))
    [area] = of_class(root, "area")
    [drawn] = of_class(root, "line")
    (_, y0), (_, y1) = points(drawn)
    there = points(area)
    assert there[0][1] < y0 < there[-1][1]
    assert there[1][1] < y1 < there[2][1]
    titles = [e.text for e in root.iter() if e.tag.endswith("title")]
    assert titles == ["greedy, 0: 50 % [40 %, 60 %]", "greedy, 1: 60 % [50 %, 80 %]"]


def test_a_point_says_the_name_of_its_place():
    line = Line("eta", [0, 2], [0.5, 0.6])
    root = svg(chart("t", [line], x_label="η", with_points=True, x_names=["1", "6", "50"]))
    titles = [e.text for e in root.iter() if e.tag.endswith("title")]
    assert titles == ["eta, 1: 0.5", "eta, 50: 0.6"]


def test_a_long_line_is_thinned_from_its_first_to_its_last_point():
    count = 10 * MOST_POINTS
    [line] = of_class(svg(chart("t", [Line("a", range(count), range(count))], x_label="x")), "line")
    found = points(line)
    assert len(found) == MOST_POINTS
    assert found[0][0] == LEFT
    assert found[-1][0] == WIDTH - RIGHT


def test_every_second_iteration_is_shaded():
    root = svg(chart("t", [Line("a", [0, 40], [0, 1])], x_label="x", bands=[10, 20, 30]))
    shaded = [(float(e.get("x")), float(e.get("width"))) for e in of_class(root, "band")]
    quarter = (WIDTH - LEFT - RIGHT) / 4
    expected = [(LEFT + quarter, quarter), (LEFT + 3 * quarter, quarter)]
    assert np.allclose(shaded, expected, atol=0.2)


def test_names_stay_texts():
    figure = str(chart("<b>&", [Line("<i>", [0], [0]), Line('"', [0], [1])], x_label="<u>"))
    assert not re.search(r"<[biu]>", figure)
    assert "&lt;b&gt;&amp;" in figure
