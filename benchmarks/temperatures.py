"""What a lower temperature gives, beside what training gives: right and different right responses.

    python benchmarks/temperatures.py STUDY [--only CONDITION ...] [--json FILE]

STUDY is the folder of a study whose responses can be checked and whose checkpoints have their
weights. Of each run, the newest checkpoint answers every held-out prompt four times at each
temperature, and so does θ_0 once for each seed. A method gains something over decoding only if it
has more right responses, or more different right ones, than SFT has at its best temperature.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from common import print_table

from tpaw.data.inputs import load_inputs
from tpaw.evaluation.checker import checker_of
from tpaw.evaluation.heldout import exact_match_items, several_samples_results
from tpaw.generation.generator import SamplingParams
from tpaw.models.references import checkpoint_of, find_checkpoints
from tpaw.pipeline.players import LoadedPlayers
from tpaw.runtime.progress import ignore
from tpaw.storage.run_directory import RunDirectory

TEMPERATURES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
SAMPLES = 4
# For each temperature, the share of right responses and the number of different right ones.
Curve = dict[str, tuple[float, float]]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every run of a study, and print the means over seeds."""
    options_of = argparse.ArgumentParser(description=__doc__)
    options_of.add_argument("study", type=Path)
    options_of.add_argument("--only", nargs="+", help="folders of conditions; default: all")
    options_of.add_argument("--json", type=Path, help="also write the numbers of every run")
    options = options_of.parse_args(argv)
    found: dict[str, dict[str, Curve]] = {}
    folders = sorted(path for path in (options.study / "runs").iterdir() if path.is_dir())
    for folder in folders:
        if options.only and folder.name not in options.only:
            continue
        for root in sorted(folder.glob("seed-*")):
            run = RunDirectory(root)
            newest = find_checkpoints(str(root))[-1].player.index
            found.setdefault(folder.name, {})[root.name] = curve(run, newest)
            if root.name not in found.setdefault("θ_0", {}):
                found["θ_0"][root.name] = curve(run, 0)
    for place, title in enumerate(
        ("share of right responses", f"different right ones of {SAMPLES}")
    ):
        rows = [
            [name, *(_mean(curves.values(), f"{t:g}", place) for t in TEMPERATURES)]
            for name, curves in found.items()
        ]
        print_table(f"{title}, mean over seeds", ["T", *map(str, TEMPERATURES)], rows)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return 0


def curve(run: RunDirectory, i: int) -> Curve:
    """The results of θ_i of a run, by temperature."""
    config = run.load_config()
    inputs = load_inputs(run.inputs, config)
    checker = checker_of(config.checker)
    player = checkpoint_of(run, i, trust=False).player
    params = SamplingParams.of(config.generate, config.max_length, inputs.stop_ids)
    prompts = list(inputs.heldout.prompt_ids)
    found = {}
    with LoadedPlayers(config).open_generator(player, config.generate) as generator:
        for temperature in TEMPERATURES:
            asked = params.greedy(config.evaluate.max_new_tokens)._replace(temperature=temperature)
            completions = generator.generate(
                prompts * SAMPLES, asked, seed=config.seed, on_done=ignore
            )
            items = exact_match_items(
                list(inputs.heldout) * SAMPLES,
                completions,
                lambda ids: str(inputs.tokenizer.decode(ids.tolist(), skip_special_tokens=True)),
                checker,
            )
            results = several_samples_results(
                [items[row :: len(prompts)] for row in range(len(prompts))]
            )
            found[f"{temperature:g}"] = (results["accuracy"], results["distinct_correct"])
    return found


def _mean(curves: Iterable[Curve], temperature: str, place: int) -> str:
    return f"{statistics.fmean(found[temperature][place] for found in curves):.3f}"


if __name__ == "__main__":
    sys.exit(main())
