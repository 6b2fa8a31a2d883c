"""What long work is given: a place to report progress, which also stops it at a safe point."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from tpaw.runtime.interrupt import StopSignal
from tpaw.runtime.progress import OnDone, progress


class Watch:
    """Shows progress and heeds a stop.

    Args:
        stop: where a caller that handles signals asks for a stop.
    """

    def __init__(self, stop: StopSignal | None = None) -> None:
        self.stop = stop or StopSignal()

    @contextlib.contextmanager
    def progress(self, description: str, total: int | None, unit: str) -> Iterator[OnDone]:
        """Show a bar; the work calls `on_done` with how much more is done.

        Raises:
            Interrupted: a stop was asked for. `on_done` raises it too.
        """
        self.stop.check()
        with progress(description, total, unit) as advance:

            def on_done(count: int) -> None:
                advance(count)
                self.stop.check()

            yield on_done
