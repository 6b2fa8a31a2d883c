"""Unequal rows: two kinds of prompt, of which one is rare in the rows. The world W6.

    back kxqa:  →  =aqxk      (nineteen in twenty)
    sort kxqa:  →  =akqx      (one in twenty)

SFT stopped when it had learned the frequent kind and half of the rare one. Held-out rows have as
many of one kind as of the other.

    python -m worlds.unequal studies/worlds/unequal
"""

from __future__ import annotations

import random

from worlds.fork import LETTERS
from worlds.making import Row, World, main_of

RARE = 0.05
STOP_AT = 700


def row_of(kind: str, rng: random.Random) -> Row:
    """A prompt of a kind with its answer."""
    letters = "".join(rng.choices(LETTERS, k=rng.randint(3, 5)))
    answer = letters[::-1] if kind == "back" else "".join(sorted(letters))
    return Row(f"{kind} {letters}:", f"={answer}")


def draw(rng: random.Random) -> Row:
    """A row of the population: seldom one of the rare kind."""
    return row_of("sort" if rng.random() < RARE else "back", rng)


def draw_heldout(rng: random.Random) -> Row:
    """A row of either kind."""
    return row_of(rng.choice(("back", "sort")), rng)


def is_right(prompt: str, target: str, response: str) -> bool:
    """Whether the response is the one answer."""
    return response == target


WORLD = World(
    "worlds.unequal",
    LETTERS + ":= ",
    draw,
    is_right,
    draw_heldout=draw_heldout,
    steps=6000,
    stop_at=STOP_AT,
    longest=12,
)

if __name__ == "__main__":
    main_of(WORLD, __doc__)
