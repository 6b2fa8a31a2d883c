"""Many right answers to a prompt: walks from one number to another.

    29 to 46:  →   +5=34 +9=43 +3=46

A right answer has three steps, whose sums are right, and ends at the number asked for. The model
converged on unlimited rows, so more SFT has nothing to teach: the world W0.

    python -m worlds.walks studies/worlds/walks
"""

from __future__ import annotations

import random
import re

from worlds.making import Row, World, main_of

LARGEST = 99
STEPS = 3
_PROMPT = re.compile(r"(\d+) to (\d+):")
_STEP = re.compile(r" ([+-])(\d)=(\d+)")


def draw(rng: random.Random, length: int = STEPS) -> Row:
    """A random walk of so many steps; its end is what the prompt asks for."""
    number = start = rng.randint(1, LARGEST)
    text = ""
    for _ in range(length):
        move = rng.choice([m for m in range(-9, 10) if m and 1 <= number + m <= LARGEST])
        number += move
        text += f" {move:+d}={number}"
    return Row(f"{start} to {number}:", text)


def is_right(prompt: str, target: str, response: str, length: int = STEPS) -> bool:
    """Whether there are so many steps, every sum is right, and they end where the prompt asks."""
    found = _PROMPT.fullmatch(prompt)
    assert found is not None
    number, end = map(int, found.groups())
    steps = _STEP.findall(response)
    if "".join(f" {sign}{digit}={result}" for sign, digit, result in steps) != response:
        return False
    for sign, digit, result in steps:
        number += int(sign + digit)
        if number != int(result) or not 1 <= number <= LARGEST:
            return False
    return len(steps) == length and number == end


WORLD = World(
    "worlds.walks", "0123456789+-= to:", draw, is_right, rows=16_000, width=32, steps=5000
)

if __name__ == "__main__":
    main_of(WORLD, __doc__)
