"""study.json, report.md and figures/: what a study leaves for people and for other programs."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tpaw.report.figures import draw_figures
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
) -> dict[str, Any]:
    """Gather what the runs have shown, and write it; returns what study.json holds."""
    content = {
        "name": Path(source).stem,
        "command": f"tpaw study {shlex.quote(source)} --jobs {jobs}",
        "study": study.model_dump(mode="json", by_alias=True),
        "seeds": list(study.seeds),
        "jobs": jobs,
        "machine": {"processor": _processor(), "cores": cores(), **environment()},
        "failures": dict(failures),
        **analyse(conditions, collect(runs), study.baseline),
    }
    write_json(output / "study.json", content)
    figures = draw_figures(content, output / "figures")
    write_text(output / "report.md", study_report(content, figures))
    return content


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
