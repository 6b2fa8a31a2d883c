"""The page of `tpaw compare --html`: the numbers, and the same prompts' answers side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from tpaw.evaluation.compare import Comparison, ComparisonRow
from tpaw.evaluation.load import Evaluation
from tpaw.report.comparison import HEADINGS, caption_of, cells_of
from tpaw.report.html.charts import MOST_LINES, Line, chart
from tpaw.report.html.render import as_json, page
from tpaw.report.html.samples import KINDS, Samples, samples_of_evaluations
from tpaw.report.summary import summarise
from tpaw.storage.artifacts import write_text
from tpaw.storage.run_directory import RunDirectory

BYTES_OF_SAMPLES = 1_800_000


def write_comparison(path: Path, comparison: Comparison, evaluations: Sequence[Evaluation]) -> None:
    """Write the page of a comparison.

    Args:
        path: the file.
        comparison: of these evaluations.
        evaluations: the baseline, then the other systems.
    """
    samples = _samples(comparison, evaluations)
    nothing = Samples([], [], {}, 0, 0, [])
    content = page(
        "comparison.html",
        title=" · ".join(comparison.systems),
        kind="comparison",
        verdict=verdict(comparison),
        notes=[*comparison.notes, *samples.problems],
        headings=HEADINGS,
        rows=[cells_of(row) for row in comparison.rows],
        caption=caption_of(comparison),
        progress=_progress(evaluations),
        samples=as_json(
            {"heldout": samples.as_json(), "training": nothing.as_json(), "kinds": list(KINDS)}
        ),
    )
    write_text(path, content)


def verdict(comparison: Comparison) -> list[str]:
    """A sentence for each system: how it differs from the baseline on the first measure."""
    measure = comparison.rows[0].measure
    baseline, *others = [row for row in comparison.rows if row.measure == measure]
    return [_sentence(baseline, row) for row in others]


def _sentence(baseline: ComparisonRow, row: ComparisonRow) -> str:
    assert row.difference is not None
    how = "equals" if row.difference == 0 else "is above" if row.difference > 0 else "is below"
    text = (
        f"{row.measure}: {row.system} with {row.value:.3f} {how} {baseline.system} with "
        f"{baseline.value:.3f}"
    )
    if row.holm_p_value is None:
        return f"{text}. There is no test."
    is_sure = row.holm_p_value < 0.05 or row.difference == 0
    sure = "" if is_sure else ", which may be chance"
    return f"{text}{sure} (p = {row.holm_p_value:.2g} after Holm's correction)."


def _samples(comparison: Comparison, evaluations: Sequence[Evaluation]) -> Samples:
    """Held-out samples of runs. The items of a suite have no texts that a page could show."""
    if comparison.suite is not None:
        return Samples([], [], {}, 0, 0, [])
    folders = {evaluation.name: evaluation.folder for evaluation in evaluations}
    inputs = _run_of(evaluations[0]).inputs / "heldout.parquet"
    return samples_of_evaluations(inputs, folders, BYTES_OF_SAMPLES)


def _progress(evaluations: Sequence[Evaluation]) -> list[Markup]:
    """Accuracy by iteration of each run that a system is of, once for each run."""
    if evaluations[0].suite is not None:
        return []
    lines = []
    roots = list(dict.fromkeys(_run_of(evaluation).root for evaluation in evaluations))
    names = _different_ends(roots)
    for root in roots[:MOST_LINES]:
        run = RunDirectory(root)
        found = [
            (entry["iteration"], entry["evaluation"]["exact_match"])
            for entry in summarise(run, run.load_config())["players"]
            if "exact_match" in entry.get("evaluation", {})
        ]
        if found:
            low, high = zip(*(exact["interval_95"] for _, exact in found), strict=True)
            ys = [exact["accuracy"] for _, exact in found]
            lines.append(Line(names[root], [i for i, _ in found], ys, low, high))
    if not lines:
        return []
    return [
        chart("accuracy, held-out", lines, x_label="iteration", as_percent=True, with_points=True)
    ]


def _different_ends(paths: Sequence[Path]) -> dict[Path, str]:
    """Of each path, as much of its end as tells it from the others."""
    for count in range(1, max((len(path.parts) for path in paths), default=1)):
        ends = {path: "/".join(path.parts[-count:]) for path in paths}
        if len(set(ends.values())) == len(paths):
            return ends
    return {path: str(path) for path in paths}


def _run_of(evaluation: Evaluation) -> RunDirectory:
    return RunDirectory(evaluation.folder.absolute().parents[2])
