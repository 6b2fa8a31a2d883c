"""How far rounding moves log-probs on a device: packed rows, and the first step of an iteration.

Packed rows: log-probs that the package computes are compared with those of each sequence alone,
by the model's own forward in fp32, its own attention, and a softmax in float64. Computed are fp32
and bf16 (autocast); on a GPU, bf16 rows go through FlashAttention's kernel for unequal lengths.

First step: training refuses to begin if the policy's log-probs differ from those that scoring gave
by more than rounding (`first_step_tolerance`, nats per token, averaged over a micro-batch). Both
compute the same sequences in other rows. The table shows that difference, and what is allowed.

    python benchmarks/exactness.py --size 100m
    python benchmarks/exactness.py --size llama-3.1-8b --triples 8     # about 50 GB in bf16
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import ours
import torch
from accelerate.utils import send_to_device
from common import parse, parser, print_table, write_json
from numpy.typing import NDArray
from transformers import PreTrainedModel
from workload import Triple, make_model, make_triples, shape_named

from tpaw.data.token_ids import TokenSequence
from tpaw.logprobs.packing import PACKED_LAYOUT
from tpaw.logprobs.response import response_logps
from tpaw.scoring.score import ScoringModel
from tpaw.training.batching import BatchedTriples, TripleBatchSampler, TripleSizes
from tpaw.training.first_step import FIRST_STEP_TOLERANCE


@torch.inference_mode()
def alone(model: PreTrainedModel, sequences: Sequence[TokenSequence]) -> NDArray[np.float64]:
    """Log-probs of each sequence by itself. Call it before the model is prepared."""
    found = []
    for prompt, response in sequences:
        ids_L = torch.tensor([*prompt, *response], device=model.device)
        logits_LV = model(input_ids=ids_L[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
        labels_R1 = ids_L[len(prompt) :, None].long()
        found.append(float(logits_LV.double().log_softmax(-1).gather(1, labels_R1).sum()))
    return np.array(found)


def first_step(
    scorer: ScoringModel, triples: Sequence[Triple], batch: int, tokens_per_row: int
) -> list[float]:
    """The difference of each micro-batch between scoring and training, in nats per token."""
    model = scorer.model
    pairs = [TokenSequence(t.prompt, y) for t in triples for y in (t.target, t.generated)]
    logps_N2 = ours.score(scorer, pairs, tokens_per_row=tokens_per_row).reshape(-1, 2)
    rows = [
        {
            "prompt_ids": t.prompt,
            "target_ids": t.target,
            "generated_ids": t.generated,
            "player_target_logps": [target],
            "player_generated_logps": [generated],
        }
        for t, (target, generated) in zip(triples, logps_N2, strict=True)
    ]
    model.train()
    differences = [
        micro_batch_difference(scorer, micro_batch)
        for micro_batch in micro_batches(rows, scorer, batch, tokens_per_row)
    ]
    model.eval()
    return differences


def micro_batches(
    rows: list[dict[str, Any]], scorer: ScoringModel, batch: int, tokens_per_row: int
) -> Iterator[Any]:
    """As training divides an epoch."""
    sampler = TripleBatchSampler(
        TripleSizes(rows),
        scorer.layout,
        triples_per_batch=batch,
        tokens_per_row=tokens_per_row,
        group_by_prompt=False,
        seed=0,
    )
    dataset = BatchedTriples(rows, scorer.layout)
    for part in sampler:
        yield from dataset.__getitems__(part)["micro_batches"]


@torch.no_grad()
def micro_batch_difference(scorer: ScoringModel, micro_batch: Any) -> float:
    """Mean |log π_θ − log π_0| per token."""
    inputs = send_to_device(micro_batch, next(scorer.model.parameters()).device)
    with scorer.precision.autocast():
        target_B, generated_B = response_logps(scorer.model, inputs["packed"]).chunk(2)
    total = (target_B - inputs["player_target_logps_BK"][:, 0]).abs().sum()
    total = total + (generated_B - inputs["player_generated_logps_BK"][:, 0]).abs().sum()
    tokens = inputs["target_tokens_B"].sum() + inputs["generated_tokens_B"].sum()
    return float(total / tokens)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; `--repeats` and `--bf16` have no meaning here, both precisions run."""
    options_of = parser(__doc__)
    options_of.add_argument("--triples", type=int, default=32)
    options_of.add_argument("--batch", type=int, default=16, help="triples in an optimizer step")
    options_of.add_argument("--length-scale", type=float, default=1.0)
    options_of.add_argument("--tokens-per-row", type=int, default=8192)
    options = parse(options_of, argv)
    shape = shape_named(options.size)
    device = torch.device(options.device)
    model = make_model(shape, options.seed, device, torch.float32)
    triples = make_triples(options.triples, 1, shape.vocab, options.seed, options.length_scale)
    sequences = ours.sequences_of(triples)
    tokens = np.array([len(response) for _, response in sequences])
    expected = alone(model, sequences)
    rows, results = [], {}
    for precision in ("fp32", "bf16"):
        scorer = ours.prepared(model, precision == "bf16")
        found = ours.score(scorer, sequences, tokens_per_row=options.tokens_per_row)
        by_token = np.abs(found - expected) / tokens
        steps = first_step(scorer, triples, options.batch, options.tokens_per_row)
        results[precision] = {
            "is_packed": scorer.layout is PACKED_LAYOUT,
            "per_token": by_token.tolist(),
            "first_step": steps,
            "first_step_allowed": FIRST_STEP_TOLERANCE[precision],
        }
        rows.append(
            [
                precision,
                "packed" if scorer.layout is PACKED_LAYOUT else "one sequence per row",
                f"{by_token.mean():.1e}",
                f"{by_token.max():.1e}",
                f"{max(steps):.1e}",
                f"{FIRST_STEP_TOLERANCE[precision]:.0e}",
            ]
        )
    title = (
        f"{shape.title(options.size)}, {device}: {len(sequences)} sequences of "
        f"{tokens.mean():.0f} response tokens; |difference| of log-probs in nats per token"
    )
    headings = ["", "rows", "to one alone, mean", "largest", "first step, largest", "allowed"]
    print_table(title, headings, rows)
    write_json(options, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
