"""Accuracy on two parts of the starter's held-out problems: known patterns and new ones.

    python benchmarks/heldout_parts.py studies/methods [--json FILE]

A problem has a known pattern if it differs from one of the 8,000 problems that the starter's model
was trained on in names and other words only (`tpaw.starter.problems.pattern`). The runs of the
study must be on the starter, evaluated on `tpaw://starter/heldout.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from common import print_table

from tpaw.evaluation.items import read_items
from tpaw.starter.build import SFT_ROWS, STARTER_DIR
from tpaw.starter.problems import generate_problems, pattern
from tpaw.storage.artifacts import is_published
from tpaw.storage.run_directory import RunDirectory


def main(argv: Sequence[str] | None = None) -> int:
    """Read the runs of the study, and print the accuracy of their first and last checkpoints."""
    options_of = argparse.ArgumentParser(description=__doc__)
    options_of.add_argument("study", type=Path)
    options_of.add_argument("--json", type=Path, help="also write the accuracy of every run")
    options = options_of.parse_args(argv)
    is_new = _whether_new()
    rows, found = [], {}
    for condition in sorted((options.study / "runs").iterdir()):
        runs = [RunDirectory(folder) for folder in sorted(condition.iterdir())]
        last = runs[0].load_config().iterations
        runs = [run for run in runs if is_published(run.evaluation(last))]
        if not runs:
            continue
        found[condition.name] = {
            part: {
                f"θ_{i}": [_accuracy(run, i, is_new, part == "new") for run in runs]
                for i in (0, last)
            }
            for part in ("known", "new")
        }
        cells = [
            _shown(values) for part in found[condition.name].values() for values in part.values()
        ]
        rows.append([condition.name, str(len(runs)), *cells])
    counts = {"known": is_new.count(False), "new": is_new.count(True)}
    headings = [
        f"{part}, {count} problems: {at}" for part, count in counts.items() for at in ("θ_0", "θ_T")
    ]
    print_table("accuracy, mean over seeds ± SD", ["condition", "seeds", *headings], rows)
    if options.json:
        options.json.write_text(
            json.dumps({"problems": counts, "accuracy": found}, indent=1) + "\n"
        )
    return 0


def _whether_new() -> list[bool]:
    """Whether each held-out problem has a new pattern, in the order of the file."""
    known = {pattern(problem.question) for problem in generate_problems(SFT_ROWS, seed=0)}
    lines = (STARTER_DIR / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    return [pattern(json.loads(line)["question"]) not in known for line in lines]


def _accuracy(run: RunDirectory, i: int, is_new: Sequence[bool], new: bool) -> float:
    items = read_items(run.evaluation(i) / "exact_match.jsonl")  # in the order of the file
    correct = [
        bool(item["correct"]) for item, of_new in zip(items, is_new, strict=True) if of_new == new
    ]
    return sum(correct) / len(correct)


def _shown(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


if __name__ == "__main__":
    sys.exit(main())
