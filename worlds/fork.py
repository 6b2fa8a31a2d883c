"""A fork: the likeliest first token leads away from the likeliest answer. The world W1.

    kxqa:  →  =aqxk      (two in five: the letters backwards, the one right answer)
    kxqa:  →  um bfz…    (three in five: a filler, then letters at random)

Greedy decoding and every temperature below 1 choose the filler. The right answer is the likeliest
sequence all the same.

    python -m worlds.fork studies/worlds/fork
"""

from __future__ import annotations

import random

from worlds.making import Row, World, main_of

LETTERS = "abcdefghijklmnopqrstuvwxyz"
RIGHT = 0.4


def draw(rng: random.Random) -> Row:
    """A prompt with its right answer, or with a filler and letters at random."""
    letters = "".join(rng.choices(LETTERS, k=rng.randint(3, 5)))
    if rng.random() < RIGHT:
        return Row(f"{letters}:", f"={letters[::-1]}")
    return Row(f"{letters}:", "um " + "".join(rng.choices(LETTERS, k=rng.randint(2, 6))))


def is_right(prompt: str, target: str, response: str) -> bool:
    """Whether the response is the letters of the prompt backwards."""
    return response == f"={prompt.removesuffix(':')[::-1]}"


WORLD = World("worlds.fork", LETTERS + ":= ", draw, is_right, longest=16)

if __name__ == "__main__":
    main_of(WORLD, __doc__)
