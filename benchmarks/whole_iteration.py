"""Iterations t = 0 … 3 of self-play with the log-prob store and without it.

SCORE and TRAIN only; generation is the same for both. At iteration t the newest min(3, t+1) players
are opponents and main players. Without the store each triple is scored under each player anew:
2, 8, 18, 18 N sequences. With it each (player, sequence) is scored once in the run: 2, 4, 6, 6 N.
The store is the package's own, on disk. Epochs are 2, 2, 1, 1; responses are random tokens, one
set a player.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import ours
from common import interleaved, parse, parser, precision_of, print_table, ratios, spread, write_json
from contender import PAPER_OBJECTIVE, Settings, synchronize
from transformers import PreTrainedModel
from workload import LogpsPair, Triple, make_model, make_triples, shape_named

from tpaw.data.token_ids import TokenSequence
from tpaw.scoring.store import LogprobStore

EPOCHS = (2, 2, 1, 1)
TEAM = 3


class Iteration(NamedTuple):
    """Seconds, and how many sequences went through a player."""

    score: float
    train: float
    sequences: int


def run(
    base: PreTrainedModel, batch: int, bf16: bool, use_store: bool, work: Sequence[Triple]
) -> list[Iteration]:
    """All iterations. In `work`, the opponent of a triple is the player that generated it."""
    players = [copy.deepcopy(base)]
    iterations = []
    with TemporaryDirectory() as folder:
        stores = [ours.open_store(Path(folder) / str(j)) for j in range(len(EPOCHS))]
        for t, epochs in enumerate(EPOCHS):
            team = list(range(t, max(-1, t - TEAM), -1))
            triples = [triple for triple in work if triple.opponent in team]
            synchronize(base.device)
            began = time.perf_counter()
            if use_store:
                logps, count = score_with_store(players, team, stores, triples, t, bf16)
            else:
                logps, count = score_anew([players[j] for j in team], triples, bf16)
            seconds = time.perf_counter() - began
            policy = copy.deepcopy(players[-1])
            settings = Settings(batch, PAPER_OBJECTIVE, bf16, epochs=epochs)
            training = ours.train(policy, triples, logps, settings, **ours.DEFAULT_VARIANT)
            iterations.append(Iteration(seconds, training.seconds, count))
            players.append(policy)
    return iterations


def score_with_store(
    players: Sequence[PreTrainedModel],
    team: Sequence[int],
    stores: Sequence[LogprobStore],
    triples: Sequence[Triple],
    t: int,
    bf16: bool,
) -> tuple[LogpsPair, int]:
    """Compute what the stores lack; the number of sequences computed."""
    sequences = ours.sequences_of(triples)
    stage = f"iteration-{t + 1}"
    count = sum(ours.score_into(stores[j], stage, players[j], sequences, bf16=bf16) for j in team)
    columns = [ours.stored_logps(stores[j], sequences) for j in team]
    return ours.by_triple(triples, sequences, columns), count


def score_anew(
    team: Sequence[PreTrainedModel], triples: Sequence[Triple], bf16: bool
) -> tuple[LogpsPair, int]:
    """Every triple's two sequences under every player; the number of sequences computed."""
    pairs = [
        TokenSequence(t.prompt, response) for t in triples for response in (t.target, t.generated)
    ]
    columns = [ours.score(player, pairs, bf16=bf16) for player in team]
    return ours.by_triple(triples, pairs, columns), len(pairs) * len(team)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    options_of = parser(__doc__, size="39m")
    options_of.add_argument("--prompts", type=int, default=8, help="N")
    options_of.add_argument("--batch", type=int, default=8, help="triples in an optimizer step")
    options_of.add_argument("--length-scale", type=float, default=1.0)
    options = parse(options_of, argv)
    shape = shape_named(options.size)
    base = make_model(shape, options.seed, options.device)
    responses = make_triples(
        options.prompts, len(EPOCHS), shape.vocab, options.seed, options.length_scale
    )
    contenders: dict[str, Callable[[Sequence[Triple]], list[Iteration]]] = {
        "store": partial(run, base, options.batch, options.bf16, True),
        "no store": partial(run, base, options.batch, options.bf16, False),
    }
    # Two prompts with all their responses, so that every iteration has triples.
    warm_up = make_triples(2, len(EPOCHS), shape.vocab, options.seed + 1, options.length_scale)
    results = interleaved(contenders, responses, warm_up=warm_up, repeats=options.repeats)

    rows = []
    for t in [*range(len(EPOCHS)), None]:
        row = ["total" if t is None else f"t = {t}"]
        totals = []
        for runs in results.values():
            parts = [part(run_, t) for run_ in runs]
            row.append(f"{parts[0].sequences / options.prompts:g} N")
            row += [
                spread([p.score for p in parts]).text(1),
                spread([p.train for p in parts]).text(1),
            ]
            totals.append([p.score + p.train for p in parts])
        with_store, without = totals
        rows.append([*row, ratios(without, with_store).text(2)])
    headings = [""]
    for name in results:
        headings += [f"{name}: scored", "score s", "train s"]
    title = (
        f"{shape.title(options.size)}, {options.device}, {precision_of(options)}: N = "
        f"{options.prompts} prompts, epochs {EPOCHS}, batch {options.batch}; median [range] of "
        f"{options.repeats} interleaved repeats"
    )
    print_table(title, [*headings, "both, no store ÷ store"], rows)
    write_json(
        options,
        {name: [[i._asdict() for i in run_] for run_ in runs] for name, runs in results.items()},
    )
    return 0


def part(iterations: Sequence[Iteration], t: int | None) -> Iteration:
    """Iteration t, or the sum of all."""
    if t is not None:
        return iterations[t]
    return Iteration(
        sum(i.score for i in iterations),
        sum(i.train for i in iterations),
        sum(i.sequences for i in iterations),
    )


if __name__ == "__main__":
    sys.exit(main())
