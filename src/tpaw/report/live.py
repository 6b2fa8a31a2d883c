"""What a person sees of a run that goes on, in its own terminal or in another one."""

from __future__ import annotations

import contextlib

from rich.console import Group, RenderableType

from tpaw.config.plan import plan_run
from tpaw.config.schema import RunConfig
from tpaw.errors import InputError
from tpaw.report.alarms import Alarm
from tpaw.report.costs import readable_time
from tpaw.report.forecast import seconds_left
from tpaw.report.status import done_and_next
from tpaw.report.summary import summarise
from tpaw.report.tables import summary_table
from tpaw.storage.artifacts import is_published, read_manifest
from tpaw.storage.run_directory import RunDirectory


def live_view(run: RunDirectory, config: RunConfig, width: int) -> RenderableType:
    """What is done, what comes next, the time left, the table so far, and alarms.

    Args:
        width: columns of the terminal.

    Raises:
        ArtifactError: a manifest or a results.json is damaged.
    """
    done, upcoming = done_and_next(run, config)
    summary = summarise(run, config)
    left = None
    if is_published(run.inputs):
        with contextlib.suppress(InputError):
            left = seconds_left(summary, plan_run(config, read_manifest(run.inputs)["rows"]))
    lines = [f"{run.root}: stages done: {len(done)}"]
    if upcoming is None:
        lines = [f"{run.root}: finished"]
    elif left is not None:
        lines[0] += f", about {readable_time(left)} of work left with the whole of this stage"
    lines += [f"next  {upcoming}"] if upcoming else []
    alarms = [Alarm(**alarm).line() for alarm in summary["alarms"]]
    table = [summary_table(summary, width)] if done else []
    return Group(*lines, *table, *alarms, *summary["notes"])
