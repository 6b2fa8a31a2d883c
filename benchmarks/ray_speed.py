"""Two workers of one thread against one: generation and scoring by Ray, and the overhead of Ray.

Players are loaded before the clock starts, by as many small shards as there are workers. Then the
same shards are done by one worker and by two, in turn. `--starter` runs the whole starter by Ray
with one worker and in one process of one thread, and prints the difference in seconds.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common import RESULTS, Spread, print_table, ratios, spread, write_json

from tpaw.config.schema import RunConfig
from tpaw.data.inputs import Inputs, publish_inputs
from tpaw.data.token_ids import TokenSequence
from tpaw.generation.generator import SamplingParams
from tpaw.models.initial import initial_player
from tpaw.pipeline.preflight import read_inputs
from tpaw.pipeline.ray_cluster import connected
from tpaw.pipeline.ray_engine import RayEngine
from tpaw.pipeline.worker import AnswerTask, LogpsTask, Prompts, Sequences
from tpaw.runtime.interrupt import StopSignal
from tpaw.storage.run_directory import open_run

SHARDS = 16
# Scoring is fast, so each target is scored so often.
TIMES = 8


def shards_of(items: list[Any], kind: Any) -> list[Any]:
    """Equal parts with a mixture of lengths, so that the parts take about the same time."""
    size = len(items) // SHARDS
    return [kind(first, items[first : first + size]) for first in range(0, SHARDS * size, size)]


def seconds_of(engine: RayEngine, task: Any, warm: Iterable[Any], shards: list[Any]) -> float:
    """Time of all shards, after every worker has loaded its player."""
    for _ in engine.do(task, warm, lambda n: None):
        pass
    began = time.monotonic()
    for _ in engine.do(task, shards, lambda n: None):
        pass
    return time.monotonic() - began


def measure(rows: int, repeats: int) -> dict[str, Any]:
    """Generate and score so many rows of the starter with one worker and with two."""
    found: dict[str, dict[int, list[float]]] = {
        "generate": {1: [], 2: []},
        "score": {1: [], 2: []},
    }
    with tempfile.TemporaryDirectory() as name:
        base = {"data.limit": rows, "launch.engine": "ray"}
        config = starter(base | {"launch.workers": 2})
        inputs: Inputs = read_inputs(config)
        params = SamplingParams.of(config.generate, config.max_length, inputs.stop_ids)
        examples = inputs.examples[:]
        prompts = shards_of([example.prompt_ids for example in examples], Prompts)
        sequences = shards_of(
            [TokenSequence(example.prompt_ids, example.target_ids) for example in examples] * TIMES,
            Sequences,
        )
        with connected(config), open_run(Path(name) / "run", config) as run:
            publish_inputs(run.inputs, inputs)
            player = initial_player(config.model, run.initial_player_file, may_record=True)
            for _ in range(repeats):
                for workers in (1, 2):
                    engine = RayEngine(
                        starter(base | {"launch.workers": workers}), run, StopSignal()
                    )
                    for title, task, shards in (
                        ("generate", AnswerTask(player, params, 0), prompts),
                        ("score", LogpsTask(player), sequences),
                    ):
                        warm = [shard._replace(**small(shard)) for shard in shards[:2]]
                        seconds = seconds_of(engine, task, warm, shards)
                        found[title][workers].append(seconds)
                        print(f"{title}, {workers} workers: {seconds:.1f} s", flush=True)
                    engine.release()
    return {
        title: {
            "seconds": {str(n): spread(times[n])._asdict() for n in times},
            "speedup": ratios(times[1], times[2])._asdict(),
        }
        for title, times in found.items()
    }


def small(shard: Any) -> dict[str, Any]:
    """The fields of a shard of two rows, to load the player."""
    return {field: getattr(shard, field)[:2] for field in shard._fields if field != "first"}


def starter(changes: dict[str, Any]) -> RunConfig:
    """The starter with a few settings."""
    nested: dict[str, Any] = {}
    for path, value in changes.items():
        section, _, key = path.partition(".")
        nested.setdefault(section, {})[key] = value
    return RunConfig.load("starter", nested)


def overhead() -> dict[str, float]:
    """Seconds of the whole starter in one process, and by Ray with one worker."""
    seconds = {}
    for title, settings in (
        ("in_process", []),
        ("ray", ["--set", "launch.engine=ray", "--set", "launch.workers=1"]),
    ):
        with tempfile.TemporaryDirectory() as name:
            began = time.monotonic()
            subprocess.run(
                [sys.executable, "-m", "tpaw", "run", "starter", *settings, "-o", f"{name}/run"],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                check=True,
                capture_output=True,
            )
            seconds[title] = time.monotonic() - began
            print(f"starter, {title}: {seconds[title]:.0f} s", flush=True)
    return seconds


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--starter", action="store_true", help="measure the overhead as well")
    parser.add_argument("--json", type=Path, default=RESULTS / "ray_speed.json")
    parser.set_defaults(device="cpu")
    options = parser.parse_args()
    results = measure(options.rows, options.repeats)
    rows = [
        [
            title,
            *(Spread(**facts["seconds"][n]).text(1) for n in ("1", "2")),
            Spread(**facts["speedup"]).text(2),
        ]
        for title, facts in results.items()
    ]
    print_table("seconds", ["", "1 worker", "2 workers", "ratio"], rows)
    if options.starter:
        results["starter"] = overhead()
        difference = results["starter"]["ray"] - results["starter"]["in_process"]
        print(f"Overhead of Ray for the starter: {difference:.0f} s")
    write_json(options, results)


if __name__ == "__main__":
    main()
