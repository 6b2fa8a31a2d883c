"""Options and helpers that several commands share."""

from __future__ import annotations

import contextlib
import gc
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from tpaw.errors import Interrupted, for_terminal
from tpaw.runtime.console import TextConsole
from tpaw.runtime.interrupt import StopSignal

Overrides = Annotated[
    list[str],
    typer.Option(
        "--set", help="A setting as section.key=value. It overrides every CONFIG. Can be repeated."
    ),
]

Trust = Annotated[
    bool,
    typer.Option(
        "--trust",
        help="Run what a run directory or a suite file asks for: Python code, and a generation "
        "server that it starts or sends prompts to. Without it, both are refused. Use it only if "
        "you trust whoever made them.",
    ),
]


class Command(TyperCommand):
    """A command whose help has whole paragraphs, as wide as the terminal.

    Its usage line shows `CONFIG...`, where typer shows `{CONFIG...}...`.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # Lines of a docstring end where the source does; typer would keep these line ends.
        self.help = re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.cleandoc(self.help or ""))

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The parts of the usage line after the command's name."""
        pieces = super().collect_usage_pieces(ctx)
        return [re.sub(r"^\{(.*?)(\.\.\.)?\}", r"\1", piece) for piece in pieces]


@contextlib.contextmanager
def stoppable(again: str) -> Iterator[StopSignal]:
    """Turn Ctrl-C and SIGTERM into a stop at the next safe point.

    On a stop, print the command that resumes the work and exit with 128 plus the signal's number,
    as a shell does.

    Args:
        again: the command that resumes the work.

    Yields:
        The signal to pass to the work.
    """
    stop = StopSignal()
    with stop.listening():
        try:
            yield stop
        except (Interrupted, KeyboardInterrupt) as interruption:
            number = getattr(interruption, "signal_number", None) or stop.signal_number or 2
            print(for_terminal(f"stopped; to resume, run: {again}"), file=sys.stderr)
            raise typer.Exit(128 + number) from None


def load_libraries(module: str) -> None:
    """Import a module that needs torch and transformers, in less time than a plain import.

    Garbage collection is off during the import. Later collections do not look at the objects that
    exist at its end: they are modules and functions, and live as long as the process. There are so
    many that looking at them took about a fifth of the import, and time after each stage of a run.

    Args:
        module: its full name. If it is there already, nothing happens.
    """
    if module in sys.modules:
        return
    gc.disable()
    try:
        importlib.import_module(module)
        gc.freeze()
    finally:
        gc.enable()


def console_of_stdout() -> TextConsole:
    """The console for results. It is 140 columns wide if stdout is a file or a pipe."""
    return TextConsole() if sys.stdout.isatty() else TextConsole(width=140)
