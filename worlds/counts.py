"""A property that is easier to check than to make: strings with a given number of a letter. W4.

    cab a5d3:  →  bcadaacbdacadb   (14 letters, five of them an a, three a d)

A model that writes from left to right must keep count. A model that reads the whole string need
only add up.

    python -m worlds.counts studies/worlds/counts
"""

from __future__ import annotations

import random

from worlds.making import Row, World, main_of

LETTERS = "abcd"
LENGTH = 14
PARTS = 3


def draw(rng: random.Random) -> Row:
    """A prompt that asks for the numbers of two letters, and a string that has them."""
    first, second = rng.sample(LETTERS, 2)
    n, m = rng.randint(2, 6), rng.randint(2, 6)
    rest = [letter for letter in LETTERS if letter not in (first, second)]
    letters = [first] * n + [second] * m + rng.choices(rest, k=LENGTH - n - m)
    rng.shuffle(letters)
    salt = "".join(rng.choices(LETTERS, k=PARTS))  # so that there are many prompts
    return Row(f"{salt} {first}{n}{second}{m}:", "".join(letters))


def is_right(prompt: str, target: str, response: str) -> bool:
    """Whether the string has the right length and both numbers of letters."""
    wanted = prompt.removesuffix(":")[PARTS + 1 :]
    counts = {wanted[0]: int(wanted[1]), wanted[2]: int(wanted[3])}
    return (
        len(response) == LENGTH
        and set(response) <= set(LETTERS)
        and all(response.count(letter) == count for letter, count in counts.items())
    )


WORLD = World(
    "worlds.counts", LETTERS + "0123456789: ", draw, is_right, longest=20, width=32, steps=3000
)

if __name__ == "__main__":
    main_of(WORLD, __doc__)
