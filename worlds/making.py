"""What the worlds share: a tokenizer of characters, a small model, its SFT, and the files."""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

PAD, END = "<|pad|>", "<|end|>"
SPACE = "Ġ"  # byte-level BPE writes a space like this
IGNORED_LABEL = -100
WARMUP_STEPS = 100
LEARNING_RATE = 3e-3
HELDOUT_ROWS = 600


class Row(NamedTuple):
    """A prompt and a target."""

    prompt: str
    target: str


def character_tokenizer(characters: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer in which every character is a token; ASCII alone.

    Byte-level BPE without merges, because transformers loads the tokenizer of a Qwen2 as byte-level
    BPE, whatever was saved.
    """
    tokens = [PAD, END, *(SPACE if c == " " else c for c in sorted(set(characters)))]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def small_model(
    tokenizer: PreTrainedTokenizerFast, seed: int, *, layers: int, width: int
) -> Qwen2ForCausalLM:
    """An untrained decoder."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.06,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def fine_tune(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rows: Iterator[Row],
    *,
    steps: int,
    batch_size: int = 128,
    stop_at: int | None = None,
    learning_rate: float = LEARNING_RATE,
) -> None:
    """Train on targets with AdamW, a warmup and a cosine to 0.

    Args:
        rows: a source of rows without end.
        steps: length of the schedule.
        stop_at: a step at which training ends, before the schedule does.
        learning_rate: the highest one.
    """
    warmup = min(WARMUP_STEPS, steps // 10 + 1)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    for step in range(stop_at or steps):
        cosine = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / steps)).item())
        rate = learning_rate * min(1.0, (step + 1) / warmup) * cosine
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = model(**batch_of(tokenizer, [next(rows) for _ in range(batch_size)])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 500 == 0:
            print(f"step {step:5d}  loss {loss.item():.4f} nats per token", flush=True)


def batch_of(tokenizer: PreTrainedTokenizerFast, rows: list[Row]) -> dict[str, torch.Tensor]:
    """Padded token ids of prompts and targets; labels for the targets and their ends."""
    ids, labels = [], []
    for row in rows:
        prompt = tokenizer(row.prompt, add_special_tokens=False).input_ids
        target = tokenizer(row.target, add_special_tokens=False).input_ids
        target.append(tokenizer.eos_token_id)
        ids.append(torch.tensor(prompt + target))
        labels.append(torch.tensor([IGNORED_LABEL] * len(prompt) + target))
    pad = tokenizer.pad_token_id
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED_LABEL),
    }


@torch.no_grad()
def responses(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    *,
    temperature: float,
    max_new_tokens: int = 64,
) -> list[str]:
    """One response to each prompt; temperature 0 is greedy."""
    inputs = tokenizer(prompts, padding=True, return_tensors="pt", add_special_tokens=False)
    sampling = {"do_sample": False} if temperature == 0 else {
        "do_sample": True, "temperature": temperature, "top_k": 0,
    }  # fmt: skip
    out = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        **sampling,
    )
    texts: list[str] = tokenizer.batch_decode(
        out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return texts


def say_accuracy(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[Row], world: World
) -> None:
    """Print the share of right responses, greedy and at temperature 1."""
    for temperature in (0.0, 1.0):
        found = responses(
            model,
            tokenizer,
            [row.prompt for row in rows],
            temperature=temperature,
            max_new_tokens=world.longest,
        )
        right = [world.is_right(*row, text) for row, text in zip(rows, found, strict=True)]
        print(f"right at T = {temperature:g}: {sum(right) / len(right):.3f}", flush=True)


def distinct(
    draw: Callable[[random.Random], Row], count: int, seed: int, used: set[str]
) -> list[Row]:
    """So many rows whose prompts are not in `used`, which they join."""
    rng = random.Random(seed)
    rows: list[Row] = []
    while len(rows) < count:
        row = draw(rng)
        if row.prompt not in used:
            used.add(row.prompt)
            rows.append(row)
    return rows


class World(NamedTuple):
    """What makes a world.

    Attributes:
        module: the checker's module, for the recipe.
        characters: of all prompts and targets.
        draw: a row of the population that SFT saw.
        draw_row: a row for self-play. Default: of the same population.
        draw_heldout: a held-out row or one for tuning. Default: of the same population.
        is_right: whether a response is right, from the texts of prompt, target and response.
        rows: rows for self-play.
        layers, width: of the model.
        steps: length of SFT's schedule.
        stop_at: the step at which SFT ends; None: at the end of the schedule.
        longest: tokens of the longest response.
        settings: more settings of the recipe.
    """

    module: str
    characters: str
    draw: Callable[[random.Random], Row]
    is_right: Callable[[str, str, str], bool]
    draw_row: Callable[[random.Random], Row] | None = None
    draw_heldout: Callable[[random.Random], Row] | None = None
    rows: int = 2000
    layers: int = 2
    width: int = 64
    steps: int = 6000
    stop_at: int | None = None
    longest: int = 40
    settings: Mapping[str, object] = {}


class Made(NamedTuple):
    """A world's SFT model with its tokenizer; its rows under `train`, `heldout` and `tuning`."""

    model: Qwen2ForCausalLM
    tokenizer: PreTrainedTokenizerFast
    rows: Mapping[str, list[Row]]


def make(world: World, folder: Path, *, steps: int | None = None) -> None:
    """Make the model of a world and its rows, and say how good the model is.

    Prompts of held-out and tuning rows are not among those of self-play.

    Args:
        steps: of SFT, all of them. Default: as the world says.
    """
    torch.set_num_threads(1)
    tokenizer = character_tokenizer(world.characters)
    model = small_model(tokenizer, seed=0, layers=world.layers, width=world.width)
    population = without_end(world.draw, seed=0)
    stop_at = None if steps else world.stop_at
    fine_tune(model, tokenizer, population, steps=steps or world.steps, stop_at=stop_at)
    model.eval()
    used: set[str] = set()
    rows: dict[str, list[Row]] = {
        name: distinct(world.draw_heldout or world.draw, HELDOUT_ROWS, seed, used)
        for name, seed in (("heldout", 1), ("tuning", 2))
    }
    source = without_end(world.draw_row or world.draw, seed=3)
    others = (row for row in source if row.prompt not in used)
    rows["train"] = list(itertools.islice(others, world.rows))
    write(world, folder, Made(model, tokenizer, rows))


def write(world: World, folder: Path, made: Made) -> None:
    """Write a world's model, its rows and a recipe, and say how good the model is."""
    say_accuracy(made.model, made.tokenizer, made.rows["tuning"], world)
    folder.mkdir(parents=True, exist_ok=True)
    made.model.save_pretrained(folder / "model")
    made.tokenizer.save_pretrained(folder / "model")
    for name, part in made.rows.items():
        records = [{"prompt": row.prompt, "completion": row.target} for row in part]
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    recipe = _recipe(world, folder)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")


def main_of(world: World, about: str | None) -> None:
    """The command line of a world: the folder to write to."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, help="steps of SFT")
    arguments = parser.parse_args()
    make(world, arguments.folder, steps=arguments.steps)


def without_end(draw: Callable[[random.Random], Row], seed: int) -> Iterator[Row]:
    """Rows, as many as are wanted."""
    rng = random.Random(seed)
    while True:
        yield draw(rng)


def _recipe(world: World, folder: Path) -> dict[str, object]:
    return {
        "model": {"path": str(folder / "model")},
        "data": {"path": str(folder / "train.jsonl"), "template": "none"},
        "iterations": 3,
        "max_length": 128,
        "checker": world.module,
        "generate": {
            "max_new_tokens": world.longest,
            "tokens_per_batch": 32768,
            "shard_size": 4096,
        },
        "train": {"learning_rate": 3e-4, "epochs": 2, "save_every": 1000},
        "evaluate": {
            "data": {"path": str(folder / "heldout.jsonl"), "template": "none"},
            "temperatures": [0.5, 0.7, 1.0],
            "samples": 4,
        },
        "precision": "fp32",
        "device": "cpu",
        "deterministic": True,
        **world.settings,
    }
