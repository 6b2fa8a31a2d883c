"""Progress of long work: a bar in a terminal, one line a minute if stderr is a file or a pipe."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol

from rich import filesize
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from tpaw.errors import for_terminal
from tpaw.runtime.console import TextConsole

SECONDS_BETWEEN_LINES = 60.0

# Called with the amount of work done since the last call. It may raise to stop the work.
OnDone = Callable[[int], None]


class Advance(Protocol):
    """Advances a progress bar."""

    def __call__(self, count: int, note: str = "") -> None:
        """Report progress.

        Args:
            count: work done since the last call.
            note: new text to show beside the bar. Empty text keeps the old one.
        """


class Bar(NamedTuple):
    """How far a piece of work is.

    Attributes:
        done: of the total.
        total: amount of work.
        unit: what is counted; see `progress`.
    """

    done: float
    total: float
    unit: str


# What stands below the newest bar. It is drawn again and again, with what the bar says then.
View = Callable[[Bar | None], RenderableType]


def ignore(count: int) -> None:
    """An `OnDone` that does nothing."""


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        unit = task.fields.get("unit", "")
        shown = f"{_rate(speed, unit)}/s" if speed else ""
        return Text(shown, style="progress.data.speed")


class _DoneColumn(MofNCompleteColumn):
    def render(self, task: Task) -> Text:
        if task.fields.get("unit") != "bytes" or task.total is None:
            return super().render(task)
        done, total = (_amount(int(count), "bytes") for count in (task.completed, task.total))
        return Text(f"{done}{self.separator}{total}", style="progress.download")


def _amount(count: int, unit: str) -> str:
    """A count with its unit, for people."""
    return filesize.decimal(count) if unit == "bytes" else f"{count} {unit}"


def _rate(speed: float, unit: str) -> str:
    if unit == "bytes":
        return _amount(round(speed), unit)
    return f"{speed:,.0f} {unit}" if speed >= 100 else f"{speed:.3g} {unit}"


@contextlib.contextmanager
def progress(
    description: str, total: int | None, unit: str, console: TextConsole | None = None
) -> Iterator[Advance]:
    """Show the progress of a piece of work.

    Args:
        description: title of the bar, for example "[1/4] generate with θ_0".
        total: total amount of work, or None if it is not known.
        unit: what is counted, for example "prompts".
        console: where to print. Default: stderr.

    Yields:
        A function that advances the bar.
    """
    if console is None and _screen is not None:
        with _screen.stage(description, total, unit) as advance:
            yield advance
        return
    console = console or TextConsole(stderr=True)
    started = time.monotonic()
    if console.is_terminal:
        with Progress(*_columns(), console=console) as bars:
            task = bars.add_task(for_terminal(description), total=total, unit=unit, note="")
            yield _advancing(bars, task)
        return

    done, last_line = 0, started

    def advance_quietly(count: int, note: str = "") -> None:
        nonlocal done, last_line
        done += count
        now = time.monotonic()
        if now - last_line > SECONDS_BETWEEN_LINES:
            last_line = now
            left = (total - done) * (now - started) / done if total and done else None
            ahead = f" of {_amount(total, unit) if unit == 'bytes' else total}" if total else ""
            ahead += "" if left is None else f", {left:.0f} s left"
            console.print_text(f"{description}: {_amount(done, unit)}{ahead} {note}")

    yield advance_quietly
    seconds = time.monotonic() - started
    console.print_text(f"{description}: {_amount(done, unit)} in {seconds:.1f} s")


@contextlib.contextmanager
def screen(
    describe: Callable[[], View | None], console: TextConsole | None = None
) -> Iterator[None]:
    """Keep the running bar of this process, and a view below it, at the bottom of the terminal.

    Lines that are printed meanwhile go above. Without a terminal nothing changes.

    Args:
        describe: gives the view. It is asked when a bar appears. If it fails, the old view stays.
        console: where to print. Default: stderr.
    """
    global _screen
    console = console or TextConsole(stderr=True)
    if not console.is_terminal:
        yield
        return
    _screen = _Screen(describe, console)
    try:
        with _screen.live:
            yield
    finally:
        _screen = None


class _Screen:
    def __init__(self, describe: Callable[[], View | None], console: TextConsole) -> None:
        self.describe, self.console = describe, console
        self.bars = Progress(*_columns(), console=console)
        self.view: View | None = None
        self.newest: Task | None = None
        # A view that is higher than the terminal is cut, so that it never scrolls.
        self.live = Live(
            get_renderable=self._render,
            console=console,
            transient=True,
            vertical_overflow="ellipsis",
        )

    def _render(self) -> RenderableType:
        shown: list[RenderableType] = [self.bars]
        if self.view is not None:
            with contextlib.suppress(Exception):  # a view is no reason to lose a run
                shown.append(self.view(self._bar()))
        return Group(*shown)

    def _bar(self) -> Bar | None:
        """The newest bar. When it has ended, its stage is still to be published."""
        task = self.newest
        if task is None or not task.total:
            return None
        return Bar(task.completed, task.total, task.fields["unit"])

    @contextlib.contextmanager
    def stage(self, description: str, total: int | None, unit: str) -> Iterator[Advance]:
        """A bar while the work goes on, and a line of what was done above the view."""
        view = self.view
        with contextlib.suppress(Exception):  # a view is no reason to lose a run
            view = self.describe()
        task = self.bars.add_task(for_terminal(description), total=total, unit=unit, note="")
        [found] = [bar for bar in self.bars.tasks if bar.id == task]
        self.view, self.newest = view, found
        try:
            yield _advancing(self.bars, task)
            seconds = found.elapsed or 0.0
            done = _amount(round(found.completed), unit)
            text = f"{description}: {done} in {seconds:.1f} s"
            self.console.print_text(text)
        finally:
            self.bars.remove_task(task)


_screen: _Screen | None = None


def _columns() -> Iterable[ProgressColumn]:
    return (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        _DoneColumn(),
        _RateColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )


def _advancing(bars: Progress, task: TaskID) -> Advance:
    def advance(count: int, note: str = "") -> None:
        bars.advance(task, count)
        if note:
            bars.update(task, note=for_terminal(note))

    return advance


def _print_note(text: str) -> None:
    if _screen is None:
        TextConsole(stderr=True).print_text(text)
    else:  # another console would write into the view
        _screen.console.print_text(text)


_show_note: Callable[[str], None] = _print_note


def notes_go_to(show: Callable[[str], None]) -> None:
    """Hand the notes of this process to somebody else, for a process that has no terminal."""
    global _show_note
    _show_note = show


def note(text: str) -> None:
    """Print one line to stderr."""
    _show_note(text)


@functools.cache
def note_once(text: str) -> None:
    """Print one line to stderr, unless this process has printed the same line before."""
    note(text)
