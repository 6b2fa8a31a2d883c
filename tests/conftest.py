"""Small models, tokenizers and data, made here: nothing is downloaded and nothing is borrowed."""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are too small to share out

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

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
    """A random model of a few thousand parameters."""
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


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved random Qwen2 with a chat template."""
    return save_model(tmp_path_factory.mktemp("model") / "qwen2")


@pytest.fixture(scope="session")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 rows in GSM8K's shape."""
    return write_jsonl(tmp_path_factory.mktemp("data") / "train.jsonl", sums(24))


@pytest.fixture(scope="session")
def heldout_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10 other rows."""
    return write_jsonl(tmp_path_factory.mktemp("data") / "heldout.jsonl", sums(10, seed=1))


@pytest.fixture
def settings(model_folder: Path, data_file: Path, heldout_file: Path) -> dict:
    """A whole run that takes seconds, as the nested mapping of its YAML file."""
    return {
        "model": {"path": str(model_folder)},
        "data": {"path": str(data_file)},
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
        "evaluate": {"data": {"path": str(heldout_file)}},
        "precision": "fp32",
        "device": "cpu",
        "deterministic": True,
    }


@pytest.fixture(scope="session")
def finished(tmp_path_factory, model_folder, data_file, heldout_file):
    """A run of four iterations, and its configuration."""
    from tpaw.config.schema import RunConfig
    from tpaw.selfplay import self_play
    from tpaw.storage.run_directory import RunDirectory

    config = RunConfig.load(
        {
            "model": {"path": str(model_folder)},
            "data": {"path": str(data_file)},
            "max_length": 128,
            "generate": {"max_new_tokens": 12, "tokens_per_batch": 512, "shard_size": 16},
            "objective": {"lambda": [0.1, 0.1, 0.1, 5.0]},
            "train": {
                "learning_rate": 1e-3,
                "epochs": [2, 1, 1, 1],
                "batch_size": 8,
                "tokens_per_row": 256,
                "log_every": 2,
            },
            "evaluate": {"data": {"path": str(heldout_file)}},
            "precision": "fp32",
            "device": "cpu",
        }
    )
    folder = tmp_path_factory.mktemp("runs") / "run"
    last = self_play(config, folder)
    assert last.index == 4
    return RunDirectory(folder), config


@pytest.fixture
def tpaw_(monkeypatch, capsys):
    """Run a command in this process; gives the exit code, stdout and stderr."""
    from tpaw.cli.main import main

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["tpaw", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as exit_:
            code = exit_.code or 0
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """Start judges on this machine, asked from an empty folder; nothing is tried twice."""
    from judge_server import JudgeServer

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("tpaw.evaluation.judge.endpoint.RETRIES", 0)
    servers = []

    def start(reply):
        servers.append(JudgeServer(reply))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def six(tmp_path):
    """A wins three by length, loses one; one of equal length, one identical."""
    from judge_server import answers

    a = answers(tmp_path / "a.jsonl", "aaaa", "aaa", "aaaaa", "a", "ab", "same")
    b = answers(tmp_path / "b.jsonl", "b", "b", "b", "bbbb", "ba", "same")
    return a, b
