"""Draw the figures of a study as SVG and PNG. The only input is study.json."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tpaw.report.series import (
    SAMPLED_ACCURACY,
    Series,
    Study,
    has_one_length,
    label_of,
    series_of,
    single_axis,
    values_of,
    x_label,
)
from tpaw.storage.artifacts import write_file

# Those of report.html on white: the colours of Okabe and Ito, which colour-blind people can
# distinguish, as dark as text must be. Markers distinguish the lines in black-and-white print.
COLOURS = ("#0072b2", "#c04a00", "#007a58", "#a8477f", "#8a6500", "#2a7fb0", "#000000", "#777777")
QUIET = "#5b6066"
MARKERS = "osD^vPX*"
LONGEST_AT_THE_LINE = 28
"""Letters of a name that stands where its line ends."""
# Of names and the legend, at their size of font.
INCHES_OF_LINE, INCHES_OF_LETTER, INCHES_OF_ROW = 0.5, 0.067, 0.17
LOGARITHMIC_FROM = 20
"""The x axis is logarithmic if the largest value of the setting is more than this many times the
smallest one."""


def draw_figures(study: Study, folder: Path) -> list[Path]:
    """Draw every figure that the study has data for.

    Args:
        study: the content of study.json.
        folder: where the files are written; it is created.

    Returns:
        The SVG files. Next to each is a PNG file of the same name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, figure in _figures(study):
        for suffix in (".svg", ".png"):
            write_file(folder / f"{name}{suffix}", _saver(figure, suffix))
        drawn.append(folder / f"{name}.svg")
    return drawn


def _figures(study: Study) -> Iterator[tuple[str, Figure]]:
    measures = study["measures"]
    if not measures:
        return
    if varied := single_axis(study):
        for measure in measures:
            if measure in ("accuracy", "gap", study["primary"]):
                yield f"{_slug(measure)}-by-{_slug(varied)}", _by_setting(study, varied, measure)
    else:
        main = study["primary"]
        yield f"{_slug(main)}-by-iteration", _by_iteration(study, [main])
        if gaps := [m for m in ("gap", "nonpositive_gap_share") if m in measures]:
            yield "gap-by-iteration", _by_iteration(study, gaps)
        if any(run["curve"] for run in _runs(study)):
            yield "target-reward-by-step", _curves(study)
    if any(measure.startswith(SAMPLED_ACCURACY) for measure in measures):
        yield "accuracy-by-temperature", _by_temperature(study)


def _by_iteration(study: Study, measures: Sequence[str]) -> Figure:
    """Draw measures by iteration: the paper's figures 2c, 2d and 3, and the gap.

    If the conditions have different numbers of iterations, the x axis is the share of them.
    """
    figure = _figure(len(measures))
    for axes, measure in zip(figure.axes, measures, strict=True):
        for i, line in enumerate(series_of(study, measure)):
            _line(axes, i, line)
        axes.set_xlabel(f"{x_label(study)} (0: the SFT model)")
        _title(axes, label_of(measure))
        axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=has_one_length(study)))
    _name_lines(figure, study)
    return figure


def _by_temperature(study: Study) -> Figure:
    """Draw the last accuracies by decoding temperature, beside those of the SFT model."""
    names = [m for m in study["measures"] if m.startswith(SAMPLED_ACCURACY)]
    by_temperature = {0.0: "accuracy"} | {float(n[len(SAMPLED_ACCURACY) :]): n for n in names}
    figure = _figure(1)
    [axes] = figure.axes
    conditions = [(name, c) for name, c in study["conditions"].items() if c["by_iteration"]]
    lines = [(name, condition["by_iteration"][-1]) for name, condition in conditions]
    lines += [("the SFT model", conditions[0][1]["by_iteration"][0])]
    for i, (name, entry) in enumerate(lines):
        points = [(t, entry[m]) for t, m in sorted(by_temperature.items()) if m in entry]
        _line(axes, i, Series.of(name, points))
    axes.set_xlabel("temperature (0: greedy)")
    _title(axes, "accuracy, last iteration")
    _name_lines(figure, study)
    return figure


def _by_setting(study: Study, setting: str, measure: str) -> Figure:
    """Draw the last iteration by the value of one setting: the paper's figures 4 and 5."""
    figure = _figure(1)
    [axes] = figure.axes
    for i, line in enumerate(series_of(study, measure)):
        _line(axes, i, line)
    values = values_of(study, setting)
    if values[0] > 0 and values[-1] > LOGARITHMIC_FROM * values[0]:
        axes.set_xscale("log")
    axes.set_xlabel(x_label(study))
    _title(axes, f"{label_of(measure)}, last iteration")
    _name_lines(figure, study)
    return figure


def _curves(study: Study) -> Figure:
    """Draw the target reward by step of the last iteration: the paper's figures 2a and 2b."""
    figure = _figure(1)
    [axes] = figure.axes
    for i, (name, condition) in enumerate(study["conditions"].items()):
        curves = [run["curve"] for run in condition["runs"].values() if run["curve"]]
        steps = sorted(set.intersection(*({s for s, _ in c} for c in curves))) if curves else []
        if not steps:
            continue
        rewards = np.array([[dict(curve)[step] for step in steps] for curve in curves])
        mean = rewards.mean(axis=0)
        axes.plot(steps, mean, **_style(i), label=name, linewidth=1.5)
        if len(curves) > 1:
            spread = rewards.std(axis=0, ddof=1)
            axes.fill_between(
                steps, mean - spread, mean + spread, color=COLOURS[i % len(COLOURS)], alpha=0.15,
                linewidth=0,
            )  # fmt: skip
    axes.axhline(0, color="0.5", linewidth=0.8)
    axes.set_xlabel("optimizer step of the last iteration")
    _title(axes, label_of("target_reward"))
    _name_lines(figure, study, band="± 1 SD over seeds")
    return figure


def _line(axes: Axes, i: int, line: Series) -> None:
    style, marker = _style(i), MARKERS[i % len(MARKERS)]
    axes.plot(line.x, line.y, **style, marker=marker, markersize=4, label=line.name)
    if line.low:
        axes.fill_between(
            line.x, line.low, line.high, color=style["color"], alpha=0.12, linewidth=0
        )


def _style(i: int) -> dict[str, Any]:
    """Colour and dashes of line i; the second round of the colours is dashed."""
    rounds, place = divmod(i, len(COLOURS))
    return {"color": COLOURS[place], "linestyle": "--" if rounds % 2 else "-"}


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=9, fontweight="bold")


def _figure(panels: int) -> Figure:
    figure = Figure(figsize=(5.2 * panels, 3.3), layout="constrained")
    for axes in np.atleast_1d(figure.subplots(1, panels)):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#d5d8dc", linewidth=0.6)
        axes.tick_params(labelsize=8, labelcolor=QUIET, color="#d5d8dc")
        axes.xaxis.label.set(size=8, color=QUIET)
        axes.spines[["left", "bottom"]].set_color("#d5d8dc")
    return figure


def _name_lines(figure: Figure, study: Study, band: str = "95 % t-interval over seeds") -> None:
    """Name each line where it ends; long names stand in a legend below the axes."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    seeds = max(len(c["runs"]) for c in study["conditions"].values())
    shown = f"{seeds} seeds, band: {band}" if seeds > 1 else "1 seed"
    longest = max(map(len, labels), default=1)
    width, height = figure.get_size_inches()
    if longest <= LONGEST_AT_THE_LINE:
        figure.set_size_inches(
            width + len(figure.axes) * (0.1 + longest * INCHES_OF_LETTER),
            max(height, 0.8 + len(labels) * INCHES_OF_ROW),
        )
        for axes in figure.axes:
            _name_at_the_ends(axes, figure.get_figheight() - 0.8)
        figure.supxlabel(shown, fontsize=7, color=QUIET)
        return
    columns = max(1, min(len(labels), int(width / (INCHES_OF_LINE + longest * INCHES_OF_LETTER))))
    figure.set_figheight(height + INCHES_OF_ROW * (1 - (-len(labels) // columns)))
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8,
        title=shown, title_fontsize=7,
    )  # fmt: skip


def _name_at_the_ends(axes: Axes, height: float) -> None:
    """Write the names right of the axes, as near to the ends of their lines as they have room.

    Args:
        height: of the axes, in inches, about.
    """
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, top)
    gap = (top - bottom) * INCHES_OF_ROW / height
    handles, labels = axes.get_legend_handles_labels()
    ends: list[tuple[float, float, str, Any]] = []
    for handle, label in zip(handles, labels, strict=True):
        line: Any = handle
        xs, ys = line.get_data()
        if len(xs):
            ends.append((float(ys[-1]), float(xs[-1]), label, line.get_color()))
    ends.sort(key=lambda end: end[0])
    places = spread([y for y, *_ in ends], gap, bottom, top)
    for place, (y, x, label, colour) in zip(places, ends, strict=True):
        axes.annotate(
            label, xy=(x, y), xytext=(1.03, place), textcoords=("axes fraction", "data"),
            fontsize=8, color=colour, va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.5,
                        "shrinkA": 1, "shrinkB": 3},
        )  # fmt: skip


def spread(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move values apart, by as little as it takes.

    Args:
        values: in rising order.
        gap: the smallest distance between two neighbours afterwards.
        low, high: where they should stay, if there is room.

    Returns:
        The places, in the same order. Their sum of squared moves is the smallest one, but for what
        `low` and `high` ask.
    """
    # Groups of neighbours that touch move together: their places without gaps have a common mean.
    groups: list[list[float]] = []
    for k, value in enumerate(values):
        groups.append([value - k * gap])
        while len(groups) > 1 and np.mean(groups[-2]) > np.mean(groups[-1]):
            last = groups.pop()
            groups[-1] += last
    places = [float(np.mean(group)) for group in groups for _ in group]
    places = [place + k * gap for k, place in enumerate(places)]
    if places and places[-1] > high:
        places = [min(p, high - (len(places) - 1 - k) * gap) for k, p in enumerate(places)]
    return [max(place, low + k * gap) for k, place in enumerate(places)]


def _saver(figure: Figure, suffix: str) -> Callable[[Path], None]:
    def save(path: Path) -> None:
        # Store text as text, and fix the ids and the date, so that the same data give equal files.
        # A name with `$` is no formula. The numbers of an axis are, and are not there yet.
        texts: list[Any] = figure.findobj(mpl.text.Text)
        for text in texts:
            if text.get_text():
                text.set_parse_math(False)
        with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "tpaw"}):
            metadata = {"Date": None} if suffix == ".svg" else None
            figure.savefig(path, format=suffix[1:], dpi=160, metadata=metadata)

    return save


def _runs(study: Study) -> Iterator[Mapping[str, Any]]:
    for condition in study["conditions"].values():
        yield from condition["runs"].values()


def _slug(setting: str) -> str:
    return setting.partition(",")[0].replace(".", "-")
