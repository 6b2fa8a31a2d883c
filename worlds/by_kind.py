"""Right responses of a study by the kind of prompt: the first word of a held-out prompt.

python -m worlds.by_kind studies/unequal
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml


def right_by_kind(evaluation: Path, kinds: list[str], name: str) -> dict[str, float]:
    """Share of right responses of each kind.

    Args:
        evaluation: folder of an evaluation.
        kinds: of the held-out rows, in their order.
        name: `exact_match`, or `exact_match_at_1` for temperature 1.
    """
    right: dict[str, list[bool]] = defaultdict(list)
    for line in (evaluation / f"{name}.jsonl").read_text("utf-8").splitlines():
        item = json.loads(line)
        row = int(item["id"].partition("-")[0])
        right[kinds[row]].append(item["correct"])
    return {kind: statistics.fmean(found) for kind, found in sorted(right.items())}


def settings_of(run: Path) -> dict[str, Any]:
    """The configuration of a run."""
    found: dict[str, Any] = yaml.safe_load((run / "config.yaml").read_text("utf-8"))
    return found


def has_ended(run: Path) -> bool:
    """Whether the run's last checkpoint was evaluated; the critic can stop a run before."""
    return (run / "iterations" / str(settings_of(run)["iterations"]) / "evaluation").is_dir()


def of_run(run: Path) -> dict[str, dict[str, float]]:
    """Of θ_0 and of the last checkpoint: shares by kind, greedy and at temperature 1."""
    config = settings_of(run)
    heldout = Path(config["evaluate"]["data"]["path"]).read_text("utf-8").splitlines()
    kinds = [json.loads(line)["prompt"].partition(" ")[0] for line in heldout]
    found: dict[str, dict[str, float]] = {}
    for player, iteration in (("θ_0", 0), ("last", config["iterations"])):
        evaluation = run / "iterations" / str(iteration) / "evaluation"
        greedy = right_by_kind(evaluation, kinds, "exact_match")
        sampled = right_by_kind(evaluation, kinds, "exact_match_at_1")
        found[player] = {f"{kind}, greedy": share for kind, share in greedy.items()} | {
            f"{kind}, T = 1": share for kind, share in sampled.items()
        }
    return found


def mean_of(runs: list[Mapping[str, float]]) -> str:
    """Mean and standard deviation over seeds of each share."""
    texts = []
    for name in runs[0]:
        values = [run[name] for run in runs]
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        texts.append(f"{name} {statistics.fmean(values):.3f}{spread}")
    return "  ".join(texts)


def main() -> None:
    """Print a line for θ_0 and for each condition."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", type=Path, help="folder of a study")
    folder = parser.parse_args().study / "runs"
    conditions: dict[str, list[dict[str, dict[str, float]]]] = {}
    for run in sorted(folder.glob("*/seed-*")):
        if has_ended(run):
            conditions.setdefault(run.parent.name, []).append(of_run(run))
        else:
            print(f"left out, not all iterations: {run.parent.name}, {run.name}")
    print("θ_0:", mean_of([run["θ_0"] for run in next(iter(conditions.values()))]))
    for name, runs in conditions.items():
        print(f"{name}:", mean_of([run["last"] for run in runs]))


if __name__ == "__main__":
    main()
