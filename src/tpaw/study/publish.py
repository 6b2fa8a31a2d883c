"""Write the results of a study: study.json, report.md and figures/."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tpaw.report.figures import draw_figures
from tpaw.report.html.study import write_study_page
from tpaw.report.study import study_report
from tpaw.storage.artifacts import write_json, write_text
from tpaw.storage.run_directory import environment
from tpaw.study.analysis import analyse
from tpaw.study.config import Condition, StudyConfig
from tpaw.study.results import collect
from tpaw.study.runner import StudyRun, cores


def publish_study(
    source: str,
    study: StudyConfig,
    conditions: Sequence[Condition],
    runs: Sequence[StudyRun],
    failures: Mapping[str, str],
    output: Path,
    jobs: int,
    win_rates: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Collect the results of the runs, compute the statistics and write the files.

    Args:
        source: path or name of the study.
        study: the configuration of the study.
        conditions: the conditions of the study.
        runs: all runs. Only finished ones count.
        failures: names of failed runs, with the reason.
        output: folder of the study.
        jobs: number of runs at a time.
        win_rates: see `judging.judge_study`; None if no judge was asked.

    Returns:
        The content of study.json.
    """
    content = {
        "name": Path(source).stem,
        "command": f"tpaw study {shlex.quote(source)} --jobs {jobs}",
        "study": study.model_dump(mode="json", by_alias=True),
        "seeds": list(study.seeds),
        "evaluated_on": _evaluated_on(runs),
        "jobs": jobs,
        "machine": {"processor": _processor(), "cores": cores(), **environment()},
        "failures": dict(failures),
        **analyse(conditions, collect(runs), study.baseline),
    }
    if win_rates is not None:
        content["win_rates"] = win_rates
    write_json(output / "study.json", content)
    figures = draw_figures(content, output / "figures")
    write_text(output / "report.md", study_report(content, figures))
    write_study_page(output / "report.html", content)
    return content


def _evaluated_on(runs: Sequence[StudyRun]) -> list[str]:
    """Return the files of held-out records and the suites, as the configurations name them."""
    names = []
    for evaluate in (run.config.evaluate for run in runs):
        names += [evaluate.data.path] if evaluate.data is not None else []
        names += evaluate.suites
    return list(dict.fromkeys(names))


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
