"""Line charts as inline SVG, without scripts. The page's style sheet has colours and fonts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

from markupsafe import Markup

WIDTH, HEIGHT = 320, 190
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 26, 30
MOST_LINES = 8
MOST_POINTS = 400
"""A longer line is thinned evenly to as many points."""


Place = Callable[[float], float]
"""From a value to a coordinate."""


class Line(NamedTuple):
    """A line of a chart.

    Attributes:
        name: for the legend.
        x, y: of each point. A y that is not finite leaves a gap, and the chart counts it.
        low, high: an interval around each point; empty for none.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


def chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    bands: Sequence[float] = (),
    as_percent: bool = False,
    with_points: bool = False,
    x_names: Sequence[str] = (),
) -> Markup:
    """Draw lines over a common x.

    Args:
        title: stands above the chart.
        lines: at most `MOST_LINES`, each with at least one point.
        x_label: of the x axis.
        bands: where iterations end; every second stretch between them is shaded.
        as_percent: y is a share and is shown in percent.
        with_points: mark each point; its value shows when the pointer rests on it.
        x_names: what stands below x = 0, 1, …; empty for the numbers themselves.
    """
    lines = [_thinned(line) for line in lines]
    ys = [v for line in lines for v in (*line.y, *line.low, *line.high) if math.isfinite(v)]
    xs = [v for line in lines for v in line.x]
    lost = sum(not math.isfinite(v) for line in lines for v in line.y)
    is_whole = all(x == int(x) for x in xs)
    places: dict[float, str] = (
        dict(enumerate(x_names))
        if x_names
        else {value: f"{value:g}" for value in _ticks(min(xs), max(xs), 4, is_whole=is_whole)}
    )
    y_ticks = _ticks(min(ys or [0]), max(ys or [1]), 4, is_share=as_percent)
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1e-9)
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def at_x(value: float) -> float:
        return round(LEFT + (value - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT), 1)

    def at_y(value: float) -> float:
        share = (value - y_low) / (y_high - y_low)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    parts = [
        Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
            WIDTH, HEIGHT, title
        ),
        Markup('<text class="title" x="4" y="14">{}</text>').format(title),
    ]
    edges = [x_low, *bands, x_high]
    for begin, end in list(pairwise(edges))[1::2]:
        parts.append(
            Markup('<rect class="band" x="{}" y="{}" width="{}" height="{}"/>').format(
                at_x(begin), TOP, max(0, round(at_x(end) - at_x(begin), 1)), HEIGHT - TOP - BOTTOM
            )
        )
    for value in y_ticks:
        parts.append(
            Markup(
                '<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>'
                '<text class="tick" text-anchor="end" x="{}" y="{}">{}</text>'
            ).format(
                LEFT, WIDTH - RIGHT, at_y(value), at_y(value), LEFT - 5, at_y(value) + 3,
                _tick(value, y_ticks[1] - y_ticks[0], as_percent),
            )
        )  # fmt: skip
    for value, name in places.items():
        if x_low <= value <= x_high:
            # A long name at the right edge would be cut.
            anchor = "end" if len(name) > 3 and at_x(value) > WIDTH - RIGHT - 1 else "middle"
            parts.append(
                Markup('<text class="tick" text-anchor="{}" x="{}" y="{}">{}</text>').format(
                    anchor, at_x(value), HEIGHT - BOTTOM + 13, name
                )
            )
    parts.append(
        Markup('<text class="tick" text-anchor="middle" x="{}" y="{}">{}</text>').format(
            (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, x_label
        )
    )
    for i, line in enumerate(lines):
        parts += _drawn(line, i % 8, at_x, at_y)
        if with_points:
            parts += _points(line, i % 8, at_x, at_y, as_percent, x_names)
    parts.append(Markup("</svg>"))
    return Markup("<figure>{}{}</figure>").format(Markup("").join(parts), _caption(lines, lost))


def _caption(lines: Sequence[Line], lost: int) -> Markup:
    """The legend, if there is more than one line, and what is not drawn."""
    names = [
        Markup('<span class="key s{}">{}</span>').format(i % 8, line.name)
        for i, line in enumerate(lines)
    ]
    texts = names if len(lines) > 1 else []
    if lost:
        values = f"{lost:,} value{'s are' if lost > 1 else ' is'}"
        texts = [*texts, Markup("<strong>{} not finite</strong>").format(values)]
    return Markup("<figcaption>{}</figcaption>").format(Markup(" ").join(texts))


def _drawn(line: Line, i: int, at_x: Place, at_y: Place) -> list[Markup]:
    """A line in pieces, which gaps divide, with its interval."""
    parts: list[Markup] = []
    if line.low:
        there = list(zip(line.x, line.high, strict=True))
        back = list(zip(line.x, line.low, strict=True))[::-1]
        area = " ".join(f"{at_x(x)},{at_y(y)}" for x, y in (*there, *back))
        parts.append(Markup('<polygon class="area s{}" points="{}"/>').format(i, area))
    piece: list[str] = []
    for x, y in (*zip(line.x, line.y, strict=True), (0.0, math.nan)):
        if math.isfinite(y):
            piece.append(f"{at_x(x)},{at_y(y)}")
        elif piece:
            points = " ".join(piece if len(piece) > 1 else piece * 2)
            parts.append(Markup('<polyline class="line s{}" points="{}"/>').format(i, points))
            piece = []
    return parts


def _points(
    line: Line, i: int, at_x: Place, at_y: Place, as_percent: bool, x_names: Sequence[str]
) -> list[Markup]:
    """The points of a line. Each says its value when the pointer rests on it."""
    parts: list[Markup] = []
    for k, (x, y) in enumerate(zip(line.x, line.y, strict=True)):
        if not math.isfinite(y):
            continue
        place = x_names[int(x)] if x_names else f"{x:g}"
        shown = f"{line.name}, {place}: {_number(y, as_percent)}"
        if line.low:
            low, high = (_number(v, as_percent) for v in (line.low[k], line.high[k]))
            shown += f" [{low}, {high}]"
        parts.append(
            Markup(
                '<circle class="point s{}" cx="{}" cy="{}" r="3"><title>{}</title></circle>'
            ).format(i, at_x(x), at_y(y), shown)
        )
    return parts


def _thinned(line: Line) -> Line:
    if len(line.x) <= MOST_POINTS:
        return line
    last = len(line.x) - 1
    kept = [round(k * last / (MOST_POINTS - 1)) for k in range(MOST_POINTS)]
    return line._replace(x=[line.x[k] for k in kept], y=[line.y[k] for k in kept])


def _ticks(
    low: float, high: float, count: int, *, is_whole: bool = False, is_share: bool = False
) -> list[float]:
    """Round numbers from at most `low` to at least `high`, about `count` apart.

    Args:
        is_whole: only whole numbers have a meaning.
        is_share: no number is below 0 or above 1.
    """
    if high - low < 1e-12 * max(abs(low), abs(high), 1e-12):
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    if is_share:
        low, high = max(0.0, low), min(1.0, high)
    raw = (high - low) / count
    raw = max(raw, 1.0) if is_whole else raw
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [k * step for k in range(first, last + 1)]


def _tick(value: float, step: float, as_percent: bool) -> str:
    """A round number with as many digits as its neighbours need to differ from it."""
    if as_percent:
        value, step = 100 * value, 100 * step
    if 0 < step < 1e-3 or step >= 1e5:
        text = f"{value:.1e}" if value else "0"
    else:
        digits = max(0, 1 - math.floor(math.log10(step) + 1e-9))
        text = f"{value:,.{digits}f}"
        if digits and all(f"{step * k:.{digits}f}".endswith("0") for k in range(1, 10)):
            text = f"{value:,.{digits - 1}f}"
    return f"{text} %" if as_percent else text


def _number(value: float, as_percent: bool) -> str:
    return f"{100 * value:.3g} %" if as_percent else f"{value:.4g}"
