"""SCORE and TRAIN with one player: ours against TRL's DPOTrainer.

With one player and a target weight of one, TPAW's objective is DPO's sigmoid loss. Both get the
same weights, triples, precision, batch size, optimizer (RMSprop) and clipping, and β = λ. Two
steps of both on one batch are compared first; where they differ, nothing is timed.

Timed are the reference log-probs of all 2N sequences, from ids in memory to log-probs in the
dataset, and N triples of training, from the first batch's collation to the last update. Not timed:
making the model and the trainer, trying the model before it is used, tokenising, TRL's hash of the
weights. Ours is swept over its ways of cutting work, and TRL over 1, 2, 4 and 8 pairs in a
micro-batch; "TRL, best of each" takes its best setting for scoring and its best for training.

Memory is measured in processes of their own (memory.py). To see what the vocabulary does to it,
and time nothing:
    python benchmarks/train_step.py --size tiny --hidden 256 --vocab 152000 --triples 8 --repeats 0
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import gate
import ours
import trl_dpo
from common import interleaved, parse, parser, precision_of, write_json
from contender import DPO_OBJECTIVE, Settings, flat_weights, synchronize
from memory import peak_bytes
from step_table import Peak, Timing, as_json, best_of_each, print_timings
from transformers import PreTrainedModel
from workload import LogpsPair, Shape, Triple, make_model, make_triples, shape_named, useful_tokens

from tpaw.data.token_ids import TokenSequence
from tpaw.scoring.score import ScoringModel

AS_PEOPLE_RUN_IT = 8
SWEPT = (1, 2, 4, AS_PEOPLE_RUN_IT)


@dataclass(frozen=True)
class Case:
    """All that a process needs to make the workload again."""

    shape: Shape
    triples: int
    length_scale: float
    seed: int
    device: str
    settings: Settings

    def model(self) -> PreTrainedModel:
        """θ_t: the policy, and the one player."""
        return make_model(self.shape, self.seed, self.device)

    def data(self) -> list[Triple]:
        """One triple a prompt."""
        return make_triples(self.triples, 1, self.shape.vocab, self.seed, self.length_scale)


def score_ours(
    model: PreTrainedModel | ScoringModel,
    triples: Sequence[Triple],
    bf16: bool,
    variant: Mapping[str, int],
) -> LogpsPair:
    """The log-probs of both responses under the one player."""
    sequences = [
        TokenSequence(t.prompt, response) for t in triples for response in (t.target, t.generated)
    ]
    logps_N2 = ours.score(model, sequences, bf16=bf16, **variant).reshape(-1, 2)
    return LogpsPair(logps_N2[:, :1], logps_N2[:, 1:])


def run_ours(
    base: PreTrainedModel, settings: Settings, variant: Mapping[str, int], work: Sequence[Triple]
) -> Timing:
    """Score and train a copy of the model."""
    model = copy.deepcopy(base)
    scorer = ours.prepared(model, settings.bf16)
    synchronize(model.device)
    began = time.perf_counter()
    logps = score_ours(scorer, work, settings.bf16, variant)
    seconds = time.perf_counter() - began
    return Timing(seconds, ours.train(model, work, logps, settings, **variant).seconds)


def run_trl(
    base: PreTrainedModel, settings: Settings, micro_batch: int, work: Sequence[Triple]
) -> Timing:
    """Score and train a copy of the model."""
    found = trl_dpo.run(copy.deepcopy(base), work, settings, micro_batch=micro_batch)
    return Timing(found.score_seconds, found.training.seconds)


def check(
    base: PreTrainedModel, triples: Sequence[Triple], settings: Settings
) -> dict[str, dict[str, float]]:
    """The gate, for every way of ours to cut work; `triples` are one batch."""
    watched = gate.gate_settings(settings)
    start = flat_weights(base)
    logps = score_ours(base, triples, settings.bf16, ours.DEFAULT_VARIANT)
    tolerance = gate.BF16 if settings.bf16 else gate.FP32
    micro_batch = min(AS_PEOPLE_RUN_IT, settings.batch)
    theirs = trl_dpo.run(copy.deepcopy(base), triples, watched, micro_batch=micro_batch).training
    found = {}
    for name, variant in ours.VARIANTS.items():
        own = ours.train(copy.deepcopy(base), triples, logps, watched, **variant)
        found[name] = gate.check_equal(f"TRL, beside {name},", own, theirs, start, tolerance)
    return found


def prepare_ours(case: Case, variant: Mapping[str, int], train: bool) -> Callable[[], object]:
    """For memory.py."""
    model, triples = case.model(), case.data()

    def work() -> None:
        logps = score_ours(model, triples, case.settings.bf16, variant)
        if train:
            ours.train(model, triples, logps, case.settings, **variant)

    return work


def prepare_trl(case: Case, micro_batch: int, train: bool) -> Callable[[], object]:
    """For memory.py."""
    model, triples = case.model(), case.data()
    return partial(trl_dpo.run, model, triples, case.settings, micro_batch=micro_batch, train=train)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    options_of = parser(__doc__)
    options_of.add_argument("--triples", type=int, default=16, help="a multiple of --batch")
    options_of.add_argument("--batch", type=int, default=8, help="triples in an optimizer step")
    options_of.add_argument("--vocab", type=int, help="another vocabulary")
    options_of.add_argument("--hidden", type=int, help="another width")
    options_of.add_argument("--length-scale", type=float, default=1.0)
    options_of.add_argument(
        "--pairs", type=int, nargs="+", default=SWEPT, help="in a micro-batch of TRL's"
    )
    options_of.add_argument("--no-memory", action="store_true", help="skip the peaks")
    options = parse(options_of, argv)
    if options.triples % options.batch:
        options_of.error("--triples is not a multiple of --batch, which TRL would weigh otherwise")
    case = Case(
        shape_named(options.size, options.vocab, options.hidden),
        options.triples,
        options.length_scale,
        options.seed,
        options.device,
        Settings(options.batch, DPO_OBJECTIVE, options.bf16),
    )
    base, triples = case.model(), case.data()
    try:
        # Exactness needs no more than a ragged pair of triples.
        few = min(options.batch, 2)
        differences = check(base, triples[:few], replace(case.settings, batch=few))
    except gate.GateError as error:
        print(f"REFUSED: {error}", file=sys.stderr)
        return 1
    swept = [size for size in options.pairs if size <= options.batch]
    contenders: dict[str, Callable[[Sequence[Triple]], Timing]] = {
        f"ours, {name}": partial(run_ours, base, case.settings, variant)
        for name, variant in ours.VARIANTS.items()
    }
    reference = next(iter(contenders))
    names = {size: f"TRL, {size} pairs" for size in swept}
    names |= {AS_PEOPLE_RUN_IT: f"TRL, {AS_PEOPLE_RUN_IT} pairs (as people run it)"}
    contenders |= {names[size]: partial(run_trl, base, case.settings, size) for size in swept}
    timings: dict[str, list[Timing]] = {}
    if options.repeats:
        timings = interleaved(
            contenders, triples, warm_up=triples[: options.batch], repeats=options.repeats
        )
        timings["TRL, best of each"] = best_of_each(timings, "TRL")
    peaks: dict[str, Peak] = {}
    if not options.no_memory:
        for name, variant in ours.VARIANTS.items():
            sizes = (peak_bytes(prepare_ours, case, variant, train) for train in (False, True))
            peaks[f"ours, {name}"] = Peak(*sizes)
        for size in swept:
            sizes = (peak_bytes(prepare_trl, case, size, train) for train in (False, True))
            peaks[names[size]] = Peak(*sizes)
    tokens = useful_tokens(triples)
    print(f"same steps: {differences}")
    title = (
        f"{case.shape.title(options.size)}, {options.device}, {precision_of(options)}: "
        f"{len(triples)} triples of {tokens / len(triples):.0f} useful tokens, batch "
        f"{options.batch}; median [range] of {options.repeats} interleaved repeats"
    )
    print_timings(title, timings, peaks, reference, len(triples), tokens)
    results = as_json(timings, peaks, reference)
    write_json(options, {"gate": differences, "useful_tokens": tokens, "contenders": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
