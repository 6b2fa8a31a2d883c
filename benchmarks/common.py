"""Interleaved repeats, their spread, tables, JSON, and facts about the machine."""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from workload import SHAPES

Work = TypeVar("Work")
Result = TypeVar("Result")

RESULTS = Path(__file__).parent / "results"

# TRL and transformers warn about each other's renamed settings.
warnings.filterwarnings("ignore", category=FutureWarning)


class Spread(NamedTuple):
    """Median and range of repeats."""

    median: float
    low: float
    high: float

    def text(self, digits: int = 2, unit: float = 1.0) -> str:
        """Median, and the range in brackets unless there is only one value."""
        median, low, high = (f"{value / unit:,.{digits}f}" for value in self)
        return median if self.low == self.high else f"{median} [{low}–{high}]"


def spread(values: Sequence[float]) -> Spread:
    """Median and range."""
    return Spread(statistics.median(values), min(values), max(values))


def ratios(above: Sequence[float], below: Sequence[float]) -> Spread:
    """Median and range of the ratio within each repeat, when both ran minutes apart at most."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


def interleaved(
    contenders: Mapping[str, Callable[[Work], Result]],
    work: Work,
    *,
    warm_up: Work,
    repeats: int,
) -> dict[str, list[Result]]:
    """Run all contenders in turn, `repeats` times, after each has done `warm_up` once.

    The order rotates, so that none always runs after the same other one. Ctrl-C ends it after the
    repeats that are whole.
    """
    names = list(contenders)
    results: dict[str, list[Result]] = {name: [] for name in names}
    # Collecting what finished contenders leave behind need not look at all imported modules.
    gc.collect()
    gc.freeze()
    for name in names:
        contenders[name](warm_up)
        _tidy()
    try:
        for repeat in range(repeats):
            turn = repeat % len(names)
            for name in names[turn:] + names[:turn]:
                result = contenders[name](work)
                results[name].append(result)
                _tidy()
                what = f"repeat {repeat + 1} of {repeats}: {name}: {result}"
                print(what, file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        whole = min(map(len, results.values()))
        if not whole:
            raise
        results = {name: runs[:whole] for name, runs in results.items()}
    gc.unfreeze()
    return results


def parser(description: str | None, *, size: str = "100m") -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    name = Path(sys.argv[0]).stem or "benchmark"
    parser.add_argument("--size", choices=SHAPES, default=size, help="the model's shape")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true", help="autocast; weights stay fp32")
    parser.add_argument("--threads", type=int, help="torch's threads; its own choice otherwise")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=RESULTS / f"{name}.json")
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse, and set torch's threads."""
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    return options


def print_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on the terminal; the first column is text, the others are numbers."""
    # Brackets hold ranges here, and would be read as markup.
    table = Table(title=escape(title), title_style="", title_justify="left")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")
    for row in rows:
        table.add_row(*map(escape, row))
    # Wide enough for every table, so that a log file holds it whole.
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)


def write_json(options: argparse.Namespace, results: Mapping[str, Any]) -> None:
    """Everything measured, with what it was measured on."""
    chosen = {name: value for name, value in vars(options).items() if name != "json"}
    content = {
        "command": shlex.join(["python", *sys.argv]),
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in chosen.items()},
        "machine": machine(options.device),
        "results": results,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"written to {options.json}")


def machine(device: str) -> dict[str, Any]:
    """Hardware, load, and versions."""
    facts: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "cores_allowed": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "load_average_after": os.getloadavg(),
        "python": platform.python_version(),
        "commit": _commit(),
    }
    for package in ("torch", "transformers", "accelerate"):
        facts[package] = version(package)
    if "trl" in sys.modules:
        facts["trl"] = version("trl")
    if device.startswith("cuda"):
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["gpu_bytes"] = torch.cuda.get_device_properties(device).total_memory
        facts["cuda"] = torch.version.cuda
    return facts


def precision_of(options: argparse.Namespace) -> str:
    """For titles."""
    return "bf16 autocast" if options.bf16 else "fp32"


def _tidy() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str:
    """The commit, with a "+" if the working tree differs from it; empty outside of git."""
    folder = Path(__file__).parent

    def git(*command: str) -> str:
        done = subprocess.run(["git", "-C", folder, *command], capture_output=True, text=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except OSError:
        return ""
