"""What the commands of both command-line modules share."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.console import Console

from tpaw.errors import Interrupted
from tpaw.runtime.interrupt import StopSignal

Overrides = Annotated[
    list[str],
    typer.Option("--set", help="section.key=value, over everything else. May be repeated."),
]


@contextlib.contextmanager
def stoppable(again: str) -> Iterator[StopSignal]:
    """Listen for Ctrl-C and SIGTERM; say what goes on with the work, and exit as a shell expects.

    Args:
        again: the command.
    """
    stop = StopSignal()
    with stop.listening():
        try:
            yield stop
        except (Interrupted, KeyboardInterrupt) as interruption:
            number = getattr(interruption, "signal_number", None) or stop.signal_number or 2
            print(f"stopped; go on with: {again}", file=sys.stderr)
            raise typer.Exit(128 + number) from None


def console_of_stdout() -> Console:
    """The console for results; wide enough for the tables where the output is a file or a pipe."""
    return Console() if sys.stdout.isatty() else Console(width=140)
