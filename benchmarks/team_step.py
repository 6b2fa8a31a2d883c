"""SCORE and TRAIN with a team of three: ours against a plain multi-reference trainer.

3N triples (N prompts, three opponents), three main players, TPAW's objective. The plain trainer
(plain_multi_reference.py) comes in two kinds: "naive" forwards three players at every step, and
"precompute" scores 18N sequences beforehand. Ours scores what an iteration t ≥ 2 of a run adds to
the log-prob store, 6N sequences: 4N under the newest player and N under each older one (the older
players' other log-probs are there from before, and are computed here without being timed).

The policy of the gate is not yet a player's copy but beside it: where every reward of the newest
player is 0 up to rounding, the sign in the target weight would be a coin's toss.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import gate
import ours
import plain_multi_reference as plain
from common import interleaved, parse, parser, precision_of, write_json
from contender import PAPER_OBJECTIVE, Settings, flat_weights, synchronize
from step_table import Timing, as_json, print_timings
from transformers import PreTrainedModel
from workload import (
    LogpsPair,
    Triple,
    make_model,
    make_triples,
    perturb,
    shape_named,
    useful_tokens,
)

from tpaw.data.token_ids import TokenSequence

PLAYERS = 3


def logps_of(
    players: Sequence[PreTrainedModel], triples: Sequence[Triple], bf16: bool
) -> LogpsPair:
    """Every triple under every player, each distinct sequence once."""
    sequences = ours.sequences_of(triples)
    columns = [ours.score(player, sequences, bf16=bf16) for player in players]
    return ours.by_triple(triples, sequences, columns)


def run_ours(
    players: Sequence[PreTrainedModel],
    settings: Settings,
    variant: Mapping[str, int],
    work: Sequence[Triple],
) -> Timing:
    """Score what the store would lack, then train."""
    logps = logps_of(players, work, settings.bf16)
    policy = copy.deepcopy(players[0])
    from_newest = [TokenSequence(t.prompt, t.generated) for t in work if t.opponent == 0]
    synchronize(policy.device)
    began = time.perf_counter()
    ours.score(players[0], ours.sequences_of(work), bf16=settings.bf16)
    for player in players[1:]:
        ours.score(player, from_newest, bf16=settings.bf16)
    seconds = time.perf_counter() - began
    return Timing(seconds, ours.train(policy, work, logps, settings, **variant).seconds)


def run_plain(
    players: Sequence[PreTrainedModel],
    settings: Settings,
    micro_batch: int,
    precompute: bool,
    work: Sequence[Triple],
) -> Timing:
    """Score first, or at every step."""
    policy = copy.deepcopy(players[0])
    if not precompute:
        training = plain.train(policy, work, settings, micro_batch, logps=None, players=players)
        return Timing(0.0, training.seconds)
    logps, seconds = plain.precompute(players, work, settings, micro_batch)
    return Timing(seconds, plain.train(policy, work, settings, micro_batch, logps=logps).seconds)


def check(
    players: Sequence[PreTrainedModel],
    triples: Sequence[Triple],
    settings: Settings,
    micro_batch: int,
) -> dict[str, dict[str, float]]:
    """The gate, for both plain trainers; `triples` are one batch."""
    watched = gate.gate_settings(settings)
    policy = perturb(copy.deepcopy(players[0]), seed=PLAYERS)
    start = flat_weights(policy)
    tolerance = gate.BF16 if settings.bf16 else gate.FP32
    logps = logps_of(players, triples, settings.bf16)
    own = ours.train(copy.deepcopy(policy), triples, logps, watched, **ours.DEFAULT_VARIANT)
    found = {}
    for name, references in (
        ("naive", None),
        ("precompute", plain.precompute(players, triples, settings, micro_batch)[0]),
    ):
        theirs = plain.train(
            copy.deepcopy(policy), triples, watched, micro_batch, logps=references, players=players
        )
        found[name] = gate.check_equal(f"plain, {name},", own, theirs, start, tolerance)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    options_of = parser(__doc__, size="39m")
    options_of.add_argument("--prompts", type=int, default=8, help="three triples each")
    options_of.add_argument("--batch", type=int, default=8, help="triples in an optimizer step")
    options_of.add_argument("--length-scale", type=float, default=1.0)
    options_of.add_argument("--plain-micro-batches", type=int, nargs="+", default=[2, 8])
    options = parse(options_of, argv)
    shape = shape_named(options.size)
    settings = Settings(options.batch, PAPER_OBJECTIVE, options.bf16)
    base = make_model(shape, options.seed, options.device)
    players = [base] + [perturb(copy.deepcopy(base), seed) for seed in range(1, PLAYERS)]
    triples = make_triples(
        options.prompts, PLAYERS, shape.vocab, options.seed, options.length_scale
    )
    try:
        differences = check(
            players, triples[: options.batch], settings, options.plain_micro_batches[0]
        )
    except gate.GateError as error:
        print(f"REFUSED: {error}", file=sys.stderr)
        return 1
    contenders: dict[str, Callable[[Sequence[Triple]], Timing]] = {
        f"ours, {name}": partial(run_ours, players, settings, variant)
        for name, variant in ours.VARIANTS.items()
    }
    reference = next(iter(contenders))
    for size in options.plain_micro_batches:
        for precompute in (True, False):
            name = f"plain {'precompute' if precompute else 'naive'}, {size} triples"
            contenders[name] = partial(run_plain, players, settings, size, precompute)
    timings = interleaved(
        contenders, triples, warm_up=triples[: options.batch], repeats=options.repeats
    )
    tokens = useful_tokens(triples)
    print(f"same steps: {differences}")
    title = (
        f"{shape.title(options.size)}, {options.device}, {precision_of(options)}: "
        f"{options.prompts} prompts, {len(triples)} triples, {PLAYERS} players; sequences scored: "
        f"ours {6 * options.prompts}, plain {18 * options.prompts}; median [range] of "
        f"{options.repeats} interleaved repeats"
    )
    print_timings(title, timings, {}, reference, len(triples), tokens)
    results = as_json(timings, {}, reference)
    write_json(options, {"gate": differences, "useful_tokens": tokens, "contenders": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
