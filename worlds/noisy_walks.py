"""The walks, but one in three targets has a wrong sum: targets are not better than responses.

    python -m worlds.noisy_walks studies/worlds/noisy_walks

The model has converged on the same noise: the world N1, where methods that imitate targets must
lose against one that knows better.
"""

from __future__ import annotations

import random

from worlds import walks
from worlds.making import Row, World, main_of

NOISE = 1 / 3


def draw(rng: random.Random) -> Row:
    """A walk; one in three has a wrong result somewhere."""
    row = walks.draw(rng)
    if rng.random() >= NOISE:
        return row
    steps = row.target.split(" ")[1:]
    place = rng.randrange(len(steps))
    move, _, result = steps[place].partition("=")
    wrong = rng.choice([n for n in range(1, walks.LARGEST + 1) if n != int(result)])
    steps[place] = f"{move}={wrong}"
    return Row(row.prompt, "".join(f" {step}" for step in steps))


is_right = walks.is_right
WORLD = World("worlds.noisy_walks", walks.WORLD.characters, draw, is_right, rows=4000)

if __name__ == "__main__":
    main_of(WORLD, __doc__)
