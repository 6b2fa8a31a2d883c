"""Endings: long counts, by a model whose SFT was stopped early. The world W2.

    17 to 41:  →   17 18 19 … 41

Many greedy responses skip, loop or never end.

    python -m worlds.endings studies/worlds/endings
"""

from __future__ import annotations

import random

from worlds.making import Row, World, main_of

LARGEST = 99
STOP_AT = 350


def draw(rng: random.Random) -> Row:
    """A count over five to thirty numbers."""
    length = rng.randint(5, 30)
    start = rng.randint(1, LARGEST - length)
    numbers = range(start, start + length + 1)
    return Row(f"{start} to {start + length}:", "".join(f" {number}" for number in numbers))


def is_right(prompt: str, target: str, response: str) -> bool:
    """Whether the count is complete and ends where it should."""
    return response == target


WORLD = World(
    "worlds.endings", "0123456789 to:", draw, is_right, steps=6000, stop_at=STOP_AT, longest=110
)

if __name__ == "__main__":
    main_of(WORLD, __doc__)
