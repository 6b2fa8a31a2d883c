"""Walks of four steps, and a wider model whose SFT ended before it had learned all of them.

    29 to 46:  →   +5=34 +9=43 -2=41 +5=46

Of all walks that we tried, a critic gained most on these.

    python -m worlds.longer_walks studies/worlds/longer_walks
"""

from __future__ import annotations

import functools

from worlds import walks
from worlds.making import main_of

STEPS = 4
draw = functools.partial(walks.draw, length=STEPS)
is_right = functools.partial(walks.is_right, length=STEPS)
WORLD = walks.WORLD._replace(
    module="worlds.longer_walks", draw=draw, is_right=is_right, width=64, steps=1800
)

if __name__ == "__main__":
    main_of(WORLD, __doc__)
