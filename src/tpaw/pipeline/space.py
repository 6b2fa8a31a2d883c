"""What a run occupies on disk, and what each stage needs, checked before anything is written.

The numbers are upper bounds from counts of tokens and parameters. Compression is not counted.
Results of benchmark suites and the files of experiment trackers are not counted either, nor is a
critic whose `critic.path` is on the Hub.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tpaw.config.plan import IterationPlan, kept_checkpoints, players_of
from tpaw.config.schema import RunConfig
from tpaw.models.size import ModelSize
from tpaw.storage.artifacts import is_published
from tpaw.storage.failures import nearest_folder, readable_size, require_space
from tpaw.storage.run_directory import Iteration, RunDirectory

BYTES_PER_TOKEN = 4 + 4  # an id as int32, and about four characters of text
BYTES_PER_RECORD = 256  # ids, numbers and names beside the tokens of a response or an example
BYTES_PER_SCORE = 64  # hash, log-prob and token count
BYTES_PER_SHARD = 4096  # header of the file, and its part of the manifest
BYTES_PER_LOG_LINE = 4096
# Beside the weights: configuration, header and manifest; tokenizers have up to 140 bytes per token.
BYTES_OF_OTHER_FILES = 1 << 17
BYTES_PER_VOCABULARY_TOKEN = 160
# Bytes per parameter. Optimizers that are not listed have two moments, as Adam has.
BYTES_OF_WEIGHTS = 4
BYTES_OF_OPTIMIZER = {"rmsprop": 4, "adagrad": 4, "sgd": 4}
BYTES_OF_ADAM = 8
BYTES_OF_SPLIT_STEP = 2 + 2 + 2  # upper and lower halves, and the squared gradient in bf16
# A step of a critic: its weights, two moments and the best weights. Two steps exist for a moment.
WEIGHTS_PER_CRITIC_STEP = 4
# 4 bits; 1 byte of scale for 64 weights; 4 bytes of scale for 256 of those bytes.
BYTES_OF_NF4 = 1 / 2 + (1 + 4 / 256) / 64


class IterationSpace(NamedTuple):
    """What one iteration occupies on disk at most, in bytes.

    Attributes:
        iteration: i, the iteration that trains θ_i.
        responses: of D_{i-1}.
        logprobs: log-probs that are computed in this iteration.
        evaluation: held-out results of θ_i.
        kept: indices of the run's checkpoints that have weights while θ_i trains.
        peak: largest size of the run directory during this iteration.
        after: size of the run directory at the end of this iteration.
    """

    iteration: int
    responses: int
    logprobs: int
    evaluation: int
    kept: tuple[int, ...]
    peak: int
    after: int


def bytes_of_responses(config: RunConfig, count: int, copies: int = 1) -> int:
    """Bytes of so many responses.

    Args:
        config: the configuration of the run.
        count: number of prompts.
        copies: responses to each prompt.
    """
    tokens = max(config.generate.max_new_tokens, config.evaluate.max_new_tokens or 0)
    shards = math.ceil(count / config.generate.shard_size)
    record = tokens * BYTES_PER_TOKEN + BYTES_PER_RECORD
    return copies * (count * record + shards * BYTES_PER_SHARD)


def bytes_of_scores(config: RunConfig, count: int) -> int:
    """Bytes of so many log-probs, of all players of an iteration."""
    # Each player's last shard may be smaller.
    players = len(players_of(config, range(config.iterations))[1])
    shards = math.ceil(count / config.score.shard_size) + players
    return count * BYTES_PER_SCORE + shards * BYTES_PER_SHARD


def bytes_of_evaluation(config: RunConfig, heldout: int) -> int:
    """Bytes of the held-out results of θ_0, which holds its responses too; others need less."""
    copies = 3 + len(config.evaluate.temperatures) * config.evaluate.samples
    return bytes_of_responses(config, heldout, copies=copies) if heldout else 0


def bytes_of_critic(config: RunConfig, vocabulary: int) -> int:
    """Bytes of the weights of a critic in fp32; 0 for another method.

    Args:
        config: the configuration of the run.
        vocabulary: tokens of the run's vocabulary.
    """
    critic = config.critic
    if config.method != "critic":
        return 0
    if critic.path is not None:  # 16-bit weights become twice as large; an adapter is smaller
        return 2 * bytes_of_files(Path(critic.path), "*.safetensors")
    layer = 10 * critic.width + 4  # attention has 4 width², its MLP 6 width²; and two norms
    parameters = critic.width * (vocabulary + critic.layers * layer + critic.width + 8)
    return BYTES_OF_WEIGHTS * parameters


def bytes_of_checkpoint(size: ModelSize) -> int:
    """Bytes of a checkpoint: the weights in fp32, the tokenizer and other small files."""
    return BYTES_OF_WEIGHTS * size.parameters + _bytes_beside_weights(size)


def bytes_of_saved_step(config: RunConfig, size: ModelSize, steps: int) -> int:
    """Bytes of a saved step: the weights, the optimizer's state and the log so far."""
    if config.train.weights == "split":
        per_parameter = BYTES_OF_SPLIT_STEP
    else:
        state = BYTES_OF_OPTIMIZER.get(config.train.optimizer, BYTES_OF_ADAM)
        per_parameter = BYTES_OF_WEIGHTS + state
    log = bytes_of_log(config, steps)
    return per_parameter * size.parameters + _bytes_beside_weights(size) + log


def bytes_of_log(config: RunConfig, steps: int) -> int:
    """Bytes of training.jsonl of an iteration with so many steps."""
    # The first step and each saved step have a line too.
    lines = 1 + steps // config.train.log_every + steps // config.train.save_every
    return lines * BYTES_PER_LOG_LINE


def bytes_of_training(config: RunConfig, size: ModelSize, steps: int) -> int:
    """Bytes of the saved steps and the checkpoint of an iteration, at their peak.

    A saved step is removed when the next one is published, so two of them exist for a moment. At
    the end the last one and the checkpoint exist. A stop saves a step at any time.
    """
    checkpoint, saved_step = bytes_of_checkpoint(size), bytes_of_saved_step(config, size, steps)
    saves = steps - 1  # the last step is published, not saved
    return max(checkpoint + min(saves, 1) * saved_step, min(saves, 2) * saved_step)


def bytes_of_inputs(tokens: int, rows: int) -> int:
    """Bytes of the tokenised examples. The tokenizer is among the other files.

    Args:
        tokens: of all examples, held-out ones included; see `Inputs.tokens`.
        rows: number of all examples.
    """
    return tokens * BYTES_PER_TOKEN + rows * BYTES_PER_RECORD + 2 * BYTES_PER_SHARD


def bytes_of_temporary_files(config: RunConfig, plans: Sequence[IterationPlan], inputs: int) -> int:
    """Bytes of the temporary files of a process that trains; see `data/columns.py`.

    These are the inputs and the responses of all opponents of an iteration, and those of θ_0 where
    the objective reads them.

    Args:
        config: the configuration of the run.
        plans: the iterations that are not finished.
        inputs: bytes of the inputs; see `bytes_of_inputs`.
    """
    if not plans:
        return 0
    if config.trains_by_sft:
        return inputs + inputs  # TRL takes the ids again, with labels
    initial = config.objective.needs.initial_responses
    responses = [
        bytes_of_responses(config, (len(plan.opponents) + initial) * plan.to_generate)
        for plan in plans
        if plan.opponents
    ]
    return inputs + max(responses, default=0)


def memory_of_training(config: RunConfig, size: ModelSize) -> int:
    """Bytes of memory for weights, gradients and optimizer state while a model trains.

    Activations and logits come on top. See the table in `training/split_weights.py`. The base of
    adapters is in the precision of the run, except for what is quantised to 4 bits.

    Returns:
        The bytes of each process; with `train.parallel: fsdp2`, of all processes together.
    """
    parameters = size.parameters
    if config.train.weights == "split":
        return 8 * parameters
    is_bf16, is_sharded = config.precision == "bf16", _trains_sharded(config)
    base = (size.frozen - size.in_4_bits) * (2 if is_bf16 else 4) + size.in_4_bits * BYTES_OF_NF4
    # A copy of autocast. FSDP2 has that of one layer at a time.
    copy = 2 if is_bf16 and not is_sharded else 0
    # DDP copies gradients into buffers to send them.
    sent = 4 if _trains_in_a_group(config) and not is_sharded else 0
    state = BYTES_OF_OPTIMIZER.get(config.train.optimizer, BYTES_OF_ADAM)
    return math.ceil(base) + (BYTES_OF_WEIGHTS + copy + 4 + sent + state) * parameters


class LayerShape(NamedTuple):
    """What decides the memory of activations and of the key-value cache.

    Attributes:
        layers: number of layers.
        width: of the residual stream.
        inner: width of the MLP.
        cached: numbers that a layer caches for each token: keys and values of all their heads.
        vocabulary: number of tokens.
    """

    layers: int
    width: int
    inner: int
    cached: int
    vocabulary: int


def layer_shape(text_config: Any) -> LayerShape | None:
    """The shape in a configuration of transformers; None if it has no usual names for it."""
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")
    found = [getattr(text_config, name, None) for name in (*names, "num_attention_heads")]
    numbers = [n for n in found if isinstance(n, int) and n > 0]
    if getattr(text_config, "num_experts_per_tok", None) or len(numbers) < len(found):
        return None
    layers, width, inner, vocabulary, heads = numbers
    shared = getattr(text_config, "num_key_value_heads", None) or heads
    size = getattr(text_config, "head_dim", None) or width // heads
    return LayerShape(layers, width, inner, 2 * shared * size, vocabulary)


def memory_of_tokens(
    shape: LayerShape, tokens: int, bytes_of_number: int, *, is_recomputed: bool
) -> int:
    """Bytes of activations while a model trains on so many tokens at a time, about.

    A layer keeps about 12 numbers for each of its inputs and 4.5 for each inner one; with
    `train.activation_checkpointing` only its input and the gradient of that, and one layer at a
    time keeps the rest. The factors are fitted to two measurements (docs/performance.md, on a
    GPU). The update of the largest matrix takes its size once more in fp32.
    """
    layer = 12 * shape.width + 4.5 * shape.inner
    kept = 2 * shape.width * shape.layers + layer if is_recomputed else layer * shape.layers
    return math.ceil(tokens * bytes_of_number * kept) + 4 * shape.vocabulary * shape.width


def _trains_in_a_group(config: RunConfig) -> bool:
    """Whether several processes may train together. How many is known once the cluster is."""
    launch = config.launch
    return launch.engine == "ray" and (launch.workers, launch.gpus_per_worker) != (1, 1)


def _trains_sharded(config: RunConfig) -> bool:
    return _trains_in_a_group(config) and config.train.parallel == "fsdp2"


def _described_memory(config: RunConfig, size: ModelSize) -> str:
    held = readable_size(memory_of_training(config, size))
    if _trains_sharded(config):
        who = f"all processes together hold {held}"
    elif _trains_in_a_group(config):
        who = f"each process holds {held}"
    else:
        who = f"training holds {held}"
    return (
        f"Memory: {who} of weights, gradients and optimizer state. Activations and logits come on "
        "top."
    )


def plan_space(
    config: RunConfig,
    plans: Sequence[IterationPlan],
    size: ModelSize,
    heldout: int,
    inputs: int,
    run: RunDirectory | None = None,
) -> list[IterationSpace]:
    """Plan the disk space of every iteration.

    Args:
        config: the configuration of the run.
        plans: who plays in each iteration; see `plan_run`.
        size: the size of the model.
        heldout: number of held-out examples.
        inputs: bytes of the inputs; see `bytes_of_inputs`.
        run: a run directory. What it has published counts with its size on disk, and needs no
            space for training any more.

    Returns:
        One entry for each iteration, in order.
    """

    def bytes_of(folder: Path, bound: int, pattern: str = "**/*") -> int:
        return bytes_of_files(folder, pattern) if run and is_published(folder) else bound

    paths = run or RunDirectory("")
    folders = {plan.iteration: paths.checkpoint(plan.iteration) for plan in plans}
    weights = {
        i: bytes_of(folder, BYTES_OF_WEIGHTS * size.parameters, "*.safetensors")
        for i, folder in folders.items()
    }
    evaluation = bytes_of_evaluation(config, heldout)
    total = bytes_of(paths.inputs, inputs + _bytes_beside_weights(size))
    total += bytes_of(paths.evaluation(0), evaluation)
    critic = bytes_of_critic(config, size.vocabulary)
    spaces, left = [], 0
    for plan in plans:
        t, i = plan.iteration - 1, plan.iteration
        responses = plan.to_generate and bytes_of_responses(config, plan.to_generate)
        responses = bytes_of(paths.responses(i), responses)
        logprobs = plan.to_score and bytes_of_scores(config, plan.to_score)
        log = bytes_of_log(config, plan.optimizer_steps)
        training = bytes_of_training(config, size, plan.optimizer_steps)
        if run and is_published(run.checkpoint(i)):
            logprobs = bytes_of_files(run.root / "logprobs", f"*/iteration-{i}-*")
            log, training = bytes_of_files(run.training_log(i).parent, "training.jsonl"), 0
        heldout_results = bytes_of(paths.evaluation(i), evaluation)
        fitting = 0 if run and is_published(run.iteration(t).critic) else critic
        judged = 8 * config.critic.team * plan.to_generate if critic else 0
        total += responses + logprobs + log + critic + judged
        kept = sorted(kept_checkpoints(config, t, is_trained=False) & weights.keys())
        while_training = total + sum(weights[j] for j in kept)
        # left: by the iteration before
        fitted = total + left + 2 * WEIGHTS_PER_CRITIC_STEP * fitting
        peaks = [fitted, while_training + training]
        # The other files of a checkpoint stay when its weights are removed.
        beside = bytes_of_checkpoint(size) - BYTES_OF_WEIGHTS * size.parameters
        total += bytes_of(folders[i], weights[i] + beside) - weights[i] + heldout_results
        peaks.append(total + sum(weights[j] for j in (*kept, i)))
        left = sum(
            weights[j] for j in kept_checkpoints(config, t, is_trained=True) & weights.keys()
        )
        spaces.append(
            IterationSpace(
                i, responses, logprobs, heldout_results, tuple(kept), max(peaks), total + left
            )
        )
    return spaces


def described_space(
    config: RunConfig,
    plans: Sequence[IterationPlan],
    size: ModelSize,
    heldout: int,
    inputs: int,
) -> list[str]:
    """Sentences for display: the disk space of a run, also with other values of `keep`, and memory.

    Args:
        config: the configuration of the run.
        plans: see `plan_space`, as are `size`, `heldout` and `inputs`.
    """

    def largest(keep: str) -> tuple[int, int, int]:
        changed = config.model_copy(update={"keep": keep})
        spaces = plan_space(changed, plans, size, heldout, inputs)
        peak, iteration = max((s.peak, -s.iteration) for s in spaces)
        return peak, -iteration, spaces[-1].after

    peak, iteration, after = largest(config.keep)
    saved_step = bytes_of_saved_step(config, size, max(p.optimizer_steps for p in plans))
    others = [
        f"keep: {keep} up to {readable_size(largest(keep)[0])}, "
        f"{readable_size(largest(keep)[2])} at the end"
        for keep in ("all", "team", "last")
        if keep != config.keep
    ]
    return [
        f"Disk: up to {readable_size(peak)}, while θ_{iteration} trains, and "
        f"{readable_size(after)} at the end (keep: {config.keep}). A checkpoint has "
        f"{readable_size(bytes_of_checkpoint(size))}, for {size.parameters:,} parameters in fp32; "
        f"a saved step has {readable_size(saved_step)}.",
        f"With {'; with '.join(others)}. Results of suites are not counted.",
        f"Temporary files{' of each process' if _trains_in_a_group(config) else ''}: up to "
        f"{readable_size(bytes_of_temporary_files(config, plans, inputs))} of records, in the "
        "folder that the environment variable TMPDIR names.",
        _described_memory(config, size),
    ]


def space_for_run(
    root: Path,
    config: RunConfig,
    plans: Sequence[IterationPlan],
    size: ModelSize,
    heldout: int,
    inputs: int,
) -> None:
    """Check the space for a run, or for what is left of it, with the temporary files of a process.

    A group of processes has temporary files for each of them; only those of one are counted.

    Args:
        root: the run directory. It need not exist.
        config: the configuration of the run.
        plans: see `plan_space`, as are `size`, `heldout` and `inputs`.

    Raises:
        StorageError: the disk is too full.
    """
    run = RunDirectory(root)
    there = _bytes_there(run, len(plans))

    def needed(keep: str) -> int:
        changed = config.model_copy(update={"keep": keep})
        spaces = plan_space(changed, plans, size, heldout, inputs, run)
        peaks = [s.peak for s in spaces if not is_published(run.checkpoint(s.iteration))]
        return max([*peaks, spaces[-1].after]) - there

    left = [plan for plan in plans if not is_published(run.checkpoint(plan.iteration))]
    temporary, folder = bytes_of_temporary_files(config, left, inputs), Path(tempfile.gettempdir())
    on_one_disk = folder.stat().st_dev == nearest_folder(root).stat().st_dev
    beside = temporary if on_one_disk else 0
    now = needed(config.keep) + beside
    smaller = [(keep, needed(keep) + beside) for keep in ("team", "last")]
    options = [
        f"--set keep={keep} needs up to {readable_size(n)}" for keep, n in smaller if n < now
    ]
    advice = f"The setting keep lowers this: {', '.join(options)}." if options else ""
    require_space(root, now, "this run", advice)
    if not on_one_disk:
        advice = "Or set the environment variable TMPDIR to a folder on a larger disk."
        require_space(folder, temporary, "this run, for its temporary files,", advice)


def space_for_responses(run: RunDirectory, config: RunConfig, count: int) -> None:
    """Check the space for so many responses.

    Raises:
        StorageError: the disk is too full.
    """
    require_space(run.root, bytes_of_responses(config, count), f"generating {count:,} responses")


def space_for_evaluation(run: RunDirectory, config: RunConfig, heldout: int) -> None:
    """Check the space for the held-out results of a checkpoint.

    Raises:
        StorageError: the disk is too full.
    """
    needed = bytes_of_evaluation(config, heldout)
    require_space(run.root, needed, f"evaluating {heldout:,} held-out records")


def space_for_scores(run: RunDirectory, config: RunConfig, count: int) -> None:
    """Check the space for so many log-probs.

    Raises:
        StorageError: the disk is too full.
    """
    require_space(run.root, bytes_of_scores(config, count), f"scoring {count:,} sequences")


def space_for_training(
    iteration: Iteration, config: RunConfig, size: ModelSize, steps: int
) -> None:
    """Check the space for the saved steps and the checkpoint of an iteration.

    Args:
        iteration: the iteration. What it has saved already is not needed again.
        config: the configuration of the run.
        size: the size of the model.
        steps: optimizer steps of the iteration.

    Raises:
        StorageError: the disk is too full.
    """
    needed = bytes_of_training(config, size, steps) + bytes_of_log(config, steps)
    there = bytes_of_files(iteration.training)
    require_space(iteration.run_root, needed - there, f"training θ_{iteration.number}")


def bytes_of_files(folder: Path, pattern: str = "**/*") -> int:
    """Size of the files in a folder that match a pattern, in bytes; 0 if it does not exist."""
    size = 0
    for path in folder.glob(pattern):
        with contextlib.suppress(OSError):  # another process has removed it in the meantime
            size += path.stat().st_size if path.is_file() else 0
    return size


def _bytes_beside_weights(size: ModelSize) -> int:
    return BYTES_OF_OTHER_FILES + size.vocabulary * BYTES_PER_VOCABULARY_TOKEN


def _bytes_there(run: RunDirectory, iterations: int) -> int:
    """Size of everything in a run directory that `plan_space` counts."""
    folders = [run.inputs, run.root / "logprobs"]
    size = 0
    for i in range(iterations + 1):
        folders += [run.responses(i), run.checkpoint(i), run.training(i), run.evaluation(i)]
        size += bytes_of_files(run.training_log(i).parent, "training.jsonl")
        size += bytes_of_files(run.training_log(i).parent, "critic*/**/*")
    return size + sum(bytes_of_files(folder) for folder in folders)
