"""Optimizer steps a second of full fine-tuning on one GPU; ours only.

A step is 64 triples under three players, lengths as in workload.py, with the reference log-probs
given (training has no reference model in memory). The bar is 0.134 steps/s at the Llama-3.1-8B
shape on one H100 or H200:

    python benchmarks/steps_per_second.py --size llama-3.1-8b --bf16 --checkpointing --weights split
    python benchmarks/steps_per_second.py --size llama-3.1-8b --bf16 --checkpointing --weights nf4
    python benchmarks/steps_per_second.py --size qwen2.5-1.5b --bf16
    python benchmarks/steps_per_second.py --size tiny --device cpu --batch 4 --steps 2

fp32 weights, gradients and RMSprop's state are 12 bytes a parameter, 96 GB at 8B, which an H200
holds; split weights (`train.weights: split`) are 8, for an H100. nf4 is QLoRA: a base in 4 bits
and an fp32 adapter of rank 64 on all linear layers, as the recipe `qlora` has it; the base gets no
gradient, so a step has two thirds of the model FLOPs. FLOPs are those of flops.py.

On a machine that has PyTorch with CUDA but reaches no package index, carry wheels of these at the
versions of constraints.txt: transformers, tokenizers, huggingface-hub, httpx2, httpcore2,
truststore, pydantic, pydantic-core, annotated-types, typing-inspection, and accelerate, pyarrow,
scipy, rich, safetensors where they are absent or old; run with PYTHONPATH=src. train_step.py needs
trl, datasets, dill and multiprocess too.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from tempfile import TemporaryDirectory
from typing import Any

import matmul
import ours
import torch
from common import parse, parser, precision_of, print_table, spread, write_json
from contender import PAPER_OBJECTIVE, Settings
from flops import training_flops
from workload import (
    Shape,
    make_model,
    make_triples,
    random_logps,
    shape_named,
    useful_tokens,
)

from tpaw.config.schema import AdapterConfig, ModelConfig
from tpaw.models.adapters import AdaptedBase
from tpaw.models.loading import load_base
from tpaw.team import Player

BAR = 0.134
PLAYERS = 3


def quantized(shape: Shape, seed: int, device: torch.device) -> Any:
    """A policy of QLoRA, loaded as a run loads it."""
    adapter = AdapterConfig()
    with TemporaryDirectory() as folder:
        make_model(shape, seed, device, torch.bfloat16).save_pretrained(folder)
        config = ModelConfig(path=folder, quantization="nf4", adapter=adapter)
        base = load_base(Player(0, folder, ""), config, dtype=torch.bfloat16, device=device)
    return AdaptedBase(base).policy(None, adapter, seed)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; `--repeats` has no meaning here, each step is one."""
    options_of = parser(__doc__, size="llama-3.1-8b")
    options_of.add_argument("--batch", type=int, default=64, help="triples in an optimizer step")
    options_of.add_argument("--steps", type=int, default=6, help="the first is not counted")
    options_of.add_argument("--length-scale", type=float, default=1.0)
    options_of.add_argument("--checkpointing", action="store_true")
    options_of.add_argument("--weights", choices=["fp32", "split", "nf4"], default="fp32")
    options_of.add_argument("--tokens-per-row", type=int, default=8192)
    options = parse(options_of, argv)
    if options.weights != "fp32" and not options.bf16:
        options_of.error(f"--weights {options.weights} computes in bf16: add --bf16")
    if options.steps < 2:
        options_of.error("--steps must be at least 2: the first is not counted")
    shape = shape_named(options.size)
    device = torch.device(options.device)
    if options.weights == "nf4":
        model = quantized(shape, options.seed, device)
    else:
        model = make_model(shape, options.seed, device, torch.float32)
    # Every step has the same triples, so that steps differ by the machine alone.
    triples = make_triples(options.batch, 1, shape.vocab, options.seed, options.length_scale)
    settings = Settings(
        options.batch,
        PAPER_OBJECTIVE,
        options.bf16,
        epochs=options.steps,
        checkpointing=options.checkpointing,
        lean_optimizer=True,
        split_weights=options.weights == "split",
    )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    training = ours.train(
        model,
        triples,
        random_logps(triples, PLAYERS, shape.vocab),
        settings,
        tokens_per_row=options.tokens_per_row,
    )
    counted = training.step_seconds[1:]
    mode = "bf16" if options.bf16 else "fp32"
    peak = matmul.peak_flops(device, mode, quick=options.size == "tiny")
    rows_of_triples = ours.trained_rows(triples)
    model_flops = training_flops(shape, rows_of_triples)
    again = training_flops(shape, rows_of_triples, recomputed=options.checkpointing) - model_flops
    if options.weights == "nf4":
        model_flops *= 2 / 3
    hardware_flops = model_flops + again
    rate = spread([1 / s for s in counted])
    rows = [
        ["steps a second", rate.text(4)],
        [f"the bar ({BAR} at llama-3.1-8b), times", spread([1 / s / BAR for s in counted]).text(2)],
        ["useful tokens a second", spread([useful_tokens(triples) / s for s in counted]).text(0)],
        [f"{mode} matrix-product peak, TFLOP/s", f"{peak / 1e12:,.2f}"],
        ["model FLOPs, share of it", spread([model_flops / s / peak for s in counted]).text(3)],
        [
            "hardware FLOPs, share of it",
            spread([hardware_flops / s / peak for s in counted]).text(3),
        ],
    ]
    memory = None
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device)
        rows.append(["peak memory, GiB", f"{memory / 2**30:,.1f}"])
    title = (
        f"{shape.title(options.size)}, {device}, {precision_of(options)}, {options.weights} "
        f"weights: {options.batch} triples a step; median [range] of {len(counted)} steps"
    )
    print_table(title, ["", "measured"], rows)
    results = {
        "step_seconds": training.step_seconds,
        "steps_per_second": rate._asdict(),
        "bar": BAR,
        "useful_tokens_per_step": useful_tokens(triples),
        "model_flops_per_step": model_flops,
        "hardware_flops_per_step": hardware_flops,
        "matmul_peak_flops": peak,
        "peak_bytes": memory,
    }
    write_json(options, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
