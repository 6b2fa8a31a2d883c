"""Held-out evaluation of one checkpoint: greedy exact match, and log-probs for any data.

The log-prob side needs no checkable answer. With y the held-out target and y_0 what θ_0 answered
to the same prompt (sampled once, then fixed), it reports, in nats and without λ:

- gap: log π_θ(y) − log π_θ(y_0), how much likelier the target is than the SFT model's own answer;
- margin: how much the gap has grown since θ_0, which is the margin [6] against θ_0 over λ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tpaw.data.examples import Example
from tpaw.data.token_ids import TokenIds
from tpaw.evaluation.exact_match import extract_answer, is_correct
from tpaw.evaluation.items import Item
from tpaw.generation.generator import Completion
from tpaw.statistics.over_items import mcnemar, wilson_interval


def exact_match_items(
    examples: Sequence[Example],
    completions: Sequence[Completion],
    decode: Callable[[TokenIds], str],
) -> list[Item]:
    """Per-item outcomes, in the order of the examples."""
    items = []
    for example, completion in zip(examples, completions, strict=True):
        text = decode(completion.token_ids)
        items.append(
            {
                "id": example.id,
                "completion": text,
                "finish_reason": completion.finish_reason,
                "answer": extract_answer(text),
                "expected": extract_answer(example.target),
                "correct": is_correct(text, example.target),
            }
        )
    return items


def exact_match_results(items: Sequence[Item], start: Sequence[Item]) -> dict[str, Any]:
    """Accuracy with its 95 % Wilson interval, and exact McNemar against θ_0 on the same items."""
    correct = [item["correct"] for item in items]
    test = mcnemar([item["correct"] for item in start], correct)
    return {
        "items": len(items),
        "correct": sum(correct),
        "accuracy": sum(correct) / len(items),
        "interval_95": list(wilson_interval(sum(correct), len(items))),
        "no_answer": sum(item["answer"] is None for item in items),
        "truncated": sum(item["finish_reason"] == "length" for item in items),
        "versus_start": test._asdict(),
    }


def logp_items(
    examples: Sequence[Example],
    target_logps: NDArray[np.float64],
    initial_answer_logps: NDArray[np.float64],
) -> list[Item]:
    """Per-item log-probs of the target and of θ_0's answer under the checkpoint."""
    rows = zip(examples, target_logps.tolist(), initial_answer_logps.tolist(), strict=True)
    return [
        {
            "id": example.id,
            "target_logp": target,
            "target_tokens": len(example.target_ids),
            "initial_answer_logp": initial,
        }
        for example, target, initial in rows
    ]


def logp_results(items: Sequence[Item], start: Sequence[Item]) -> dict[str, float]:
    """Means over the items; see the module's text for gap and margin."""
    target = np.array([item["target_logp"] for item in items])
    gap = target - np.array([item["initial_answer_logp"] for item in items])
    start_gap = np.array([item["target_logp"] - item["initial_answer_logp"] for item in start])
    return {
        "target_logp": float(target.mean()),
        "target_logp_per_token": float(target.sum() / sum(i["target_tokens"] for i in items)),
        "gap": float(gap.mean()),
        "margin": float((gap - start_gap).mean()),
        "nonpositive_gap_share": float((gap <= 0).mean()),
    }
