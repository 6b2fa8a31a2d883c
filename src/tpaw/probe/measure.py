"""Measure, on a few hundred records, what a run would be made of. Nothing of it is kept.

A short run of one iteration in a temporary folder gives the responses and the margins: the same
code as the run itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from tpaw.config.plan import (
    as_in_the_first_iteration,
    optimizer_steps,
    plan_run,
    players_of,
)
from tpaw.config.schema import (
    CriticConfig,
    EvaluateConfig,
    ObjectiveConfig,
    RunConfig,
)
from tpaw.critic.comparisons import comparisons, halves, split
from tpaw.critic.fit import fit
from tpaw.critic.model import reader_of, scores_of, small_critic
from tpaw.critic.selection import best_of, choose
from tpaw.data.columns import key_list
from tpaw.data.examples import Examples
from tpaw.data.readers import count_records
from tpaw.data.token_ids import TokenSequence
from tpaw.errors import InputError
from tpaw.evaluation.checker import Checker
from tpaw.generation.responses import Responses, read_responses, response_facts
from tpaw.logprobs.prepare import prepare_for_logprobs
from tpaw.models.loading import disable_dropout
from tpaw.pipeline.engines import InProcess
from tpaw.pipeline.engines import parts as in_parts
from tpaw.pipeline.stages import Stages, opened_stages
from tpaw.probe.gradients import COVERED, FirstStep, batch_gradients, first_step
from tpaw.probe.verdict import RECORDS_FOR_CRITIC, Answers, CriticFound, Ending, Margins
from tpaw.runtime.interrupt import StopSignal
from tpaw.runtime.progress import progress
from tpaw.runtime.watch import Watch
from tpaw.scoring.score import ScoringModel, score_sequences
from tpaw.storage.run_directory import RunDirectory
from tpaw.team import Player, Team

# Gradients of this many batches can tell signal from noise.
BATCHES = 16
# The small critic: passes over its pairs, at least so many steps and at most so many.
EPOCHS_OF_CRITIC, STEPS_OF_CRITIC = 10, (100, 2000)
# Responses to a prompt. A critic needs several, and costs more than everything else together.
SAMPLES, SAMPLES_FOR_CRITIC = 2, 4
# Where right responses can be told, those of these temperatures that are below the run's are tried.
LOWER_TEMPERATURES = (1.0, 0.5, 0.2, 0.0)


class Probe(NamedTuple):
    """Everything that the probe measures.

    Attributes:
        step: the gradients of the first step.
        answers: what the model answers.
        critic: what a small critic learns; None if it was not fitted: there are fewer than
            `RECORDS_FOR_CRITIC` records, or the responses leave nothing to compare.
        margins: after a few steps of training.
    """

    step: FirstStep
    answers: Answers
    critic: CriticFound | None
    margins: Margins


def probe(config: RunConfig, records: int, stop: StopSignal) -> Probe:
    """Measure on the first records of the data.

    Args:
        config: the configuration of a run of self-play.
        records: how many to use.
        stop: tells whether the user asked for a stop.

    Raises:
        InputError: the configuration cannot be run, or is not one of self-play.
    """
    short, watch = shortened(config, records), Watch(stop)
    with TemporaryDirectory() as folder, opened_stages(short, folder, stop) as stages:
        with watch.progress("count all records", None, "records") as on_done:
            count = count_records(config.data, "data", on_done)
        usable = count - sum(stages.inputs.skipped["data"].values())
        return _Measuring(config, usable, short, stages, RunDirectory(folder), watch).all()


def shortened(config: RunConfig, records: int) -> RunConfig:
    """The configuration of one iteration over the first records, with several responses to each.

    Raises:
        InputError: it is not one of self-play, or asks for a cluster.
    """
    if config.method != "self_play":
        raise InputError(
            f"method: {config.method}: the probe needs method self_play, and fits a small critic "
            f"itself from {RECORDS_FOR_CRITIC:,} records on; leave out the recipe that sets method"
        )
    if config.launch.engine != "in_process":
        raise InputError(
            f"launch.engine: {config.launch.engine}: the probe runs in this process; set it to "
            "in_process"
        )
    limit = min(records, config.data.limit or records)
    several = config.generate.temperature > 0 and not config.objective.needs.one_response
    wanted = SAMPLES_FOR_CRITIC if limit >= RECORDS_FOR_CRITIC else SAMPLES
    samples = max(wanted, config.generate.samples) if several else config.generate.samples
    short = as_in_the_first_iteration(config)
    return short.model_copy(
        update={
            "iterations": 1,
            "data": config.data.model_copy(update={"limit": limit, "chunks": 1}),
            "evaluate": EvaluateConfig(),
            "generate": config.generate.model_copy(update={"samples": samples}),
            "train": short.train.model_copy(update={"epochs": 1, "report_to": ()}),
        }
    )


def ending(targets: Sequence[str], responses: Sequence[str]) -> Ending:
    """How often targets and responses end with the most frequent last character of the targets."""
    ends = [[text.strip()[-1:] for text in texts] for texts in (targets, responses)]
    character, _ = Counter(ends[0]).most_common(1)[0]
    return Ending(character, *(found.count(character) / len(found) for found in ends))


class _Measuring:
    def __init__(
        self,
        config: RunConfig,
        records_of_data: int,
        short: RunConfig,
        stages: Stages,
        run: RunDirectory,
        watch: Watch,
    ) -> None:
        self.config = config
        self.records_of_data = records_of_data
        # It refuses an iteration without effect, so it comes before anything is measured.
        self.steps_of_iteration = plan_run(config, records_of_data)[0].optimizer_steps
        self.short = short
        self.stages = stages
        self.run = run
        self.watch = watch
        self.examples: Examples = stages.inputs.examples
        self.checker: Checker = stages.published.checker
        assert isinstance(stages.engine, InProcess)  # `shortened` refuses the other ones
        # Those of the stages: others would hold the same model a second time.
        self.players = stages.engine.worker.players

    def all(self) -> Probe:
        """Everything, one after the other."""
        start = self.stages.initial_player()
        self.stages.generate(start, self.examples, 0)
        parts = read_responses(self.run.responses(1)).in_parts_of(len(self.examples))
        # Answers and margins read these log-probs.
        self.stages.score(self.stages.published.triples(self.examples, [start]), [start], 0)
        answers = self._answers(start, parts)
        step = self._first_step(start, parts)
        critic = self._critic(parts) if len(self.examples) >= RECORDS_FOR_CRITIC else None
        return Probe(step, answers, critic, self._margins(start))

    def _answers(self, start: Player, parts: Sequence[Responses]) -> Answers:
        examples, config = self.examples, self.config
        facts = response_facts(self.run.responses(1))
        right_shares, likeliest_right = {}, None
        if self.checker.can_check(examples):
            are_right = np.array([self._are_right(part.texts) for part in parts])
            right_shares[config.generate.temperature] = float(are_right.mean())
            for temperature, found in self._at_lower_temperatures(start):
                right_shares[temperature] = float(np.mean(self._are_right(found)))
            if len(parts) > 1:
                kept, number = self._likeliest(start, parts)
                likeliest_right = float(are_right[number, kept].sum()) / len(examples)
        texts = zip(*(part.texts for part in parts), strict=True)
        lengths = [len(ids) for part in parts for ids in part.token_ids]
        generate = config.generate
        return Answers(
            prompts=len(examples),
            samples=len(parts),
            temperature=generate.temperature,
            is_plain=(generate.temperature, generate.top_p, generate.top_k) == (1, 1, 0),
            is_covered=config.objective.name in COVERED,
            identical_share=facts["identical"] / facts["rows"],
            truncated_share=facts["truncated"] / facts["rows"],
            right_shares=right_shares,
            likeliest_right_share=likeliest_right,
            different_share=float(np.mean([len(set(found)) / len(parts) for found in texts])),
            ending=ending(
                [example.target_text for example in examples],
                [text for part in parts for text in part.texts],
            ),
            target_tokens=float(np.median(examples.target_ids.lengths)),
            response_tokens=float(np.median(lengths)),
            records_of_data=self.records_of_data,
        )

    def _likeliest(
        self, start: Player, parts: Sequence[Responses]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The prompts with a whole response, and of each the number of its likeliest one."""
        published = self.stages.published
        triples = published.triples(self.examples, [start])
        logps = published.store(start).logps(triples.generated_keys)
        by_prompt = (len(parts), len(self.examples))
        return best_of(logps.reshape(by_prompt), ~triples.is_truncated.reshape(by_prompt))

    def _are_right(self, texts: Iterable[str]) -> list[bool]:
        pairs = zip(self.examples, texts, strict=True)
        return [self.checker.is_right(example, text) for example, text in pairs]

    def _at_lower_temperatures(self, start: Player) -> Iterator[tuple[float, list[str]]]:
        """Temperatures below that of the responses, each with one response to each prompt."""
        prompts, params = list(self.examples.prompt_ids), self.stages.params
        lower = [t for t in LOWER_TEMPERATURES if t < params.temperature]
        decode = self.stages.inputs.tokenizer.decode
        with (
            self.watch.progress(
                "answer at lower temperatures", len(prompts) * len(lower), "prompts"
            ) as on_done,
            self.players.open_generator(start, self.short.generate) as generator,
        ):
            for temperature in lower:
                asked = params._replace(temperature=temperature)
                found = generator.generate(prompts, asked, 0, on_done)
                texts = (decode(c.token_ids.tolist(), skip_special_tokens=True) for c in found)
                yield temperature, [str(text) for text in texts]

    def _first_step(self, start: Player, parts: Sequence[Responses]) -> FirstStep:
        """The gradients of batches of targets, and of one response to each."""
        size = max(len(self.examples) // BATCHES, 1)
        model = self.players.for_training(start, 0)
        disable_dropout(model)
        layout, _ = prepare_for_logprobs(model, self.short.max_length)
        scorer = ScoringModel(model, layout, self.players.precision)
        of_targets = [example.target for example in self.examples]
        prompts, responses = self.examples.prompt_ids, parts[0].token_ids
        of_responses = list(map(TokenSequence, prompts, responses))
        budget, total = self.short.train.tokens_per_row, 2 * BATCHES * size
        with self.watch.progress("gradients of the first step", total, "sequences") as on_done:
            target_BC, generated_BC = (
                batch_gradients(
                    scorer,
                    [part for _, part in in_parts(sequences, size)][:BATCHES],
                    tokens_per_row=budget,
                    on_done=on_done,
                )
                for sequences in (of_targets, of_responses)
            )
        self.players.release()
        objective = self.config.objective
        eta = objective.eta if isinstance(objective, ObjectiveConfig) else 1.0
        return first_step(target_BC, generated_BC, eta)

    def _critic(self, parts: Sequence[Responses]) -> CriticFound | None:
        """What a small critic learns from these records."""
        settings, inputs = CriticConfig(heldout=0.3, patience=4), self.stages.inputs
        reader = reader_of(settings, inputs.tokenizer, inputs.stop_ids, self.short.max_length)
        pairs = comparisons(self.examples, parts, reader.encode)
        learned, held = split(pairs.prompts, settings.heldout, self.short.seed)
        watched, measured = halves(pairs.prompts, held)
        if not all(pairs.counts[rows].any() for rows in (learned, watched, measured)):
            return None
        epoch = pairs.counts[learned].sum() / settings.batch_size
        steps = int(np.clip(round(EPOCHS_OF_CRITIC * epoch), *STEPS_OF_CRITIC))
        settings = settings.model_copy(update={"evaluate_every": steps // 12})
        with torch.random.fork_rng():
            torch.manual_seed(self.short.seed)
            critic = small_critic(settings, reader.tokenizer).to(self.players.device)
        with (
            TemporaryDirectory() as folder,
            progress("fit a small critic", steps, "steps") as advance,
        ):
            fit(
                critic,
                pairs.pairs(learned),
                pairs.pairs(watched),
                settings,
                reader.tokenizer,
                steps=steps,
                seed=self.short.seed,
                use_cpu=self.players.device.type == "cpu",
                saved_steps=Path(folder) / "steps",
                log_file=Path(folder) / "critic.jsonl",
                resume_from=None,
                advance=advance,
                stop=self.watch.stop,
            )
        targets = scores_of(critic, pairs.targets)
        scores = pairs.matrix(scores_of(critic, pairs.responses))
        right = best = None
        if self.checker.can_check(self.examples) and len(parts) > 1:
            are_right = np.array([self._are_right(part.texts) for part in parts])
            kept, number = choose(scores.T.reshape(1, -1), parts, "mean")
            unseen = np.isin(kept, measured)
            right = float(are_right[:, measured].mean())
            best = float(are_right[number, kept][unseen].mean()) if unseen.any() else None
        return CriticFound(
            pairs.auc(measured, targets, scores),
            pairs.auc(measured, targets, scores, of_like_length=True),
            pairs.auc_of_length(measured),
            right,
            best,
            samples=len(parts),
        )

    def _margins(self, start: Player) -> Margins:
        """λ(Δ − Γ) of the pairs after one epoch over the records."""
        stages, config = self.stages, self.short
        team = Team(*players_of(config, [start]))
        triples = stages.build_triples(self.examples, team.opponents)
        stages.score(triples, team.main_players, 0)
        trained = stages.train(start, triples, team, 0)
        kept = stages.data.kept(triples, team.main_players)
        sequences = triples.sequences()
        wanted = [sequences[i] for i in range(len(sequences))]
        before = stages.published.store(start).logps(sequences.keys)
        after = score_sequences(
            self.players.for_scoring(trained), wanted, tokens_per_row=config.score.tokens_per_row
        )
        gain = dict(zip(key_list(sequences.keys), after - before, strict=True))
        target, generated = (
            np.array([gain[key] for key in key_list(keys)])
            for keys in (triples.target_keys, triples.generated_keys)
        )
        lambda_ = getattr(config.objective, "lambda_", 1.0)
        margins, *rewards = np.abs(lambda_ * np.stack([target - generated, target, generated]))
        return Margins(
            steps=optimizer_steps(config, len(kept), 0),
            steps_of_iteration=self.steps_of_iteration,
            median=float(np.median(margins)),
            high=float(np.quantile(margins, 0.95)),
            high_of_targets=float(np.quantile(rewards[0], 0.95)),
            high_of_responses=float(np.quantile(rewards[1], 0.95)),
        )
