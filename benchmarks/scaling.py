"""How the cost of a triple grows with prompts, team size, vocabulary and length; ours only.

One thing is changed at a time. SCORE is what an iteration with a full history adds to the log-prob
store: the newest player scores all targets and responses, each older one the newest responses.
The floor is arithmetic: FLOPs (flops.py) over the matrix-product peak, measured in turn with the
rest. It counts prompts once for all responses in scoring, and once a triple in training.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import matmul
import ours
import torch
from common import interleaved, parse, parser, precision_of, print_table, ratios, spread, write_json
from contender import PAPER_OBJECTIVE, Settings, synchronize
from flops import Row, forward_flops, shared_rows, training_flops
from step_table import Timing
from transformers import PreTrainedModel
from workload import Shape, Triple, make_model, make_triples, random_logps, shape_named

from tpaw.data.token_ids import TokenSequence


@dataclass
class Point:
    """One workload of the sweep; its model and triples are made once."""

    shape: Shape
    prompts: int
    team: int
    length_scale: float
    seed: int
    device: str
    model: PreTrainedModel = field(init=False)
    triples: list[Triple] = field(init=False)

    def __post_init__(self) -> None:
        self.model = make_model(self.shape, self.seed, self.device)
        self.triples = make_triples(
            self.prompts, self.team, self.shape.vocab, self.seed, self.length_scale
        )

    def scored(self) -> list[TokenSequence]:
        """Sequences, one a forward; older players have the newest one's weights here."""
        from_newest = [
            TokenSequence(t.prompt, t.generated) for t in self.triples if t.opponent == 0
        ]
        return ours.sequences_of(self.triples) + from_newest * (self.team - 1)

    def floor_flops(self) -> float:
        """FLOPs that SCORE and TRAIN need."""
        rows: list[Row] = []
        by_prompt: dict[bytes, list[Triple]] = {}
        for triple in self.triples:
            by_prompt.setdefault(triple.prompt.tobytes(), []).append(triple)
        for group in by_prompt.values():
            responses = [len(group[0].target)] + [len(t.generated) for t in group]
            rows.append((len(group[0].prompt), responses))
            newest = [len(t.generated) for t in group if t.opponent == 0]
            rows += [(len(group[0].prompt), newest)] * (self.team - 1)
        trained = training_flops(self.shape, shared_rows(self.triples))
        return forward_flops(self.shape, rows) + trained


def run(point: Point, batch: int, bf16: bool, work: str) -> Timing:
    """Score and train; "warm-up" does a few triples only."""
    triples, sequences = point.triples, point.scored()
    if work == "warm-up":
        triples, sequences = triples[:2], sequences[:2]
    synchronize(point.model.device)
    began = time.perf_counter()
    ours.score(point.model, sequences, bf16=bf16)
    seconds = time.perf_counter() - began
    logps = random_logps(triples, point.team, point.shape.vocab)
    settings = Settings(batch, PAPER_OBJECTIVE, bf16)
    policy = copy.deepcopy(point.model)
    training = ours.train(policy, triples, logps, settings, **ours.DEFAULT_VARIANT)
    return Timing(seconds, training.seconds)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    options_of = parser(__doc__, size="39m")
    options_of.add_argument("--prompts", type=int, nargs="+", default=[16, 8, 32])
    options_of.add_argument("--teams", type=int, nargs="+", default=[1, 2, 3, 4])
    options_of.add_argument("--vocabs", type=int, nargs="+", default=[32_000, 8_000, 152_000])
    options_of.add_argument("--length-scales", type=float, nargs="+", default=[1.0, 0.5, 2.0])
    options_of.add_argument("--batch", type=int, default=8, help="triples in an optimizer step")
    options_of.epilog = "The first value of each is that of the point that the others differ from."
    options = parse(options_of, argv)
    axes = {
        "prompts": options.prompts,
        "team": options.teams,
        "vocab": options.vocabs,
        "length_scale": options.length_scales,
    }
    base = {name: values[0] for name, values in axes.items()}
    points: dict[str, Point] = {}
    for axis, values in axes.items():
        for value in values if axis == "prompts" else values[1:]:
            at = base | {axis: value}
            points[f"{axis.replace('_', ' ')} {value:g}"] = Point(
                shape_named(options.size, at["vocab"]),
                at["prompts"],
                at["team"],
                at["length_scale"],
                options.seed,
                options.device,
            )
    device = torch.device(options.device)
    mode = "bf16" if options.bf16 else "fp32"
    contenders: dict[str, Callable[[str], Any]] = {
        name: partial(run, point, options.batch, options.bf16) for name, point in points.items()
    }
    contenders["peak"] = lambda work: matmul.peak_flops(
        device, mode, quick=options.size == "tiny" or work == "warm-up"
    )
    found = interleaved(contenders, "all", warm_up="warm-up", repeats=options.repeats)
    peaks = found.pop("peak")
    rows, results = [], {}
    for name, runs in found.items():
        point = points[name]
        count = len(point.triples)
        totals = [timing.total / count for timing in runs]
        floors = [point.floor_flops() / count / peak for peak in peaks]
        row = [name]
        for seconds in ([t.score / count for t in runs], [t.train / count for t in runs]):
            row.append(spread([1000 * s for s in seconds]).text(1))
        row += [spread([1000 * s for s in totals]).text(1), spread(floors).text(1, unit=1e-3)]
        rows.append([*row, ratios(totals, floors).text(2)])
        results[name] = {
            "triples": count,
            "seconds": [timing._asdict() for timing in runs],
            "floor_flops": point.floor_flops(),
        }
    title = (
        f"{options.size}, {device}, {precision_of(options)}; at first {base}; ms a triple; median "
        f"[range] of {options.repeats} interleaved repeats"
    )
    print_table(title, ["", "score", "train", "both", "floor", "both ÷ floor"], rows)
    write_json(options, {"peak_flops": peaks, "points": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
