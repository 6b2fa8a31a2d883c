"""Write report.html of a run: everything in one file, from summary.json and published artifacts."""

from __future__ import annotations

import time
from pathlib import Path

from tpaw.config.schema import RunConfig
from tpaw.errors import first_line, printable
from tpaw.report.html.content import (
    cost_rows,
    data_facts,
    progress_charts,
    reproduce,
    training_charts,
    training_logs,
)
from tpaw.report.html.render import as_json, page
from tpaw.report.html.samples import KINDS, heldout_samples, training_samples
from tpaw.report.pace import not_before
from tpaw.report.summary import summarise
from tpaw.report.tables import SUMMARY_HEADINGS, summary_cells
from tpaw.report.verdict import verdict
from tpaw.runtime.progress import note
from tpaw.storage.artifacts import write_text
from tpaw.storage.run_directory import RunDirectory

BYTES_OF_SAMPLES = 1_800_000
"""Of held-out and training prompts together, so that the page stays below 2 MB."""
HELDOUT_SHARE = 0.6


class Report:
    """report.html of a run that goes on. It never ends the run, and takes little of its time.

    Args:
        run: the run directory.
        config: the run's configuration.
    """

    def __init__(self, run: RunDirectory, config: RunConfig) -> None:
        self._run = run
        self._config = config
        self._not_before = 0.0
        self._is_old = not run.report_file.exists()

    def after_a_stage(self) -> None:
        """Write it, unless that would take too large a share of the run's time."""
        self._is_old = True
        if time.monotonic() >= self._not_before:
            self.bring_up_to_date()

    def bring_up_to_date(self) -> None:
        """Write it if a stage has ended since. If that fails, say so and go on."""
        if not self._is_old:
            return
        self._is_old = False
        began = time.monotonic()
        try:
            write_report(self._run, self._config)
        except Exception as error:  # a report is no reason to lose a run
            note(f"{self._run.report_file.name} was not written: {printable(first_line(error))}")
        self._not_before = not_before(began)


def write_report(run: RunDirectory, config: RunConfig, output: Path | None = None) -> Path:
    """Write report.html.

    Args:
        run: the run directory.
        config: the run's configuration.
        output: the file. Default: in the run directory.

    Returns:
        The file.

    Raises:
        ArtifactError: a manifest or a results.json is damaged.
    """
    path = output or run.report_file
    write_text(path, rendered(run, config))
    return path


def rendered(run: RunDirectory, config: RunConfig) -> str:
    """The page of a run, also of one that is not finished.

    Raises:
        ArtifactError: a manifest or a results.json is damaged.
    """
    summary = summarise(run, config)
    heldout = heldout_samples(run, config.iterations, int(BYTES_OF_SAMPLES * HELDOUT_SHARE))
    used = len(as_json(heldout.as_json()).encode())
    training = training_samples(run, config, max(0, BYTES_OF_SAMPLES - used))
    problems = [*heldout.problems, *training.problems]
    logs = training_logs(run, config.iterations, problems)
    headings, costs = cost_rows(run, summary)
    samples = {"heldout": heldout.as_json(), "training": training.as_json(), "kinds": list(KINDS)}
    return page(
        "run.html",
        title=run.root.resolve().name,
        kind=summary["method"],
        verdict=verdict(summary),
        alarms=summary["alarms"],
        notes=[*summary["notes"], *dict.fromkeys(problems)],
        headings=SUMMARY_HEADINGS,
        players=[cells for entry in summary["players"] if (cells := summary_cells(entry))],
        progress=progress_charts(summary),
        training=training_charts(logs),
        data=data_facts(run, summary),
        cost_headings=headings,
        costs=costs,
        reproduce=reproduce(run, config),
        samples=as_json(samples),
    )
