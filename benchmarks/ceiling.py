"""What share of the machine's matrix-product peak our scoring and training reach.

The peak is the fastest of a few square products, measured in turn with the rest. FLOPs are counted
by the formula in flops.py over the tokens that go through the model, without padding:
    forward  = 2 · layers' weights · tokens + 4 · layers · hidden · visible keys
               + 2 · hidden · vocabulary · response tokens
    training = 3 · forward (model FLOPs); --checkpointing adds the layers' forward (hardware FLOPs)
"computed" counts what is computed, prompts as often as they are. "needed" counts each triple's
prompt once, which is the least that the objective needs: what lies between the two is waste.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import matmul
import ours
import torch
from common import interleaved, parse, parser, precision_of, print_table, ratios, spread, write_json
from contender import PAPER_OBJECTIVE, Settings, synchronize
from flops import forward_flops, shared_rows, training_flops
from transformers import PreTrainedModel
from workload import Triple, make_model, make_triples, random_logps, shape_named


def seconds_of_scoring(model: PreTrainedModel, bf16: bool, work: Sequence[Triple]) -> float:
    """Of both sequences of each triple."""
    sequences = ours.sequences_of(work)
    synchronize(model.device)
    began = time.perf_counter()
    ours.score(model, sequences, bf16=bf16)
    return time.perf_counter() - began


def seconds_of_training(
    model: PreTrainedModel, settings: Settings, work: Sequence[Triple]
) -> float:
    """Of one epoch, the optimizer included."""
    logps = random_logps(work, 1, model.config.vocab_size)
    policy = copy.deepcopy(model)
    return ours.train(policy, work, logps, settings, **ours.DEFAULT_VARIANT).seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    options_of = parser(__doc__)
    options_of.add_argument("--triples", type=int, default=16)
    options_of.add_argument("--batch", type=int, default=8, help="triples in an optimizer step")
    options_of.add_argument("--length-scale", type=float, default=1.0)
    options_of.add_argument("--checkpointing", action="store_true")
    options = parse(options_of, argv)
    shape = shape_named(options.size)
    device = torch.device(options.device)
    model = make_model(shape, options.seed, device)
    triples = make_triples(options.triples, 1, shape.vocab, options.seed, options.length_scale)
    settings = Settings(
        options.batch, PAPER_OBJECTIVE, options.bf16, checkpointing=options.checkpointing
    )
    quick = options.size == "tiny"

    def peak(mode: str, work: Sequence[Triple]) -> float:
        return matmul.peak_flops(device, mode, quick=quick)

    contenders: dict[str, Callable[[Sequence[Triple]], float]] = {
        f"matrix product, {mode}": partial(peak, mode) for mode in matmul.modes(device)
    }
    contenders["score"] = partial(seconds_of_scoring, model, options.bf16)
    contenders["train"] = partial(seconds_of_training, model, settings)
    found = interleaved(
        contenders, triples, warm_up=triples[: options.batch], repeats=options.repeats
    )
    own_mode = "bf16" if options.bf16 else "fp32"
    if own_mode == "fp32" and torch.get_float32_matmul_precision() != "highest":
        own_mode = "TF32"
    peaks = found[f"matrix product, {own_mode}"]
    flops = {
        "score": {
            "computed": forward_flops(shape, ours.scored_rows(ours.sequences_of(triples))),
            "needed": forward_flops(shape, shared_rows(triples)),
        },
        "train": {
            "computed": training_flops(shape, ours.trained_rows(triples)),
            "needed": training_flops(shape, shared_rows(triples)),
        },
    }
    if options.checkpointing:
        flops["train"]["hardware"] = training_flops(
            shape, ours.trained_rows(triples), recomputed=True
        )
    rows = [
        [name, spread(values).text(3, unit=1e12), "–"]
        for name, values in found.items()
        if name.startswith("matrix")
    ]
    rows += list(share_rows(found, flops, peaks))
    title = (
        f"{shape.title(options.size)}, {device}, {precision_of(options)}, "
        f"{torch.get_num_threads()} threads: {len(triples)} triples, batch {options.batch}; "
        f"median [range] of {options.repeats} interleaved repeats"
    )
    print_table(title, ["", "TFLOP/s", f"share of the {own_mode} peak"], rows)
    write_json(options, {"flops": flops, "measured": found})
    return 0


def share_rows(
    found: Mapping[str, Sequence[float]],
    flops: Mapping[str, Mapping[str, float]],
    peaks: Sequence[float],
) -> list[list[str]]:
    """A row for each way of counting the FLOPs of scoring and training."""
    rows = []
    for phase, counts in flops.items():
        for kind, count in counts.items():
            rates = [count / seconds for seconds in found[phase]]
            share = ratios(rates, peaks)
            rows.append([f"{phase}, FLOPs {kind}", spread(rates).text(3, unit=1e12), share.text(3)])
    return rows


if __name__ == "__main__":
    sys.exit(main())
