"""Old skills: rows of one kind, a model that knows another kind too. The world W5.

    back kxqa:  →  =aqxk      (half of what SFT saw, none of the rows: the old skill)
    sort kxqa:  →  =akqx      (the other half, and all rows: the new skill)

SFT stopped when it had learned most of both. Held-out rows have both kinds: what is the new skill
worth, and what is forgotten of the old one?

    python -m worlds.old_skills studies/worlds/old_skills
"""

from __future__ import annotations

import random

from worlds.making import Row, World, main_of
from worlds.unequal import WORLD as UNEQUAL
from worlds.unequal import draw_heldout, is_right, row_of

STOP_AT = 700


def draw_row(rng: random.Random) -> Row:
    """A row of the new skill."""
    return row_of("sort", rng)


WORLD = World(
    "worlds.old_skills",
    UNEQUAL.characters,
    draw_heldout,
    is_right,
    draw_row=draw_row,
    steps=6000,
    stop_at=STOP_AT,
    longest=UNEQUAL.longest,
)

if __name__ == "__main__":
    main_of(WORLD, __doc__)
