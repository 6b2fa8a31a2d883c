"""PackedBatch answered a second: this package, `model.generate`, transformers' continuous batching.

    python benchmarks/generation.py [--size small] [--precision bf16]

The models are random, so they would never stop by themselves. A hook on the model makes each
emitted token the one before it less one, and 0 stops: a prompt's last token is the length of its
answer. Every contender runs the whole model and its whole sampling, meets the same lengths, and
cannot know them beforehand. Lengths are lognormal, prompts of 120 tokens in the mean, answers of
240 and at most 1024, all times `--scale`, which by default makes it a matter of minutes. Every
answer is checked.

Repeats are interleaved: a contender's ratio is to the plain `generate` of the same repeat.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tpaw.data.token_ids import TokenIds, token_ids
from tpaw.generation.generator import SamplingParams
from tpaw.generation.hf import HFGenerator

LONGEST = 1024
STOP = 0
ROWS_OF_PLAIN = 64
MEAN_PROMPT, MEAN_ANSWER = 120, 240
# hidden size, layers, heads, intermediate size
SIZES = {"0.1B": (640, 14, 10, 2560), "small": (256, 4, 4, 1024)}

Contender = Callable[[Sequence[TokenIds], int], list[list[int]]]


def make_model(size: str, dtype: torch.dtype, device: str) -> Qwen2ForCausalLM:
    """A random Qwen2 with 32,000 tokens that counts down from the last token it gets."""
    hidden, layers, heads, intermediate = SIZES[size]
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=32_000,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=2,
        intermediate_size=intermediate,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    model = Qwen2ForCausalLM(config).to(device=device, dtype=dtype).eval()

    def count_down(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        keep = kwargs.get("logits_to_keep", 0)
        input_ids = kwargs["input_ids"]
        input_ids = input_ids[:, keep if isinstance(keep, torch.Tensor) else slice(-keep, None)]
        output.logits.scatter_(-1, (input_ids - 1).clamp(min=0)[..., None], 1e4)

    model.register_forward_hook(count_down, with_kwargs=True)
    return model


def make_prompts(count: int, scale: float, seed: int = 0) -> list[TokenIds]:
    """Prompts whose last token is the length of their answer."""
    rng = np.random.default_rng(seed)

    def lengths(mean: float, sigma: float, longest: int) -> np.ndarray:
        drawn = rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, count).clip(1, longest)
        return (drawn * scale).clip(1).astype(int)

    prompts = lengths(MEAN_PROMPT, 0.6, LONGEST)
    answers = lengths(MEAN_ANSWER, 0.7, LONGEST)
    return [
        token_ids([*rng.integers(LONGEST + 1, 32_000, n - 1), answer])
        for n, answer in zip(prompts, answers, strict=True)
    ]


def ours(model: Qwen2ForCausalLM, longest: int, tokens_per_batch: int) -> Contender:
    """`HFGenerator`, which knows the longest possible answer and no more."""
    sampling = SamplingParams(1.0, 1.0, 0, longest, 2 * longest, (STOP,))

    def answer(prompts: Sequence[TokenIds], seed: int) -> list[list[int]]:
        found = HFGenerator(model, tokens_per_batch).generate(
            prompts, sampling, seed, lambda count: None
        )
        return [completion.token_ids.tolist() for completion in found]

    return answer


def plain(model: Qwen2ForCausalLM, longest: int) -> Contender:
    """`model.generate`, 64 rows at a time as they come."""
    config = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=longest, eos_token_id=STOP, pad_token_id=STOP
    )

    def answer(prompts: Sequence[TokenIds], seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        answers: list[list[int]] = []
        for begin in range(0, len(prompts), ROWS_OF_PLAIN):
            rows = prompts[begin : begin + ROWS_OF_PLAIN]
            width = max(map(len, rows))
            input_ids = torch.zeros((len(rows), width), dtype=torch.int64, device=model.device)
            for row, prompt in enumerate(rows):
                input_ids[row, width - len(prompt) :] = torch.tensor(prompt)
            with torch.inference_mode():
                output = model.generate(
                    input_ids=input_ids,
                    attention_mask=(input_ids > 0).long(),
                    generation_config=config,
                )
            for tokens in output[:, width:].tolist():
                answers.append(tokens[: tokens.index(STOP) + 1])
        return answers

    return answer


def continuous_batching(model: Qwen2ForCausalLM, longest: int, tokens_per_batch: int) -> Contender:
    """transformers' own continuous batching, with as many tokens of cache as ours."""
    config = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=longest, eos_token_id=STOP, pad_token_id=STOP
    )

    def answer(prompts: Sequence[TokenIds], seed: int) -> list[list[int]]:
        implementation = model.config._attn_implementation
        batching = ContinuousBatchingConfig(num_blocks=tokens_per_batch // 256, seed=seed)
        try:
            found = model.generate_batch(
                [prompt.tolist() for prompt in prompts],
                generation_config=config,
                continuous_batching_config=batching,
            )
        finally:
            model.set_attn_implementation(implementation)  # it leaves its paged one
        by_number = sorted(found.values(), key=lambda output: int(output.request_id[4:]))
        return [list(output.generated_tokens) for output in by_number]

    return answer


def measure(
    contenders: dict[str, Contender], prompts: Sequence[TokenIds], repeats: int
) -> dict[str, list[float]]:
    """Seconds of each contender in each repeat; every answer is checked."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    expected = [list(range(int(prompt[-1]) - 1, -1, -1)) for prompt in prompts]
    for repeat in range(repeats):
        for name, contender in contenders.items():
            started = time.perf_counter()
            answers = contender(prompts, repeat)
            seconds[name].append(time.perf_counter() - started)
            print(f"{name}: {seconds[name][-1]:.1f} s", file=sys.stderr, flush=True)
            if answers != expected:
                raise SystemExit(f"{name}: wrong answers")
    return seconds


def median_and_range(values: Sequence[float]) -> str:
    """ "median (smallest to largest)"."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="0.1B")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--scale", type=float, default=0.2, help="of all lengths")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens-per-batch", type=int, nargs="+")
    parser.add_argument("--only-ours", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("generation.json"))
    options = parser.parse_args()

    torch.set_grad_enabled(False)
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    model = make_model(options.size, dtype, options.device)
    prompts = make_prompts(options.rows, options.scale)
    longest = int(LONGEST * options.scale)
    # By default as many rows at a time as the plain `generate` has.
    same_rows = int(ROWS_OF_PLAIN * (MEAN_PROMPT * options.scale + longest))
    budgets = options.tokens_per_batch or [same_rows]
    contenders: dict[str, Contender] = {}
    if not options.only_ours:
        contenders["generate"] = plain(model, longest)
        contenders["continuous batching"] = continuous_batching(model, longest, budgets[0])
    for tokens in budgets:
        contenders[f"tpaw {tokens}"] = ours(model, longest, tokens)
    seconds = measure(contenders, prompts, options.repeats)

    base = next(iter(seconds.values()))
    print(f"{'':24} {'rows/s':28} times {next(iter(seconds))}")
    rows = []
    for name, taken in seconds.items():
        rates = [len(prompts) / s for s in taken]
        ratios = [b / s for b, s in zip(base, taken, strict=True)]
        print(f"{name:24} {median_and_range(rates):28} {median_and_range(ratios)}")
        rows.append({"name": name, "seconds": taken, "rows_per_second": rates, "ratios": ratios})
    facts = {
        "options": {k: str(v) for k, v in vars(options).items()},
        "parameters": model.num_parameters(),
        "answer_tokens": sum(int(prompt[-1]) for prompt in prompts),
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "contenders": rows,
    }
    options.output.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
