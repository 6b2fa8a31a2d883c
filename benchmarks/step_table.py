"""The table of a comparison of SCORE and TRAIN."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from common import print_table, ratios, spread


class Timing(NamedTuple):
    """Seconds of scoring and training the whole workload once."""

    score: float
    train: float

    @property
    def total(self) -> float:
        """Both."""
        return self.score + self.train


class Peak(NamedTuple):
    """Bytes above the loaded models: of scoring alone, and of scoring and training."""

    score: int
    total: int


def best_of_each(timings: Mapping[str, Sequence[Timing]], prefix: str) -> list[Timing]:
    """A contender at its best: the settings with the lowest median score, and train, time."""
    own = [runs for name, runs in timings.items() if name.startswith(prefix)]
    score = min(own, key=lambda runs: spread([run.score for run in runs]).median)
    train = min(own, key=lambda runs: spread([run.train for run in runs]).median)
    return [Timing(s.score, t.train) for s, t in zip(score, train, strict=True)]


def print_timings(
    title: str,
    timings: Mapping[str, Sequence[Timing]],
    peaks: Mapping[str, Peak],
    reference: str,
    triples: int,
    tokens: int,
) -> None:
    """A row a contender; the last ratios say how much longer it takes than `reference`.

    Args:
        timings: empty if only memory was measured.
    """
    rows = []
    for name in timings or peaks:
        row = [name] + ["–"] * 5
        if timings:
            runs = timings[name]
            totals = [run.total for run in runs]
            seconds = [[r.score for r in runs], [r.train for r in runs], totals]
            row[1:4] = [spread([1000 * s / triples for s in part]).text(1) for part in seconds]
            row[4] = spread([tokens / s for s in totals]).text(0)
            row[5] = ratios(totals, [run.total for run in timings[reference]]).text(2)
        peak = peaks.get(name)
        row += [f"{b / 2**20:,.0f}" for b in peak] if peak else ["–", "–"]
        rows.append(row)
    headings = ["", "score ms/triple", "train ms/triple", "both ms/triple", "useful tokens/s"]
    headings += ["time ÷ ours", "score peak MiB", "both peak MiB"]
    print_table(title, headings, rows)


def as_json(
    timings: Mapping[str, Sequence[Timing]], peaks: Mapping[str, Peak], reference: str
) -> dict[str, Any]:
    """All single timings, and what the table shows."""
    if not timings:
        return {name: {"peak_bytes": peak._asdict()} for name, peak in peaks.items()}
    ours = [run.total for run in timings[reference]]
    return {
        name: {
            "seconds": [run._asdict() for run in runs],
            "total": spread([run.total for run in runs])._asdict(),
            "time_over_ours": ratios([run.total for run in runs], ours)._asdict(),
            "peak_bytes": peaks[name]._asdict() if name in peaks else None,
        }
        for name, runs in timings.items()
    }
