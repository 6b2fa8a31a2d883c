"""The report of a study: tables in the terminal, and report.md."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from tpaw.errors import InputError, printable
from tpaw.report.series import Study, has_one_length, label_of

_KEYS = {
    "name", "command", "study", "seeds", "evaluated_on", "jobs", "machine", "failures", "measures",
    "primary", "baseline", "conditions", "comparisons",
}  # fmt: skip
Rows = list[list[str]]


def read_study_results(path: Path) -> Study:
    """Read study.json.

    Raises:
        InputError: it is not one, or an older version wrote it.
    """
    try:
        study = json.loads(path.read_text(encoding="utf-8"))
        missing = _KEYS - {*study}
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: cannot be read as the results of a study: {error}") from None
    if missing:
        raise InputError(
            f"{path}: not the results of a study: it has no {', '.join(sorted(missing))}; run "
            "`tpaw study` again"
        )
    found: Study = study
    return found


def study_tables(study: Study) -> list[Table]:
    """Build tables for the terminal: the primary measure by iteration, and the comparisons.

    Args:
        study: the content of study.json.
    """
    tables = []
    for title, headings, rows in main_tables(study):
        table = Table(title=title, title_style="")
        for i, heading in enumerate(headings):
            table.add_column(heading, justify="left" if i == 0 else "right")
        for row in rows:
            table.add_row(*row)
        tables.append(table)
    return tables


def sentences(study: Study) -> list[str]:
    """Return warnings about what the numbers cannot show, and the runs that failed.

    Args:
        study: the content of study.json.
    """
    found = list(dict.fromkeys(c["caution"] for c in study["comparisons"] if c["caution"]))
    found += [
        f"{c['condition']}: {c['note']}"
        for c in study["comparisons"]
        if c["note"] and not c["caution"]
    ]
    found += [f"failed and left out: {name}: {why}" for name, why in study["failures"].items()]
    return found


def study_report(study: Study, figures: Sequence[Path]) -> str:
    """Write the report as Markdown.

    Args:
        study: the content of study.json.
        figures: the SVG files. The report refers to them as figures/NAME.

    Returns:
        The text of report.md.
    """
    machine = study["machine"]
    seeds = ", ".join(map(str, study["seeds"]))
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        f"# {study['name']}",
        "",
        f"`{study['command']}`: {len(study['conditions'])} conditions, seeds {seeds}. "
        f"{machine['processor']}, cores: {machine['cores']}, runs at a time: {study['jobs']}; "
        f"{versions}, Python {machine['python']}.",
        "",
        f"Evaluated on {', '.join(f'`{name}`' for name in study['evaluated_on'])}.",
        "",
    ]
    lines += [f"- {sentence}" for sentence in sentences(study)] + [""]
    for path in figures:
        lines += [f"![{path.stem}](figures/{path.name})", ""]
    for title, headings, rows in [*main_tables(study), *detailed_tables(study)]:
        lines += [f"**{title}**", "", *_markdown(headings, rows), ""]
    return "\n".join(lines)


def main_tables(study: Study) -> Iterator[tuple[str, list[str], Rows]]:
    """Title, headings and rows of the tables that answer the question of the study.

    There are none if no run has ended.
    """
    if not study["measures"]:
        return
    yield _by_iteration(study, study["primary"])
    if study["comparisons"]:
        yield _compared(study)
    if "win_rates" in study:
        yield _judged(study["win_rates"])


def detailed_tables(study: Study) -> Iterator[tuple[str, list[str], Rows]]:
    """The same of all other measures, and of every run."""
    if not study["measures"]:
        return
    for measure in study["measures"]:
        if measure != study["primary"]:
            yield _by_iteration(study, measure)
    iterations = _iterations(study)
    rows = [
        [name, seed, *(_number(entry.get(study["primary"])) for entry in run["iterations"])]
        for name, condition in study["conditions"].items()
        for seed, run in condition["runs"].items()
    ]
    for row in rows:
        row += ["–"] * (2 + iterations - len(row))
    headings = ["condition", "seed", *(f"θ_{t}" for t in range(iterations))]
    yield f"{label_of(study['primary'])}, every run", headings, [[str(c) for c in r] for r in rows]


def _by_iteration(study: Study, measure: str) -> tuple[str, list[str], Rows]:
    title = f"{label_of(measure)}: mean over seeds ± SD [95 % t-interval]"
    is_whole = has_one_length(study)
    headings = [f"θ_{t}" for t in range(_iterations(study))] if is_whole else ["θ_0", "last θ"]
    rows = []
    for name, condition in study["conditions"].items():
        entries = [entry.get(measure) for entry in condition["by_iteration"]]
        if not is_whole:
            entries = [entries[0], entries[-1]] if entries else []
        rows.append([name, str(len(condition["runs"])), *map(_over_seeds, entries)])
        rows[-1] += ["–"] * (len(headings) - len(entries))
    return title, ["condition", "seeds", *headings], rows


def _compared(study: Study) -> tuple[str, list[str], Rows]:
    title = (
        f"{label_of(study['primary'])} after the last iteration, against {study['baseline']}, seed "
        f"by seed; Holm over {len(study['comparisons'])}"
    )
    headings = ["condition", "seeds", "difference [95 %]", "d_z (Hedges)", "t: p", "p Holm"]
    headings += ["sign flips: p", "p Holm"]
    rows = []
    for c in study["comparisons"]:
        interval = c["interval_95"]
        shown = f" [{interval[0]:+.3f}, {interval[1]:+.3f}]" if interval else ""
        rows.append(
            [
                c["condition"],
                str(len(c["seeds"])),
                f"{c['difference']:+.3f}{shown}",
                _number(c["g_z"], 2),
                *(
                    _p_value(c.get(f"{kind}{adjusted}"))
                    for kind in ("t_p_value", "sign_flip_p_value")
                    for adjusted in ("", "_holm")
                ),
            ]
        )
    return title, headings, rows


def _judged(win_rates: Mapping[str, Any]) -> tuple[str, list[str], Rows]:
    title = f"{printable(win_rates['measure'])}: against {win_rates['baseline']}, seed by seed"
    headings = ["condition", "seeds", "win rate: mean ± SD [95 %]", "t: p", "sign flips: p"]
    headings += ["wins", "losses", "ties", "invalid"]
    rows = []
    for name, found in win_rates["conditions"].items():
        test = found["against_half"] or {}
        counts = [
            sum(seed[count] for seed in found["by_seed"].values())
            for count in ("wins", "losses", "ties", "invalid")
        ]
        rows.append(
            [
                name,
                str(len(found["by_seed"])),
                _over_seeds(found["win_rate"]),
                _p_value(test.get("t_p_value")),
                _p_value(test.get("sign_flip_p_value")),
                *(f"{count:,}" for count in counts),
            ]
        )
    return title, headings, rows


def _over_seeds(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "–"
    if found["sd"] is None:
        return f"{found['mean']:.3f}"
    low, high = found["interval_95"]
    return f"{found['mean']:.3f} ± {found['sd']:.3f} [{low:.3f}, {high:.3f}]"


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _p_value(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"


def _iterations(study: Study) -> int:
    return max(len(condition["by_iteration"]) for condition in study["conditions"].values())


def _markdown(headings: Sequence[str], rows: Rows) -> list[str]:
    return [
        "| " + " | ".join(cells) + " |"
        for cells in (headings, ["---"] + ["---:"] * (len(headings) - 1), *rows)
    ]
