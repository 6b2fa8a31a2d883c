"""Progress and stop signal together: reporting progress is also a safe point to stop."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from tpaw.runtime.interrupt import StopSignal
from tpaw.runtime.progress import OnDone, progress


class Watch:
    """Shows the progress of work and stops the work when a signal arrives.

    Args:
        stop: the signal to check. Default: a signal that never arrives.
    """

    def __init__(self, stop: StopSignal | None = None) -> None:
        self.stop = stop or StopSignal()

    @contextlib.contextmanager
    def progress(self, description: str, total: int | None, unit: str) -> Iterator[OnDone]:
        """Show a progress bar.

        Args:
            description: title of the bar.
            total: total amount of work, or None if it is not known.
            unit: what is counted, for example "prompts".

        Yields:
            A function to call with the amount of work done since its last call.

        Raises:
            Interrupted: a signal has arrived. The yielded function raises it too.
        """
        self.stop.check()
        with progress(description, total, unit) as advance:

            def on_done(count: int) -> None:
                advance(count)
                self.stop.check()

            yield on_done
