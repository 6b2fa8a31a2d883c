"""Seconds to read, template and tokenise UltraChat-like rows, beside the library tokenizers alone.

Rows have three rounds; the answer of the last one is the target. Both work on the same texts, in
turn, in one process.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from common import RESULTS, print_table, spread, write_json
from row_files import make_files
from transformers import PreTrainedTokenizerFast

from tpaw.data.examples import prepare_examples


def tokenise(options: argparse.Namespace) -> dict[str, Any]:
    """Reading and tokenising, in turn with the tokenizer alone on the same texts."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = make_files(folder, options.rows, 3, (400, 1200))
        tokenizer = PreTrainedTokenizerFast.from_pretrained(config.model.path)
        table = pq.read_table(folder / "rows.parquet")["messages"]
        alone, ours = [], []
        for _ in range(options.repeats):
            seconds = 0.0
            characters = tokens = 0
            for begin in range(0, len(table), 10_000):
                texts = [
                    str(tokenizer.apply_chat_template(messages, tokenize=False))
                    for messages in table[begin : begin + 10_000].to_pylist()
                ]
                characters += sum(map(len, texts))
                began = time.perf_counter()
                encoded = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
                seconds += time.perf_counter() - began
                tokens += sum(map(len, encoded))
            alone.append(seconds)
            began = time.perf_counter()
            prepared = prepare_examples(
                config.data.model_copy(update={"max_skipped": 1.0}),
                "data",
                tokenizer,
                (tokenizer.eos_token_id,),
                100_000,
            )
            ours.append(time.perf_counter() - began)
            print(f"alone {alone[-1]:.1f} s, ours {ours[-1]:.1f} s", file=sys.stderr, flush=True)
        found = len(prepared.examples)
    title = (
        f"{options.rows:,} rows ({found:,} used), {tokens / options.rows:.0f} tokens and "
        f"{characters / options.rows:.0f} characters a row; {options.repeats} repeats"
    )
    quotients = [a / b for a, b in zip(ours, alone, strict=True)]
    rows = [
        ["tokenizers alone", spread(alone).text(1), "1"],
        ["read, templated and tokenised", spread(ours).text(1), spread(quotients).text(2)],
    ]
    print_table(title, ["", "seconds", "÷ tokenizers"], rows)
    return {"tokens": tokens, "characters": characters, "alone": alone, "ours": ours}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, default=RESULTS / "tokenise.json")
    options = parser.parse_args(argv)
    options.device = "cpu"
    write_json(options, tokenise(options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
