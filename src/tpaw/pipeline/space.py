"""Disk space that each stage needs, checked before the stage begins.

The numbers are upper bounds from counts of tokens and parameters. Compression is not counted.
"""

from __future__ import annotations

from tpaw.config.schema import RunConfig
from tpaw.storage.failures import require_space
from tpaw.storage.run_directory import Iteration, RunDirectory

BYTES_PER_TOKEN = 4 + 4  # an id as int32, and about four characters of text
BYTES_PER_SCORE = 64  # hash, log-prob, token count, and their part of the file's header
# Bytes per parameter. Optimizers that are not listed have two moments, as Adam has.
BYTES_OF_WEIGHTS = 4
BYTES_OF_OPTIMIZER = {"rmsprop": 4, "adagrad": 4, "sgd": 4}
BYTES_OF_ADAM = 8


def space_for_responses(run: RunDirectory, config: RunConfig, count: int) -> None:
    """Check the space for so many responses.

    Raises:
        StorageError: the disk is too full.
    """
    tokens = max(config.generate.max_new_tokens, config.evaluate.max_new_tokens or 0)
    require_space(run.root, count * tokens * BYTES_PER_TOKEN, f"generating {count:,} responses")


def space_for_scores(run: RunDirectory, count: int) -> None:
    """Check the space for so many log-probs.

    Raises:
        StorageError: the disk is too full.
    """
    require_space(run.root, count * BYTES_PER_SCORE, f"scoring {count:,} sequences")


def space_for_training(
    iteration: Iteration, config: RunConfig, parameters: int, steps: int
) -> None:
    """Check the space for the saved steps and the checkpoint of an iteration.

    A saved step holds the weights in fp32 and the optimizer's state. It is removed when the next
    one is published, so two of them exist for a moment. At the end the last one and the checkpoint
    exist.

    Args:
        iteration: the iteration. What it has saved already is not needed again.
        config: the configuration of the run.
        parameters: number of parameters of the model.
        steps: optimizer steps of the iteration.

    Raises:
        StorageError: the disk is too full.
    """
    checkpoint = BYTES_OF_WEIGHTS * parameters
    state = BYTES_OF_OPTIMIZER.get(config.train.optimizer, BYTES_OF_ADAM)
    saved_step = checkpoint + state * parameters
    saves = (steps - 1) // config.train.save_every  # the last step is published, not saved
    peak = max(checkpoint + min(saves, 1) * saved_step, min(saves, 2) * saved_step)
    there = sum(p.stat().st_size for p in iteration.training.rglob("*") if p.is_file())
    require_space(iteration.run_root, peak - there, f"training θ_{iteration.number}")
