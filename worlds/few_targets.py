"""Few targets: what self-play adds after SFT on 200 rows. The world W3, for every method.

The model has seen noisy walks (`worlds.noisy_walks`): one target in three has a wrong sum. Then SFT
on 200 right ones, as in `worlds.few_answers`, which asks what prompts without targets are good for.

    python -m worlds.noisy_walks studies/worlds/noisy_walks
    python -m worlds.few_targets studies/worlds/noisy_walks studies/worlds/few_targets
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from worlds import walks
from worlds.few_answers import RATE_OF_SFT, STEPS_OF_SFT, TARGETS, Policy, check_noisy_walks
from worlds.making import HELDOUT_ROWS, Made, Row, World, distinct, write

is_right = walks.is_right
WORLD = World("worlds.few_targets", walks.WORLD.characters, walks.draw, is_right, rows=TARGETS)


def make(noisy: Path, folder: Path) -> None:
    """Fine-tune the model of the noisy walks on the targets; write model, rows and recipe.

    Prompts of held-out and tuning rows are not among those of self-play.

    Args:
        noisy: folder of the world `noisy_walks`.
        folder: where to write.
    """
    torch.set_num_threads(1)
    used: set[str] = set()
    rows: dict[str, list[Row]] = {
        name: distinct(walks.draw, count, seed, used)
        for name, count, seed in (
            ("heldout", HELDOUT_ROWS, 1),
            ("tuning", HELDOUT_ROWS, 2),
            ("train", WORLD.rows, 3),
        )
    }
    policy = Policy.of(noisy).trained(rows["train"], STEPS_OF_SFT, RATE_OF_SFT, seed=0)
    write(WORLD, folder, Made(policy.model, policy.tokenizer, rows))


def main() -> None:
    """The command line: the folder of the noisy walks, and the folder to write to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("noisy", type=Path, help="folder of the world noisy_walks")
    parser.add_argument("folder", type=Path, help="where to write")
    arguments = parser.parse_args()
    check_noisy_walks(parser, "noisy", arguments.noisy)
    make(arguments.noisy, arguments.folder)


if __name__ == "__main__":
    main()
