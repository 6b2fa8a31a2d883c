"""The command `probe`."""

from __future__ import annotations

from typing import Annotated

import typer

from tpaw.cli.common import (
    Command,
    Overrides,
    Trust,
    console_of_stdout,
    load_libraries,
    stoppable,
)
from tpaw.cli.run import Sources, load

app = typer.Typer()


@app.command(cls=Command)
def probe(
    config: Sources,
    rows: Annotated[
        int,
        typer.Option(
            min=64,
            help="Records to measure on: the first ones of the data. From 1000 on a critic is "
            "fitted too.",
        ),
    ] = 256,
    set_: Overrides = [],  # noqa: B006
    trust: Trust = False,
) -> None:
    """Say what self-play can be expected to add, before a run is paid for.

    It answers a few hundred prompts, compares the first step with that of SFT, and trains for one
    epoch on these records. With many records it fits a small critic too. Nothing of it is kept.
    It prints a conclusion first, then the evidence.

    Example: tpaw probe mine.yaml --rows 1000
    """
    settings = load(config, set_, trust)
    load_libraries("tpaw.probe.measure")
    from tpaw.probe.measure import probe as measure
    from tpaw.probe.table import probe_table
    from tpaw.probe.verdict import conclusion, verdict

    with stoppable("tpaw probe") as stop:
        found = measure(settings, rows, stop)
    console = console_of_stdout()
    console.print_text(conclusion(found.step, found.answers, found.critic))
    console.print(probe_table(found))
    for text in verdict(*found):
        console.print_text(text)
