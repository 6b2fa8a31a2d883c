"""`tpaw new`: look at a model and at data, and propose a configuration that runs."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from tpaw.config.messages import validate_as
from tpaw.config.schema import Columns, DataConfig, ModelConfig, RunConfig
from tpaw.data.columns import key_list
from tpaw.data.examples import Example, Examples, Prepared, described_skips, prepare_examples
from tpaw.data.formats import columns_to_read
from tpaw.data.inputs import Inputs
from tpaw.data.readers import open_records
from tpaw.errors import InputError
from tpaw.evaluation.checker import checker_of
from tpaw.models.checks import check_model, read_config
from tpaw.models.loading import pick_device
from tpaw.models.size import model_size
from tpaw.models.tokenizers import load_tokenizer, stop_token_ids
from tpaw.pipeline.space import layer_shape, memory_of_tokens, memory_of_training
from tpaw.runtime.memory import free_memory
from tpaw.runtime.progress import OnDone, ignore
from tpaw.storage.artifacts import write_text
from tpaw.storage.failures import readable_size

LONGEST = 32_768
"""Longest prompt plus response that is looked at, in tokens."""
SHORT_ENOUGH = 0.995
"""Share of the records, or of the targets, that the proposed lengths leave whole."""
HELDOUT_SHARE, FEWEST_HELDOUT, MOST_HELDOUT = 0.1, 1, 1000
MEMORY_SHARE = 0.7
"""Of the free memory, for what `memory_of_training` counts; activations take the rest."""
MEMORY_SHARE_OF_ALL = 0.9
"""Of the free memory, for weights and activations together."""
ROW_STEP, SHORTEST_ROW = 256, 1024
"""Tokens: `tokens_per_row` is a multiple of the first; below the second, activations are computed
again."""
STEPS, SMALLEST_BATCH = 20, 4
_SEED = 0


class Proposal(NamedTuple):
    """What `tpaw new` found and chose.

    Attributes:
        text: the configuration as YAML, with comments.
        files: other files to write, with their text.
        reasons: what was chosen and why, one sentence each.
        first_rows: the first example as the model sees it.
    """

    text: str
    files: Mapping[Path, str]
    reasons: Sequence[str]
    first_rows: Sequence[str]


class _Choice(NamedTuple):
    """Settings of the YAML file, and why."""

    settings: dict[str, Any]
    reason: str


def columns_of(text: str) -> Columns:
    """The columns that an option names.

    Args:
        text: for example `prompt=text,target=label`. `completion`, as TRL says, is the target.

    Raises:
        InputError: it is no such list, or no valid combination.
    """
    names: dict[str, str] = {}
    for part in text.split(","):
        role, found, column = (piece.strip() for piece in part.partition("="))
        role = "target" if role == "completion" else role
        if not (role and found and column) or role in names:
            raise InputError(
                f"--columns {text}: must name each column once as ROLE=NAME, separated by commas, "
                "such as prompt=text,target=label or messages=chat"
            )
        names[role] = column
    return validate_as(Columns, names, f"--columns {text}: ")


def propose(
    output: Path,
    model: str,
    data: str,
    heldout: str | None,
    columns: Columns | None = None,
    on_done: OnDone = ignore,
) -> Proposal:
    """Look at a model and at records, and propose a configuration.

    Args:
        output: the YAML file that will be written. Held-out records are split off into files
            beside it, unless `heldout` names some.
        model: path or hub id of the SFT model.
        data: path or hub id of the records.
        heldout: path or hub id of records to evaluate on.
        columns: names of the columns to read, of both; None if they have usual names.
        on_done: called with the number of records read since the last call.

    Raises:
        InputError: the model or the records cannot be used, or a file is there already.
    """
    beside = {
        part: output.with_name(f"{output.stem}-{part}.jsonl") for part in ("train", "heldout")
    }
    for path in (output, *(() if heldout else beside.values())):
        if path.exists():
            raise InputError(f"{path}: exists already; choose another name or remove it")
    if not output.parent.is_dir():
        raise InputError(f"{output}: no such folder: {output.parent}")
    settings = ModelConfig(path=model)
    positions = getattr(read_config(settings).get_text_config(), "max_position_embeddings", None)
    longest = min(LONGEST, positions) if positions and positions > 0 else LONGEST
    check_model(settings, longest, is_trained=True)
    tokenizer = load_tokenizer(settings)
    stop_ids = stop_token_ids(settings, tokenizer)
    tokenizer.eos_token_id = stop_ids[0]

    def read(path: str, key: str) -> Prepared:
        config = DataConfig(path=path, columns=columns, max_skipped=1.0)
        return prepare_examples(config, key, tokenizer, stop_ids, longest, on_done)

    found = read(data, "data")
    lengths = _lengths(found.examples, longest)
    max_length = lengths.settings["max_length"]
    training = _training(settings, max_length)
    if heldout is None:
        source = DataConfig(path=data, columns=columns)
        parts = _split_off(source, found.examples, max_length, beside)
    else:
        evaluated = list(read(heldout, "evaluate.data").examples)
        said = f"Held out: the {len(evaluated):,} records of {heldout}."
        parts = _Parts(data, heldout, list(found.examples), evaluated, {}, said)
    train, evaluated_on = (
        {"path": path} | ({"columns": columns.model_dump(exclude_none=True)} if columns else {})
        for path in (parts.train_path, parts.heldout_path)
    )
    tree: dict[str, Any] = {
        "model": {"path": model, **training.settings.get("model", {})},
        "data": train,
        "evaluate": {"data": evaluated_on},
        **lengths.settings,
        **{n: v for n, v in training.settings.items() if n not in ("model", "generate")},
    }
    tree["generate"] = {**lengths.settings["generate"], **training.settings.get("generate", {})}
    batch_size = _batch_size(len(parts.trained))
    if batch_size is not None:
        tree["train"] = {**tree.get("train", {}), "batch_size": batch_size}
        training = training._replace(
            reason=f"{training.reason} With so few records, a batch has {batch_size} triples."
        )
    reasons = [
        _counted(found),
        parts.reason,
        lengths.reason,
        training.reason,
        _checked(parts.evaluated),
        "The learning rate decides most, and cannot be found by looking. train.learning_rate has "
        "the paper's 1e-6, for 1.5B to 8B parameters. Begin with the last rate of your SFT.",
    ]
    unusable = sum(found.skipped.values())
    share = (unusable + sum(_is_long(e, max_length) for e in parts.trained)) / (
        unusable + len(parts.trained)
    )
    if share > RunConfig.load(tree).data.max_skipped:
        # A part of the records, as the probe looks at, may have more of them.
        tree["data"]["max_skipped"] = min(1.0, math.ceil(100 * share + 10) / 100)
        reasons.insert(
            0,
            f"WARNING: {share:.0%} of the records to train on cannot be used. data.max_skipped "
            "allows it, so that a run is possible.",
        )
    RunConfig.load(tree)
    examples, rest = Examples.of(parts.trained), Examples.of(parts.evaluated)
    first_rows = Inputs(examples, rest, {}, tokenizer, stop_ids).first_rows()[:1]
    return Proposal(_as_yaml(tree, reasons), parts.files, reasons, first_rows)


def write_proposal(output: Path, proposal: Proposal) -> None:
    """Write the YAML file last, so that it never names files that are not there."""
    for path, text in (*proposal.files.items(), (output, proposal.text)):
        write_text(path, text)


class _Parts(NamedTuple):
    """The records to train on and those to evaluate on; `files` are to be written."""

    train_path: str
    heldout_path: str
    trained: list[Example]
    evaluated: list[Example]
    files: dict[Path, str]
    reason: str


def _split_off(
    source: DataConfig, examples: Examples, max_length: int, beside: Mapping[str, Path]
) -> _Parts:
    """Hold out a part of the prompts, with all their records.

    Raises:
        InputError: there is only one prompt.
    """
    chosen = _heldout_prompts(examples, max_length)
    is_heldout = [key in chosen for key in key_list(examples.prompt_keys)]
    records = list(_split(source, examples, is_heldout))
    sides = {"train": False, "heldout": True}
    files = {
        path: "".join(f"{text}\n" for text, is_out in records if is_out == sides[part])
        for part, path in beside.items()
    }
    trained, evaluated = (
        [e for e, is_out in zip(examples, is_heldout, strict=True) if is_out == side]
        for side in sides.values()
    )
    return _Parts(
        str(beside["train"]),
        str(beside["heldout"]),
        trained,
        evaluated,
        files,
        f"Held out: {len(evaluated):,} of {len(examples):,} records, split by prompt, so that no "
        "held-out prompt is a training prompt.",
    )


def _heldout_prompts(examples: Examples, max_length: int) -> Collection[bytes]:
    """Keys of the prompts to hold out: a tenth of the distinct ones, at most `MOST_HELDOUT`.

    Records that are longer than `max_length` are not held out.

    Raises:
        InputError: there is only one prompt.
    """
    keys = key_list(examples.prompt_keys)
    long = {key for key, e in zip(keys, examples, strict=True) if _is_long(e, max_length)}
    prompts = sorted(set(keys))
    if len(prompts) < 2:
        raise InputError(
            "--data: all records have the same prompt, so none can be held out; use --heldout"
        )
    count = min(MOST_HELDOUT, max(FEWEST_HELDOUT, round(HELDOUT_SHARE * len(prompts))))
    order = np.random.default_rng(_SEED).permutation(len(prompts))
    return set([prompts[int(i)] for i in order if prompts[int(i)] not in long][:count])


def _is_long(example: Example, max_length: int) -> bool:
    return len(example.prompt_ids) + len(example.target_ids) > max_length


def _split(
    config: DataConfig, examples: Examples, is_heldout: Sequence[bool]
) -> Iterator[tuple[str, bool]]:
    """Each record as JSON, and whether it is held out. Unusable records stay with the others."""
    numbers = (int(example.id.partition("-")[0]) for example in examples)
    heldout = dict(zip(numbers, is_heldout, strict=True))
    for number, record in enumerate(open_records(config, "data", columns_to_read(config))):
        present = {name: value for name, value in record.items() if value is not None}
        yield json.dumps(present, ensure_ascii=False, default=str), heldout.get(number, False)


def _counted(found: Prepared) -> str:
    """How many records can be used, and why the others cannot."""
    unusable = sum(found.skipped.values())
    reasons = f": {described_skips(found.skipped)}" if unusable else ""
    return f"Records: {len(found.examples):,} usable, {unusable:,} not{reasons}."


def _checked(evaluated: Sequence[Example]) -> str:
    if checker_of("exact_match").can_check(evaluated):
        return "Every held-out target ends with `#### answer`, so accuracy is measured."
    return (
        "Some held-out target has no `#### answer`, so only log-probs are measured. Set `checker` "
        "to a function of yours to measure accuracy."
    )


def _lengths(examples: Examples, longest: int) -> _Choice:
    """`max_length` and `generate.max_new_tokens` from the lengths of the records."""
    targets = np.array([len(example.target_ids) for example in examples])
    both = targets + np.array([len(example.prompt_ids) for example in examples])
    whole, answer = (float(np.quantile(n, SHORT_ENOUGH)) for n in (both, targets))
    max_length = min(longest, 64 * math.ceil(max(whole, answer) * 1.1 / 64))
    room = max_length - int(np.median(both - targets))  # for a response to a typical prompt
    new_tokens = max(1, min(room, 32 * math.ceil(1.5 * answer / 32)))
    return _Choice(
        {"max_length": max_length, "generate": {"max_new_tokens": new_tokens}},
        f"Lengths in tokens, prompt and target together: median {np.median(both):.0f}, "
        f"99.5 % are at most {whole:.0f}, the longest {both.max()}. So max_length is {max_length}"
        f"{', as long as the model can read' if max_length == longest else ''}. 99.5 % of the "
        f"targets have at most {answer:.0f}, so max_new_tokens is {new_tokens}"
        f"{', which is what a typical prompt leaves' if new_tokens == room else ''}.",
    )


def _training(model: ModelConfig, max_length: int) -> _Choice:
    """Full fine-tuning, split weights or adapters: the first that fits into the free memory."""
    device = pick_device("auto")
    room = free_memory(device)
    adapter: dict[str, Any] = {"adapter": {"rank": 64}}
    lora: dict[str, Any] = {"model": adapter, "train": {"learning_rate": 1e-5}}
    ways: dict[str, dict[str, Any]] = {"full fine-tuning": {}, "LoRA": lora}
    if device.type == "cuda":
        ways = {
            "full fine-tuning": {},
            "full fine-tuning with split weights": {"train": {"weights": "split"}},
            "LoRA": lora,
            "QLoRA": {**lora, "model": {**adapter, "quantization": "nf4"}},
        }
    precision = "bf16" if device.type == "cuda" else "fp32"
    needed = {name: _memory(model, way, precision) for name, way in ways.items()}
    fitting = [name for name in ways if needed[name] <= MEMORY_SHARE * room]
    chosen = fitting[0] if fitting else list(ways)[-1]
    budgets = _token_budgets(model, room, needed[chosen], precision, max_length)
    settings: dict[str, Any] = {**ways[chosen], "precision": precision}
    for section, changes in budgets.settings.items():
        settings[section] = {**settings.get(section, {}), **changes}
    return _Choice(
        settings,
        f"Training: {chosen} in {precision}. It holds {readable_size(needed[chosen])} of weights, "
        f"gradients and optimizer state; {readable_size(room)} are free on the "
        f"{'GPU' if device.type == 'cuda' else 'CPU'}. {budgets.reason}"
        + ("" if fitting else " That may not be enough."),
    )


def _token_budgets(
    model: ModelConfig, room: int, weights: int, precision: str, max_length: int
) -> _Choice:
    """Tokens in memory at a time, where the defaults would not fit."""
    shape = layer_shape(read_config(model).get_text_config())
    if shape is None:
        return _Choice({}, "Activations come on top.")
    size = 2 if precision == "bf16" else 4
    defaults = RunConfig.load({"model": {"path": model.path}, "data": {"path": "-"}})
    usual = defaults.train.tokens_per_row
    rest = int(MEMORY_SHARE_OF_ALL * room) - weights

    def fitting(*, is_recomputed: bool) -> int:
        fixed, more = (
            memory_of_tokens(shape, n, size, is_recomputed=is_recomputed) for n in (0, usual)
        )
        return min(usual, ROW_STEP * int((rest - fixed) / (more - fixed) * usual / ROW_STEP))

    train: dict[str, Any] = {}
    tokens = fitting(is_recomputed=False)
    if is_recomputed := tokens < min(usual, max(max_length, SHORTEST_ROW)):
        tokens, train = fitting(is_recomputed=True), {"activation_checkpointing": True}
    is_enough, tokens = tokens >= ROW_STEP, max(tokens, ROW_STEP)
    settings: dict[str, Any] = {}
    if tokens < usual:
        train = {"tokens_per_row": tokens, **train}
        settings["score"] = {"tokens_per_row": tokens}
    if train:
        settings["train"] = train
    cached = size * shape.layers * shape.cached
    parameters = model_size(ModelConfig(path=model.path)).parameters
    batch = int((MEMORY_SHARE_OF_ALL * room - size * parameters) / cached / ROW_STEP) * ROW_STEP
    if batch < defaults.generate.tokens_per_batch:
        settings["generate"] = {"tokens_per_batch": max(batch, max_length)}
    taken = memory_of_tokens(shape, tokens, size, is_recomputed=is_recomputed)
    again = ", computed again in the backward pass," if is_recomputed else ""
    return _Choice(
        settings,
        f"The activations of {tokens:,} tokens at a time{again} take about {readable_size(taken)}."
        + ("" if is_enough else " That may be too much."),
    )


def _batch_size(records: int) -> int | None:
    """A power of two that gives an epoch about `STEPS` steps; None if the default does."""
    wanted = 2 ** int(math.log2(max(SMALLEST_BATCH, records / STEPS)))
    return wanted if wanted < RunConfig.model_fields["train"].default.batch_size else None


def _memory(model: ModelConfig, settings: Mapping[str, Any], precision: str) -> int:
    of_model = {"path": model.path, **settings.get("model", {})}
    tree = {**settings, "model": of_model, "data": {"path": "-"}, "precision": precision}
    config = RunConfig.load(tree)
    return memory_of_training(config, model_size(config.model))


def _as_yaml(tree: Mapping[str, Any], reasons: Sequence[str]) -> str:
    comments = "".join(f"# {line}\n" for reason in reasons for line in textwrap.wrap(reason, 94))
    text = yaml.safe_dump(dict(tree), sort_keys=False, allow_unicode=True)
    return (
        "# Written by `tpaw new`. `tpaw config show` on this file prints every other setting.\n#\n"
        f"{comments}{text}"
    )
