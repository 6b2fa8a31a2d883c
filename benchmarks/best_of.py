"""What choosing one of k responses gives without training: by the critic, by log-prob, by majority.

    python benchmarks/best_of.py studies/walks/runs/critic/seed-* [--json FILE]

For the runs of method critic whose responses can be checked, and whose checkpoints have their
weights. A choice is among the whole responses to a training prompt; prompts that have none are left
out. `any` is what a true checker would find. The critic has seen most of these prompts; the share
on those that it has not seen is a row of its own, from the run's own results.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from common import print_table
from numpy.typing import NDArray

from tpaw.critic.selection import are_whole, judged, read_scores
from tpaw.data.inputs import load_inputs
from tpaw.data.token_ids import TokenSequence
from tpaw.evaluation.checker import checker_of
from tpaw.generation.responses import read_responses
from tpaw.models.references import find_checkpoint
from tpaw.pipeline.players import LoadedPlayers
from tpaw.scoring.score import score_sequences
from tpaw.storage.artifacts import is_published
from tpaw.storage.run_directory import RunDirectory

ON_UNSEEN_PROMPTS = "critic, prompts that it has not seen"
Scores = NDArray[np.float64]  # of shape (samples, prompts)


def main(argv: Sequence[str] | None = None) -> int:
    """Read the runs, and print how often what each arm chooses is right."""
    options_of = argparse.ArgumentParser(description=__doc__)
    options_of.add_argument("runs", nargs="+")
    options_of.add_argument("--json", type=Path, help="also write the share of every run")
    options = options_of.parse_args(argv)
    found: dict[str, dict[str, list[float]]] = {}
    for root in options.runs:
        run = RunDirectory(root)
        for t in range(run.load_config().iterations):
            if is_published(run.iteration(t).critic):
                of_arms = found.setdefault(f"responses of θ_{t}", {})
                for arm, share in shares(run, t).items():
                    of_arms.setdefault(arm, []).append(share)
    arms = list(dict.fromkeys(arm for of_arms in found.values() for arm in of_arms))
    rows = [[arm, *(_shown(of_arms[arm]) for of_arms in found.values())] for arm in arms]
    print_table("share of right responses, mean over runs ± SD", ["chosen by", *found], rows)
    if options.json:
        options.json.write_text(json.dumps({"runs": options.runs, "share": found}, indent=1) + "\n")
    return 0


def shares(run: RunDirectory, t: int) -> dict[str, float]:
    """The share of right responses of θ_t by what chooses among them."""
    config = run.load_config()
    examples = load_inputs(run.inputs, config).examples
    parts = read_responses(run.iteration(t).responses).in_parts_of(len(examples))
    checker = checker_of(config.checker)
    right = np.array(
        [
            [checker.is_right(e, text) for e, text in zip(examples, part.texts, strict=True)]
            for part in parts
        ]
    )
    is_whole = are_whole(parts)
    lengths = np.array([[len(ids) for ids in part.token_ids] for part in parts])
    sequences = [
        TokenSequence(example.prompt_ids, ids)
        for part in parts
        for example, ids in zip(examples, part.token_ids, strict=True)
    ]
    player = find_checkpoint(f"{run.root}@{t}").player
    scorer = LoadedPlayers(config).for_scoring(player)
    tokens = config.score.tokens_per_row
    own_logps = score_sequences(scorer, sequences, tokens_per_row=tokens).reshape(right.shape)
    critic = judged(read_scores(run.iteration(t).critic), config.critic.agree).reshape(right.shape)
    results = json.loads((run.iteration(t).critic / "results.json").read_text(encoding="utf-8"))
    kept = np.asarray(is_whole.any(axis=0))
    arms: Mapping[str, Scores] = {
        "majority": votes([list(part.texts) for part in parts]),
        "own log-prob": own_logps,
        "own log-prob per token": own_logps / lengths,
        "critic": critic,
        "any": right.astype(float),
    }
    return {
        "nothing: every response": float(right[:, kept].mean()),
        **{arm: _share(scores, right, is_whole, kept) for arm, scores in arms.items()},
        ON_UNSEEN_PROMPTS: results["best_right_share_heldout"],
    }


def votes(texts: Sequence[Sequence[str]]) -> Scores:
    """How many responses to the prompt have the same text, of shape (samples, prompts)."""
    counts = [Counter(of_prompt) for of_prompt in zip(*texts, strict=True)]
    return np.array([[float(c[text]) for c, text in zip(counts, p, strict=True)] for p in texts])


def _share(
    scores: Scores, right: NDArray[np.bool_], is_whole: NDArray[np.bool_], kept: NDArray[np.bool_]
) -> float:
    """The mean over prompts; the mean of all that are best where several are."""
    allowed = np.where(is_whole, scores, -math.inf)[:, kept]
    best = allowed == allowed.max(axis=0)
    return float(((right[:, kept] & best).sum(axis=0) / best.sum(axis=0)).mean())


def _shown(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


if __name__ == "__main__":
    sys.exit(main())
