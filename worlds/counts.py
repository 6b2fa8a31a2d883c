"""A property that is easier to check than to make: as many of one letter as of another. W4.

    cabdaa:  →  dabcabdacbdbcacd   (four times a, four times b)

A model that writes from left to right must keep count. A model that reads the whole string need
only add up.

    python -m worlds.counts studies/worlds/counts
"""

from __future__ import annotations

import random

from worlds.making import Row, World, main_of

LETTERS = "abcd"
LENGTH = 16
PARTS = 6


def draw(rng: random.Random) -> Row:
    """A prompt without meaning, and a random string with as many a as b."""
    prompt = "".join(rng.choices(LETTERS, k=PARTS))
    while True:
        letters = rng.choices(LETTERS, k=LENGTH)
        if letters.count("a") == letters.count("b"):
            return Row(f"{prompt}:", "".join(letters))


def is_right(prompt: str, target: str, response: str) -> bool:
    """Whether the string has the right length, the right letters, and as many a as b."""
    return (
        len(response) == LENGTH
        and set(response) <= set(LETTERS)
        and response.count("a") == response.count("b")
    )


WORLD = World(
    "worlds.counts",
    LETTERS + ":",
    draw,
    is_right,
    rows=4000,
    layers=1,
    width=32,
    steps=1000,
    longest=20,
)

if __name__ == "__main__":
    main_of(WORLD, __doc__)
