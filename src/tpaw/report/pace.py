"""Work that a run does not need may take only a small share of its time."""

from __future__ import annotations

import time

SHARE_OF_TIME = 0.03
"""Of a run's time, at most, for each piece of such work."""


def not_before(began: float) -> float:
    """When work that ends now may begin again, so that it takes at most `SHARE_OF_TIME`.

    Args:
        began: when it began, by `time.monotonic`.

    Returns:
        A time of the same clock.
    """
    ended = time.monotonic()
    return ended + (ended - began) / SHARE_OF_TIME
