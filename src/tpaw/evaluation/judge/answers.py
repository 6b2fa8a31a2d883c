"""A checkpoint's answers to the prompts of a file, in the format that alpaca_eval reads.

They are made as a run makes its responses: the same templates, tokens, sampling and shards, so a
kill costs at most one shard.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tpaw.config.schema import DataConfig, RunConfig
from tpaw.data.examples import Example, prepare_examples
from tpaw.data.formats import Message, shape_of
from tpaw.data.readers import read_records
from tpaw.errors import InputError
from tpaw.evaluation.judge.outputs import OUTPUTS
from tpaw.generation.generator import SamplingParams
from tpaw.generation.hf import HFGenerator
from tpaw.generation.responses import generate_responses, read_responses
from tpaw.models.checks import check_model
from tpaw.models.loading import load_model, pick_device
from tpaw.models.references import Checkpoint, find_checkpoint
from tpaw.models.tokenizers import load_tokenizer, stop_token_ids
from tpaw.runtime.interrupt import StopSignal
from tpaw.runtime.progress import note, progress
from tpaw.storage.artifacts import is_published, own_folder, read_manifest, write_json
from tpaw.storage.run_directory import environment

KEY = "evaluate.data"


def answer_rows(
    reference: str,
    data: str | None,
    output: Path | None,
    *,
    greedy: bool,
    overrides: Sequence[str],
    stop: StopSignal,
) -> Path:
    """Answer every prompt once, or go on with it; then write outputs.json.

    Args:
        reference: see `checkpoints`.
        data: where rows are; default: the held-out rows of the run.
        output: default answers/NAME.
        overrides: section.key=value over the run's configuration, or over the defaults.

    Returns:
        The folder.

    Raises:
        InputError: before a model is loaded.
    """
    checkpoint = find_checkpoint(reference)
    config, rows = _configured(checkpoint, data, overrides)
    device = pick_device(config.device)
    check_model(config)
    tokenizer = load_tokenizer(config.model, checkpoint.tokenizer_folder)
    if checkpoint.run is None:
        stop_ids = stop_token_ids(config.model, tokenizer)
    else:
        stop_ids = tuple(read_manifest(checkpoint.run.inputs)["stop_ids"])
    tokenizer.eos_token_id = stop_ids[0]
    with progress("reading and tokenising", None, "rows") as advance:
        prepared = prepare_examples(rows, KEY, tokenizer, stop_ids, config.max_length, advance)
    examples = prepared.examples
    note(f"{len(examples):,} prompts; skipped: {prepared.skipped or 'none'}")
    instructions = _instructions(rows, examples)  # while the file is what it was
    sampling = SamplingParams(
        temperature=0.0 if greedy else config.generate.temperature,
        top_p=config.generate.top_p,
        top_k=config.generate.top_k,
        max_new_tokens=config.generate.max_new_tokens,
        max_length=config.max_length,
        stop_token_ids=stop_ids,
        tokens_per_batch=config.generate.tokens_per_batch,
    )
    folder = output or Path("answers") / checkpoint.name
    settings = {
        "name": checkpoint.name,
        "player": checkpoint.player.index if checkpoint.run else None,
        "fingerprint": checkpoint.player.fingerprint,
        "rows_sha256": hashlib.sha256("\n".join(e.id for e in examples).encode()).hexdigest(),
        "sampling": sampling._asdict() | {"stop_token_ids": list(stop_ids)},
        "seed": config.seed,
        "precision": config.precision,
        "shard_size": config.generate.shard_size,
    }
    own_folder(folder, settings, data=rows.path, skipped=prepared.skipped, **environment())
    responses = folder / "responses"
    if not is_published(responses):
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        with progress(f"{checkpoint.name} answers", len(examples), "prompts") as advance:

            def on_done(count: int) -> None:
                advance(count)
                stop.check()

            generate_responses(
                responses,
                checkpoint.player,
                examples,
                lambda: HFGenerator(
                    load_model(checkpoint.player, config.model, dtype=dtype, device=device)
                ),
                lambda ids: str(tokenizer.decode(ids.tolist(), skip_special_tokens=True)),
                sampling,
                shard_size=config.generate.shard_size,
                seed=config.seed,
                on_done=on_done,
            )
    answered = zip(examples, instructions, read_responses(responses), strict=True)
    outputs = [
        {
            "instruction": instruction,
            "output": response.text,
            "generator": checkpoint.name,
            "dataset": Path(rows.path).stem,
            "id": example.id,
            "prompt": example.prompt,
            "finish_reason": response.finish_reason,
        }
        for example, instruction, response in answered
    ]
    write_json(folder / OUTPUTS, outputs)
    return folder


def _configured(
    checkpoint: Checkpoint, data: str | None, overrides: Sequence[str]
) -> tuple[RunConfig, DataConfig]:
    """The configuration to answer with, its model being the checkpoint; and the rows to answer."""
    given: dict[str, Any] = {}
    sources: list[str] = []
    if checkpoint.run is None:
        if data is None:
            raise InputError("--data: a model alone has no held-out rows; name a file")
        given = {"model.path": checkpoint.player.path, "data.path": data, f"{KEY}.path": data}
    else:
        sources = [str(checkpoint.run.config_file)]
        known = checkpoint.run.load_config()
        like = known.evaluate.data or known.data
        if data is not None:  # another file: read the same way, but with columns of its own
            other = DataConfig(path=data, template=like.template, turn=like.turn)
            given = {KEY: other.model_dump()}
    first = [f"{key}={json.dumps(value)}" for key, value in given.items()]
    config = RunConfig.load(*sources, overrides=[*first, *overrides])
    if config.evaluate.data is None:
        raise InputError(f"--data: {checkpoint.name} has no held-out rows ({KEY}); name a file")
    model = config.model.model_copy(update={"path": checkpoint.player.path, "revision": None})
    return config.model_copy(update={"model": model}), config.evaluate.data


def _instructions(rows: DataConfig, examples: Sequence[Example]) -> list[str]:
    """What each prompt was before it was templated: the user's text, or all turns of a chat."""
    source = read_records(rows, KEY)
    convert = shape_of(source, rows, KEY)
    prompts = (convert(source[int(example.id.partition("-")[0])]).prompt for example in examples)
    return [prompt if isinstance(prompt, str) else _as_text(prompt) for prompt in prompts]


def _as_text(messages: Sequence[Message]) -> str:
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
