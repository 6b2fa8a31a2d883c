"""The page of a study: charts and tables, from study.json alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from markupsafe import Markup

from tpaw.report.figures import has_one_length, label_of, single_axis, value_of
from tpaw.report.html.charts import MOST_LINES, Line, chart
from tpaw.report.html.content import Cell
from tpaw.report.html.render import page
from tpaw.report.study import detailed_tables, main_tables, sentences
from tpaw.storage.artifacts import write_text

Study = Mapping[str, Any]


class _Table(NamedTuple):
    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


def write_study_page(path: Path, study: Study) -> None:
    """Write the page of a study.

    Args:
        path: the file.
        study: the content of study.json.
    """
    machine = study["machine"]
    facts = {
        "seeds": ", ".join(map(str, study["seeds"])),
        "evaluated on": ", ".join(study["evaluated_on"]),
        "processor": machine["processor"],
        "cores": machine["cores"],
        "runs at a time": study["jobs"],
        **machine["versions"],
        "python": machine["python"],
    }
    content = page(
        "study.html",
        title=study["name"],
        kind="study",
        verdict=verdict(study),
        notes=sentences(study),
        charts=list(_charts(study)),
        seeds=_seeds(study),
        tables=[_Table(*table) for table in main_tables(study)],
        details=[_Table(*table) for table in detailed_tables(study)],
        command=study["command"],
        machine=[Cell(name, str(value)) for name, value in facts.items()],
        configuration=yaml.safe_dump(study["study"], sort_keys=False, allow_unicode=True),
    )
    write_text(path, content)


def _seeds(study: Study) -> str:
    if len(study["seeds"]) == 1:
        return "One seed."
    band = "The shaded area is the 95 % t-interval of the mean over seeds."
    return f"{len(study['seeds'])} seeds. {band}"


def verdict(study: Study) -> list[str]:
    """One or two sentences: the best condition, and how sure it is that it beats the baseline."""
    primary, baseline = study["primary"], study["baseline"]
    last = {
        name: condition["by_iteration"][-1][primary]
        for name, condition in study["conditions"].items()
        if condition["by_iteration"] and primary in condition["by_iteration"][-1]
    }
    if not last:
        return ["No run of this study has ended."]
    best = max(last, key=lambda name: last[name]["mean"])
    found = [
        f"Highest {label_of(primary)} after the last iteration, of {len(last)} conditions: "
        f"{last[best]['mean']:.3f}, {best}."
    ]
    compared = {c["condition"]: c for c in study["comparisons"]}
    if best in compared:
        c = compared[best]
        p_values = [
            f"{name} {c[key]:.2g}"
            for name, key in (
                ("t-test", "t_p_value_holm"), ("sign flips", "sign_flip_p_value_holm"),
            )
            if c.get(key) is not None and len(c["seeds"]) > 1
        ]  # fmt: skip
        tests = f"; p after Holm's correction: {', '.join(p_values)}" if p_values else ""
        found.append(f"That is {c['difference']:+.3f} from {baseline}, seed by seed{tests}.")
    elif best == baseline and compared:
        found.append("That is the baseline: no condition is above it.")
    return found


def _charts(study: Study) -> Iterator[Markup]:
    varied = single_axis(study)
    for measure in study["measures"]:
        lines, names = (
            _by_setting(study, varied, measure) if varied else (_by_iteration(study, measure), ())
        )
        of = -(-len(lines) // MOST_LINES)
        for k in range(of):
            part = lines[k * MOST_LINES : (k + 1) * MOST_LINES]
            number = f" ({k + 1} of {of})" if of > 1 else ""
            share = "" if has_one_length(study) else "share of the "
            yield chart(
                f"{label_of(measure)}{number}",
                part,
                x_label=varied.partition(",")[0] if varied else f"{share}iteration",
                x_names=names,
                with_points=True,
            )


def _line(name: str, x: Sequence[float], found: Sequence[Mapping[str, Any]]) -> Line:
    intervals = [f["interval_95"] for f in found]
    low, high = zip(*intervals, strict=True) if all(intervals) else ((), ())
    return Line(name, x, [f["mean"] for f in found], low, high)


def _by_iteration(study: Study, measure: str) -> list[Line]:
    is_share = not has_one_length(study)
    lines = []
    for name, condition in study["conditions"].items():
        entries = condition["by_iteration"]
        last = max(len(entries) - 1, 1) if is_share else 1
        points = [(t / last, e[measure]) for t, e in enumerate(entries) if e.get(measure)]
        if points:
            lines.append(_line(name, [x for x, _ in points], [found for _, found in points]))
    return lines


def _by_setting(study: Study, setting: str, measure: str) -> tuple[list[Line], Sequence[str]]:
    """The last iteration by the value of the setting: lines, and the names of the values."""
    conditions = study["conditions"].values()
    values = sorted({value_of(c["settings"][setting]) for c in conditions})
    lines = []
    for method in dict.fromkeys(c["method"] for c in conditions):
        found = {
            values.index(value_of(c["settings"][setting])): c["by_iteration"][-1][measure]
            for c in conditions
            if c["method"] == method and c["by_iteration"] and c["by_iteration"][-1].get(measure)
        }
        if found:
            lines.append(_line(method, sorted(found), [found[x] for x in sorted(found)]))
    return lines, [f"{value:g}" for value in values]
