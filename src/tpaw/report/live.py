"""What a person sees of a run that goes on, in its own terminal or in another one."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType

from tpaw.config.plan import IterationPlan, plan_run
from tpaw.config.schema import RunConfig
from tpaw.errors import InputError
from tpaw.report.alarms import Alarm
from tpaw.report.costs import readable_time
from tpaw.report.forecast import running_stage, seconds_left
from tpaw.report.status import done_and_next
from tpaw.report.summary import summarise
from tpaw.report.tables import summary_table
from tpaw.runtime.progress import Bar, View
from tpaw.storage.artifacts import is_published, read_manifest
from tpaw.storage.run_directory import RunDirectory


def live_view(run: RunDirectory, config: RunConfig, width: int) -> View:
    """What is done, what comes next, the time left, the table so far, and alarms.

    Args:
        width: columns of the terminal.

    Returns:
        A function of the bar that runs now. The bar of a stage shortens the time left.

    Raises:
        ArtifactError: a manifest or a results.json is damaged.
    """
    done, upcoming = done_and_next(run, config)
    summary = summarise(run, config)
    plans: list[IterationPlan] = []
    if is_published(run.inputs):
        with contextlib.suppress(InputError):
            plans = plan_run(config, read_manifest(run.inputs)["rows"])
    alarms = [Alarm(**alarm).line() for alarm in summary["alarms"]]
    table = [summary_table(summary, width)] if done else []

    def view(bar: Bar | None) -> RenderableType:
        if upcoming is None:
            first = [f"{run.root}: finished"]
        else:
            left = _time_left(summary, plans, bar) if plans else ""
            first = [f"{run.root}: stages done: {len(done)}{left}", f"next  {upcoming}"]
        return Group(*first, *table, *alarms, *summary["notes"])

    return view


def _time_left(summary: Mapping[str, Any], plans: Sequence[IterationPlan], bar: Bar | None) -> str:
    running = running_stage(bar, summary, plans)
    left = seconds_left(summary, plans, running)
    if left is None:
        return ""
    whole = " with the whole of this stage" if running is None else ""
    return f", about {readable_time(left)} of work left{whole}"
