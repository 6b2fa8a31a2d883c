"""Conversations in made-up words, a tokenizer and a small model, for the benchmarks of rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from tpaw.config.schema import RunConfig

VOCABULARY = 8_000
MAX_LENGTH = 1024
MAX_NEW_TOKENS = 300
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Text:
    """Endless text of made-up words with the frequencies of Zipf's law."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        syllables = [
            a + b for a in "bcdfghklmnprstvw" for b in ("a", "e", "i", "o", "u", "an", "er")
        ]
        words = ["".join(rng.choice(syllables, rng.integers(1, 5))) for _ in range(20_000)]
        ranks = np.minimum(rng.zipf(1.3, 200_000), len(words)) - 1
        ends = rng.choice([" "] * 12 + [", ", ". ", ".\n\n"], len(ranks))
        self.text = "".join(words[r] + e for r, e in zip(ranks, ends, strict=True))
        self.rng = rng

    def passages(self, count: int, characters: float) -> list[str]:
        """So many passages of about so many characters, lognormally distributed."""
        lengths = (self.rng.lognormal(-0.15, 0.55, count) * characters).astype(int) + 1
        starts = self.rng.integers(0, len(self.text) // 2, count)
        return [self.text[a : a + n] for a, n in zip(starts, lengths, strict=True)]


def make_tokenizer(text: Text) -> PreTrainedTokenizerFast:
    """A byte-level BPE with GPT-2's pattern and the template of ChatML."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([text.text[:300_000]], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def write_rows(path: Path, text: Text, rows: int, rounds: int, characters: Sequence[float]) -> None:
    """Conversations as a parquet file; `characters` of a question and of an answer."""
    schema = pa.schema(
        {"messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))}
    )
    with pq.ParquetWriter(path, schema) as writer:
        for begin in range(0, rows, 10_000):
            count = min(10_000, rows - begin)
            turns = [
                [{"role": role, "content": passage} for passage in text.passages(count, length)]
                for _ in range(rounds)
                for role, length in zip(("user", "assistant"), characters, strict=True)
            ]
            messages = [list(conversation) for conversation in zip(*turns, strict=True)]
            writer.write_table(pa.table({"messages": messages}, schema=schema))


def make_files(
    folder: Path, rows: int, rounds: int, characters: Sequence[float], iterations: int = 4
) -> RunConfig:
    """A data file, a tokenizer and a small model, and the configuration of a run on them."""
    text = Text(seed=0)
    tokenizer = make_tokenizer(text)
    tokenizer.save_pretrained(folder / "model")
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=MAX_LENGTH,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder / "model")
    write_rows(folder / "rows.parquet", text, rows, rounds, characters)
    return RunConfig.load(
        {
            "model": {"path": str(folder / "model")},
            "data": {"path": str(folder / "rows.parquet"), "turn": "last"},
            "iterations": iterations,
            "max_length": MAX_LENGTH,
            "generate": {"max_new_tokens": MAX_NEW_TOKENS},
            "precision": "fp32",
            "device": "cpu",
        }
    )
