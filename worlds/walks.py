"""Many right answers to a prompt: walks from one number to another.

    29 to 46:  →   +5=34 +9=43 +3=46

A right answer has two to four steps, whose sums are right, and ends at the number asked for. The
model converged on unlimited rows, so more SFT has nothing to teach: the world W0.

    python -m worlds.walks studies/worlds/walks
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from worlds.making import (
    Row,
    character_tokenizer,
    distinct,
    fine_tune,
    say_accuracy,
    small_model,
    write_world,
)

LARGEST = 99
STEPS_OF_SFT = 8000
_PROMPT = re.compile(r"(\d+) to (\d+):")
_STEP = re.compile(r" ([+-])(\d)=(\d+)")


def draw(rng: random.Random) -> Row:
    """A random walk; its end is what the prompt asks for."""
    number = start = rng.randint(1, LARGEST)
    text = ""
    for _ in range(rng.randint(2, 4)):
        moves = [m for m in range(-9, 10) if m and 1 <= number + m <= LARGEST]
        move = rng.choice(moves)
        number += move
        text += f" {move:+d}={number}"
    return Row(f"{start} to {number}:", text)


def is_right(prompt: str, target: str, response: str) -> bool:
    """Whether every sum is right and the last number is the one asked for."""
    start, end = map(int, _PROMPT.fullmatch(prompt).groups())
    steps = _STEP.findall(response)
    if "".join(f" {sign}{digit}={result}" for sign, digit, result in steps) != response:
        return False
    number = start
    for sign, digit, result in steps:
        number += int(sign + digit)
        if number != int(result) or not 1 <= number <= LARGEST:
            return False
    return 2 <= len(steps) <= 4 and number == end


def rows_without_end(seed: int) -> Iterator[Row]:
    """Rows that the model converges on."""
    rng = random.Random(seed)
    while True:
        yield draw(rng)


def main() -> None:
    """Make the world."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=STEPS_OF_SFT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = character_tokenizer("0123456789+-= to:")
    model = small_model(tokenizer, seed=0)
    fine_tune(model, tokenizer, rows_without_end(0), steps=arguments.steps)
    model.eval()
    used: set[str] = set()
    rows = {
        "heldout": distinct(draw, 600, 1, used),
        "tuning": distinct(draw, 600, 2, used),
    }
    rng = random.Random(3)
    train: list[Row] = []
    while len(train) < arguments.rows:  # a prompt may come more than once
        row = draw(rng)
        if row.prompt not in used:
            train.append(row)
    rows["train"] = train
    say_accuracy(model, tokenizer, rows["tuning"], is_right)
    write_world(arguments.folder, model, tokenizer, rows, {})


if __name__ == "__main__":
    main()
