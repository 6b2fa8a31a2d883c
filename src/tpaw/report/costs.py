"""What a run takes, for the terminal: the output of `tpaw plan --measure`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from tpaw.storage.failures import readable_size

STAGES = ("generate", "critic", "score", "train", "evaluate")


def costs_table(costs: Mapping[str, Mapping[str, float]]) -> Table:
    """Build a table with one line for each checkpoint: what the stages of its iteration take.

    Args:
        costs: names of checkpoints, each with the seconds of its stages.
    """
    table = Table()
    table.add_column("makes")
    stages = [s for s in STAGES if any(seconds.get(s) for seconds in costs.values())]
    for heading in (*stages, "in all"):
        table.add_column(heading, justify="right")
    for name, seconds in costs.items():
        cells = (readable_time(seconds[s]) if seconds.get(s) else "–" for s in stages)
        table.add_row(name, *cells, readable_time(sum(seconds.values())))
    return table


def described_costs(
    costs: Mapping[str, Mapping[str, float]], memory: Mapping[str, Any], price: float | None
) -> Sequence[str]:
    """What the run takes in all, as sentences.

    Args:
        costs: names of checkpoints, each with the seconds of its stages.
        memory: the fields of `pipeline.costs.Memory`.
        price: of one hour of the device.
    """
    seconds = sum(sum(stages.values()) for stages in costs.values())
    hours = seconds / 3600
    paid = "" if price is None else f"; price: {hours * price:.2f}, of {price:g} an hour"
    return (
        f"In all: {readable_time(seconds)}, {hours:.3g} device hours{paid}.",
        f"Peak memory: {readable_size(memory['peak'])} of {readable_size(memory['total'])} on "
        f"{memory['device']}.",
    )


def readable_time(seconds: float) -> str:
    """A duration for people: 1 h 05 min."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"
