"""Small models, tokenizers, rows and settings that tests share. Nothing is downloaded."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import NamedTuple

import numpy as np
import peft
import pytest
import torch
from accelerate.utils import send_to_device
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    TrainingArguments,
)

import tpaw.pipeline.training
from tpaw.data.token_ids import token_ids
from tpaw.errors import Interrupted
from tpaw.generation.generator import SamplingParams
from tpaw.logprobs.packing import PACKED_LAYOUT, PADDED_LAYOUT
from tpaw.logprobs.prepare import prepare_for_logprobs
from tpaw.logprobs.response import response_logps
from tpaw.objectives.tpaw import TeamObjective
from tpaw.runtime.interrupt import StopSignal
from tpaw.scoring.score import Precision, ScoringModel, score_sequences
from tpaw.selfplay import self_play
from tpaw.training.trainer import TeamTrainer

# Where models compute: `pytest --device cuda` sets it.
DEVICE = torch.device("cpu")

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


SPECIAL_TOKENS = ["<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|bos|>"]


def sums(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows in GSM8K's shape."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        a, b = rng.randrange(100), rng.randrange(100)
        rows.append({"question": f"What is {a} + {b}?", "answer": f"{a}+{b}={a + b}\n#### {a + b}"})
    return rows


def starter_rows(count: int) -> list[dict[str, str]]:
    """The starter's first held-out rows, which its model answers with different texts."""
    from tpaw.storage.resources import resolve_path

    path = Path(resolve_path("tpaw://starter/heldout.jsonl"))
    return [json.loads(line) for line in path.read_text().splitlines()[:count]]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_tokenizer(*, chat: bool = True, bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE like GPT-2's and Qwen's."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([row["question"] for row in sums(50)], trainer)
    if bos:
        from tokenizers.processors import TemplateProcessing

        core.post_processor = TemplateProcessing(
            single="<|bos|> $A", special_tokens=[("<|bos|>", core.token_to_id("<|bos|>"))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        bos_token="<|bos|>" if bos else None,
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(kind: str = "qwen2", seed: int = 0, vocab_size: int = 320) -> torch.nn.Module:
    """A random model of a few thousand parameters, on `DEVICE`; the same on every device."""
    return _random_model(kind, seed, vocab_size).to(DEVICE)


def _random_model(kind, seed, vocab_size):
    torch.manual_seed(seed)
    shared = {"vocab_size": vocab_size, "eos_token_id": 4, "pad_token_id": 0, "bos_token_id": None}
    if kind == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=256, **shared)
        ).eval()
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": kind == "qwen2",
    }
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes, **shared)).eval()
    return Qwen2ForCausalLM(Qwen2Config(**sizes, **shared)).eval()


def save_model(folder: Path, kind: str = "qwen2", seed: int = 0, **tokenizer_options: bool) -> Path:
    make_model(kind, seed).save_pretrained(folder)
    make_tokenizer(**tokenizer_options).save_pretrained(folder)
    return folder


def save_adapter(folder: Path, base: Path, seed: int = 0, **settings) -> Path:
    """A random LoRA adapter over a saved model, as PEFT saves it."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    config = peft.LoraConfig(init_lora_weights=False, **(options | settings))
    peft.get_peft_model(model, config).save_pretrained(folder)
    return folder


LAYOUTS = pytest.mark.parametrize(
    "layout", [PACKED_LAYOUT, PADDED_LAYOUT], ids=["packed", "padded"]
)


def score(model, sequences, *, tokens_per_row=10_000, use_bf16=False, on_done=lambda n: None):
    """Log-probs of sequences under a model that is prepared here."""
    return score_sequences(
        scorer(model, use_bf16), sequences, tokens_per_row=tokens_per_row, on_done=on_done
    )


def scorer(model, use_bf16=False):
    """A model as a loaded player, prepared."""
    layout, _ = prepare_for_logprobs(model, 256)
    kind = next(model.parameters()).device.type
    return ScoringModel(model, layout, Precision(kind, use_bf16=use_bf16))


def logps_of(model, batch):
    """`response_logps` of a batch that is moved to the model's device."""
    return response_logps(model, send_to_device(batch, next(model.parameters()).device))


PAPER = {"lambda_": 0.1, "eta": 6.0, "gamma": 0.5}


def triples(count, players, seed=0):
    """Ragged triples with their reference log-probs under `players`, newest first."""
    rng = np.random.default_rng(seed)

    def ids(low, high):
        return token_ids(rng.integers(5, 320, rng.integers(low, high)))

    rows = []
    for i in range(count):
        prompt, target, generated = ids(1, 20), ids(1, 20), ids(1, 20)
        generated = target if i % 5 == 0 else generated
        row = {"prompt_ids": prompt, "target_ids": target, "generated_ids": generated}
        for kind in ("target", "generated"):
            row[f"player_{kind}_logps"] = [
                float(score(player, [(prompt, row[f"{kind}_ids"])], tokens_per_row=1)[0])
                for player in players
            ]
        rows.append(row)
    return rows


def arguments(folder, **changes):
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "learning_rate": 1e-3,
        "optim": "rmsprop",
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": DEVICE.type == "cpu",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 1,
    }
    return TrainingArguments(**(settings | changes))


def train(model, rows, args, objective=PAPER, **options):
    trainer = TeamTrainer(
        model=model,
        args=args,
        train_dataset=rows,
        processing_class=make_tokenizer(),
        objective=TeamObjective(**objective) if isinstance(objective, dict) else objective,
        **options,
    )
    trainer.train()
    return trainer


def team_rows(prompts, opponents, seed=0, longest=20):
    """Triples of every prompt with every opponent, as a run orders them."""
    rng = np.random.default_rng(seed)

    def ids():
        return token_ids(rng.integers(5, 300, rng.integers(1, longest)))

    examples = [(ids(), ids()) for _ in range(prompts)]
    return [
        {
            "prompt_ids": prompt,
            "target_ids": target,
            "generated_ids": ids(),
            "player_target_logps": [-1.0],
            "player_generated_logps": [-2.0],
        }
        for _ in range(opponents)
        for prompt, target in examples
    ]


SAMPLING = SamplingParams(
    temperature=1.0,
    top_p=1.0,
    top_k=0,
    max_new_tokens=12,
    max_length=64,
    stop_token_ids=(4,),
)


def ignore(count):
    pass


def contents(folder):
    """Every published byte that results depend on; logs and manifests hold times."""
    kinds = ("*.safetensors", "*.parquet", "*.jsonl")
    files = [path for kind in kinds for path in folder.rglob(kind) if path.name != "training.jsonl"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


class Ended(NamedTuple):
    """A process that has ended."""

    code: int

    def poll(self):
        return self.code

    wait = poll


def stopped_at_step(steps, config, folder):
    """Run until an optimizer step of the first iteration, as if SIGTERM came there."""

    stop, original = StopSignal(), tpaw.pipeline.training.train_iteration

    def stopping(*args, advance, **kwargs):
        def step(count, note=""):
            nonlocal steps
            advance(count, note)
            steps -= count
            if steps <= 1:
                stop.signal_number = 15

        return original(*args, advance=step, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tpaw.pipeline.training, "train_iteration", stopping)
        with pytest.raises(Interrupted):
            self_play(config, folder, stop)


def run_settings(model: Path, data: Path, heldout: Path) -> dict:
    """A whole run that takes seconds, as the nested mapping of its YAML file."""
    return {
        "model": {"path": str(model)},
        "data": {"path": str(data)},
        "iterations": 3,
        "max_length": 128,
        "generate": {"max_new_tokens": 12, "tokens_per_batch": 256, "shard_size": 10},
        "score": {"tokens_per_row": 512, "shard_size": 20},
        "train": {
            "learning_rate": 1e-3,
            "epochs": 1,
            "batch_size": 8,
            "tokens_per_row": 256,
            "save_every": 2,
            "log_every": 1,
        },
        "evaluate": {"data": {"path": str(heldout)}},
        "precision": "fp32",
        "device": DEVICE.type,
        "deterministic": True,
    }
