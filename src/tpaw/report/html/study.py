"""The page of a study: charts and tables, from study.json alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml
from markupsafe import Markup

from tpaw.report.html.charts import MOST_LINES, Line, chart
from tpaw.report.html.content import Cell
from tpaw.report.html.render import page
from tpaw.report.series import Study, label_of, series_of, single_axis, values_of, x_label
from tpaw.report.study import detailed_tables, main_tables, sentences
from tpaw.storage.artifacts import write_text


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
    values = [] if varied is None else values_of(study, varied)
    for measure in study["measures"]:
        lines = [Line(*line) for line in series_of(study, measure) if line.x]
        if values:  # each has the same room, whatever lies between them
            lines = [line._replace(x=[values.index(x) for x in line.x]) for line in lines]
        of = -(-len(lines) // MOST_LINES)
        for k in range(of):
            part = lines[k * MOST_LINES : (k + 1) * MOST_LINES]
            number = f" ({k + 1} of {of})" if of > 1 else ""
            yield chart(
                f"{label_of(measure)}{number}",
                part,
                x_label=x_label(study),
                x_names=[f"{value:g}" for value in values],
                with_points=True,
            )
