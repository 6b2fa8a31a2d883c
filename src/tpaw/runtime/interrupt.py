"""Stop on Ctrl-C and SIGTERM: the signal is stored, and the work stops at its next safe point."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from types import FrameType

from tpaw.errors import Interrupted


class StopSignal:
    """Stores the first signal. A second signal raises KeyboardInterrupt at once.

    An immediate stop loses no more work than a killed process does.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None

    def check(self) -> None:
        """Stop if a signal has arrived. Call it at every safe point.

        Raises:
            Interrupted: a signal has arrived.
        """
        if self.signal_number is not None:
            raise Interrupted(self.signal_number)

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopSignal]:
        """Handle SIGINT and SIGTERM inside the context, and restore the old handlers after it."""
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
        print(
            f"\n{name}: stopping at the next safe point; send it again to stop at once",
            file=sys.stderr,
        )
