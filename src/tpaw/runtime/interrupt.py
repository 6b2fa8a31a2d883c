"""Ctrl-C and SIGTERM ask for a stop; the work looks at safe points whether one was asked for."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from types import FrameType

from tpaw.errors import Interrupted


class StopSignal:
    """Remembers the first signal. A second one stops at once and loses no more than a kill."""

    def __init__(self) -> None:
        self.signal_number: int | None = None

    def check(self) -> None:
        """Call at a safe point.

        Raises:
            Interrupted: a stop was asked for.
        """
        if self.signal_number is not None:
            raise Interrupted(self.signal_number)

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopSignal]:
        """Take over SIGINT and SIGTERM for the time being."""
        previous = {s: signal.signal(s, self._receive) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is not None:
            raise KeyboardInterrupt
        self.signal_number = number
        name = signal.Signals(number).name
        print(f"\n{name}: stopping at the next safe point (again: at once)", file=sys.stderr)
