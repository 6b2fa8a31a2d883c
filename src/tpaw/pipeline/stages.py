"""The stages of an iteration over a run directory: who does what, in which order.

A stage whose output is published returns at once. What a stage computes depends on its inputs and
the seed alone, never on how often the run was interrupted, nor on which process computes it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, repeat
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tpaw.config.plan import check_steps, kept_checkpoints, optimizer_steps
from tpaw.config.schema import RunConfig, at_iteration
from tpaw.critic.comparisons import only_counts_tokens
from tpaw.data.examples import Example
from tpaw.data.inputs import Inputs, load_inputs, publish_inputs
from tpaw.data.token_ids import TokenIds, TokenSequence
from tpaw.errors import InputError
from tpaw.evaluation.benchmarks.run import missing_suites
from tpaw.evaluation.checker import checker_of
from tpaw.evaluation.heldout import HeldoutEvaluation
from tpaw.generation.generator import Completion, OpenGenerator, SamplingParams
from tpaw.generation.responses import Repeated, generate_responses, read_responses
from tpaw.models.initial import initial_player
from tpaw.pipeline.critic_task import CriticTask
from tpaw.pipeline.engines import Engine, InProcess, parts
from tpaw.pipeline.job import TrainingJob
from tpaw.pipeline.preflight import read_and_check
from tpaw.pipeline.published import Chosen, Published
from tpaw.pipeline.space import space_for_evaluation, space_for_responses, space_for_scores
from tpaw.pipeline.training import TrainingData
from tpaw.pipeline.worker import (
    AnswerTask,
    GenerateTask,
    LogpsTask,
    Prompts,
    ScoreTask,
    Sequences,
    SuitesTask,
    Worker,
)
from tpaw.report.alarms import Alarm
from tpaw.report.html.page import Report
from tpaw.report.summary import write_summary
from tpaw.report.trackers import Trackers
from tpaw.runtime.interrupt import StopSignal
from tpaw.runtime.isolation import isolated
from tpaw.runtime.progress import OnDone, note, note_once, progress
from tpaw.runtime.watch import Watch
from tpaw.scoring.drift import server_drift
from tpaw.scoring.score import fill_store
from tpaw.scoring.sequences import DistinctSequences
from tpaw.statistics.auc import Auc
from tpaw.storage.artifacts import (
    is_published,
    read_listed_json,
    read_manifest,
    remove_artifacts,
    write_sealed,
)
from tpaw.storage.removal import remove_weights
from tpaw.storage.run_directory import RunDirectory, finish_removals, open_run, verify_run
from tpaw.team import Player, Team
from tpaw.training.triples import Triples, preference_pairs

# Sizes of the parts that held-out data is cut into. They are fixed, so that batches, and with them
# the last bits of results, do not depend on the number of workers.
PROMPTS_IN_PART = 256
SEQUENCES_IN_PART = 2048


@contextlib.contextmanager
def opened_stages(
    config: RunConfig,
    output: str | Path,
    stop: StopSignal,
    open_generator: OpenGenerator | None = None,
) -> Iterator[Stages]:
    """Check everything that can be checked beforehand, then lock the run directory.

    Args:
        open_generator: default: the backend of the configuration.

    Raises:
        InputError: before anything is written.
        RunLockedError, ArtifactError: see `open_run`.
    """
    watch = Watch(stop)
    with isolated(deterministic=config.deterministic):
        connection = _cluster(config, open_generator)
        inputs = read_and_check(config, output, watch)  # in copies of this process, before Ray
        with connection, open_run(output, config) as run:
            verify_run(run, config.iterations, watch)
            finish_removals(run, config.iterations)
            if inputs is not None and not is_published(run.inputs):
                publish_inputs(run.inputs, inputs)
            del inputs  # its temporary files
            kept = load_inputs(run.inputs, config)
            note(kept.described())
            published = Published(run, checker_of(config.checker))
            data = TrainingData(config, kept, published)
            with _engine(data, stop, open_generator) as engine:
                stages = Stages(data, engine, watch)
                with contextlib.closing(stages.trackers) as trackers:
                    trackers.after_a_stage()  # of an earlier session
                    yield stages


@contextlib.contextmanager
def _engine(
    data: TrainingData, stop: StopSignal, open_generator: OpenGenerator | None
) -> Iterator[Engine]:
    config, run = data.config, data.published.run
    if config.launch.engine == "in_process":
        worker = Worker(config, run, data.inputs.tokenizer, open_generator, stop)
        with contextlib.closing(worker.players.servers):
            yield InProcess(worker, data)
        return
    from tpaw.pipeline.ray_engine import RayEngine

    engine = RayEngine(config, run, stop)
    try:
        yield engine
    finally:
        engine.release()


def _cluster(
    config: RunConfig, open_generator: OpenGenerator | None
) -> contextlib.AbstractContextManager[None]:
    """The connection to the cluster, not yet opened.

    Raises:
        InputError: Ray is missing, or nobody listens at the address.
    """
    if config.launch.engine == "in_process":
        return contextlib.nullcontext()
    if open_generator is not None:
        raise InputError(
            "launch.engine: ray: a generator of your own works in this process only; set "
            "launch.engine to in_process"
        )
    try:
        from tpaw.pipeline.ray_cluster import connected, try_to_connect
    except ImportError as error:
        raise InputError(
            f"launch.engine: ray needs Ray: pip install 'tpaw[ray]' ({error})"
        ) from None
    try_to_connect(config.launch.address)
    return connected(config)


class Stages:
    """Everything that Algorithm 1 and the baselines ask for, over one run directory."""

    def __init__(self, data: TrainingData, engine: Engine, watch: Watch) -> None:
        self.data = data
        self.config: RunConfig = data.config
        self.run: RunDirectory = data.published.run
        self.inputs: Inputs = data.inputs
        self.published = data.published
        self.engine = engine
        self.watch = watch
        self._report = Report(data.published.run, data.config)
        self.trackers = Trackers(data.published.run, data.config)
        self.params = SamplingParams.of(
            self.config.generate, self.config.max_length, self.inputs.stop_ids
        )

    def load_examples(self, t: int = 0) -> Sequence[Example]:
        """D_SFT, or the part of it that an iteration uses; see `data.chunks`."""
        return self.data.examples(t)

    def initial_player(self) -> Player:
        """θ_0, the SFT model."""
        may_record = not self.run.uses_initial_player()
        record = self.run.initial_player_file
        return initial_player(self.config.model, record, may_record=may_record)

    def generate(self, player: Player, examples: Sequence[Example], t: int) -> None:
        """D_t: the newest checkpoint answers every prompt, `generate.samples` times.

        Raises:
            Interrupted: a stop was asked for; finished shards are published.
        """
        folder = self.run.iteration(t).responses
        if is_published(folder):
            return
        asked = Repeated(examples, self.config.generate.samples)
        space_for_responses(self.run, self.config, len(asked))
        task = GenerateTask(player, folder, self.params)
        with self._progress(t, f"generate with θ_{t}", len(asked), "prompts") as on_done:
            generate_responses(
                folder,
                player,
                asked,
                partial(self.engine.do, task, on_done=on_done),
                self.params,
                shard_size=self.config.generate.shard_size,
                seed=self.config.seed,
                on_done=on_done,
            )
        self._after_a_stage()

    def build_triples(self, examples: Sequence[Example], opponents: Sequence[Player]) -> Triples:
        """D_O: every example with the responses of every opponent, or those that are right.

        Raises:
            ArtifactError: responses on disk belong to other examples.
        """
        return self.published.triples(examples, opponents, self.config.objective.needs)

    def fit_critic(self, opponents: Sequence[Player], t: int) -> None:
        """The critic of an iteration, and its scores of D_t.

        Raises:
            Interrupted: a stop was asked for; the step of the critic is saved.
            InputError: nothing says that the critic can tell targets from responses.
        """
        folder = self.run.iteration(t).critic
        if not is_published(folder):
            steps = at_iteration(self.config.critic.steps, t)
            with self._progress(t, "fit the critic", steps, "steps") as on_done:
                for _ in self.engine.do(CriticTask(tuple(opponents)), [t], on_done):
                    pass
        found = read_listed_json(folder, "results.json")
        auc, alike, length = (
            Auc.from_json(found[name])
            for name in ("auc", "auc_of_like_length", "auc_of_length_alone")
        )
        low, high = auc.interval_95
        iteration = f"iteration {self.run.iteration(t).number}"
        shown = f"AUC {auc.value:.3f} [{low:.3f}, {high:.3f}]"
        note(f"{iteration}: the critic tells targets from responses with {shown}")
        if self.config.critic.at_chance == "go_on":
            return
        kept = f"θ_{t} stays. " if t else ""
        advice = (
            f"{kept}Use more records or a better critic (critic.path, critic.steps), or set "
            "critic.at_chance to go_on and begin anew"
        )
        if not low > 0.5:
            raise InputError(
                f"{iteration}: the critic cannot tell targets from responses: {shown} on "
                f"{auc.prompts} held-out prompts, and the interval must lie above 0.5. "
                f"What it would choose is chance. {advice}"
            )
        if only_counts_tokens(alike, length):
            low, high = alike.interval_95
            known = (
                f"of like length {alike.value:.3f} [{low:.3f}, {high:.3f}] on {alike.prompts} "
                "held-out prompts, and this interval must lie above 0.5"
                if alike.prompts > 1
                else "too few of like length to tell"
            )
            raise InputError(
                f"{iteration}: the critic may know nothing but the length of targets: {shown}, of "
                f"length alone {length.value:.3f}, {known}. What it would choose may be only "
                f"{'long' if length.value > 0.5 else 'short'}, not good. {advice}"
            )

    def choose(self, t: int) -> Chosen:
        """Of each prompt, the response of θ_t that the critics like best, as its target."""
        return self.data.chosen(t)

    def build_triples_of_chosen(self, chosen: Chosen, opponents: Sequence[Player]) -> Triples:
        """Each chosen response against the opponents' other responses to its prompt."""
        return self.published.triples_of_chosen(chosen, opponents)

    def score(self, triples: Triples, players: Sequence[Player], t: int) -> None:
        """log π_j of every target and generated response that the store lacks.

        Then the weights that the run does not need any more are removed, as `keep` says.

        Raises:
            Interrupted: a stop was asked for; finished shards are published.
        """
        wanted = triples.sequences() if players else DistinctSequences.of([])
        for player in players:
            store = self.published.store(player)
            missing = int((~store.contains(wanted.keys)).sum())
            if not missing:
                continue
            space_for_scores(self.run, self.config, missing)
            task = ScoreTask(player, self.run.logprobs(player.fingerprint))
            title = f"score with θ_{player.index}"
            with self._progress(t, title, missing, "sequences") as on_done:
                fill_store(
                    store,
                    f"iteration-{self.run.iteration(t).number}",
                    wanted,
                    partial(self.engine.do, task, on_done=on_done),
                    shard_size=self.config.score.shard_size,
                )
        self._compare_with_server(players, t)
        self._remove_weights(t, is_trained=False)

    def train(self, policy: Player, triples: Triples, team: Team, t: int) -> Player:
        """θ_{t+1}, from θ_t by minimising the objective over D_O.

        Raises:
            InputError: the objective trains on some responses alone, and there are too few.
        """
        triples = self.data.kept(triples, team.main_players)
        steps = optimizer_steps(self.config, len(triples), t)
        job = TrainingJob(t, steps, policy, team.opponents, team.main_players)
        is_done = is_published(self.run.iteration(t).checkpoint)
        if self.config.objective.needs.responses != "all" and not is_done:
            job = replace(job, kept=self._kept(triples, t))
        return self._train(job, triples)

    def train_by_sft(self, policy: Player, t: int, chosen: Chosen | None = None) -> Player:
        """θ_{t+1}, from θ_t by SFT on the targets, or on chosen responses."""
        examples = self.inputs.examples if chosen is None else chosen.examples
        check_steps(self.config, len(examples), t)
        return self._train(TrainingJob(t, optimizer_steps(self.config, len(examples), t), policy))

    def train_by_dpo(self, policy: Player, t: int) -> Player:
        """θ_{t+1}, from θ_t by DPO on the preference data, with θ_t as the reference."""
        pairs = preference_pairs(self.inputs.examples)
        self.score(pairs, [policy], t)
        steps = optimizer_steps(self.config, len(pairs), t)
        return self._train(TrainingJob(t, steps, policy, players=(policy,)), pairs)

    def evaluate(self, player: Player) -> None:
        """Held-out outcomes of a checkpoint, item by item, and their means; then its suites.

        This ends an iteration: the weights that `keep` does not keep are removed.
        """
        if self.inputs.heldout and not is_published(self.run.evaluation(player.index)):
            space_for_evaluation(self.run, self.config, len(self.inputs.heldout))
            HeldoutEvaluation(
                config=self.config,
                checker=self.published.checker,
                heldout=self.inputs.heldout,
                folder_of=self.run.evaluation,
                answer=self._answer,
                logps=self._logps,
                decode=self._decode,
                params=self.params,
                watch=self.watch,
            ).publish(player)
            self._after_a_stage()
        if missing_suites(self.run, player.index, self.config.evaluate.suites):
            stop = lambda _: self.watch.stop.check()  # noqa: E731
            for _ in self.engine.do(SuitesTask(), [player.index], stop):
                pass
        if player.index > 0:
            self._remove_weights(player.index - 1, is_trained=True)

    def report(self, t: int) -> bool:
        """summary.json, report.html and the trackers, from what is published.

        Args:
            t: the iteration that has trained θ_{t+1}; counts from 0.

        Returns:
            False if the run ends with θ_{t+1}: see `evaluate.stop_when_worse`.
        """
        summary = write_summary(self.run, self.config)
        for alarm in summary["alarms"]:
            note_once(Alarm(**alarm).line())
        self._report.bring_up_to_date()
        self.trackers.after_an_iteration()
        is_newest = t + 1 == summary["iterations_done"]  # a run that goes on passes the others
        return not is_newest or summary["ended"] is None

    def _after_a_stage(self) -> None:
        self._report.after_a_stage()
        self.trackers.after_a_stage()

    def _kept(self, triples: Triples, t: int) -> dict[str, float]:
        """Say which responses are trained on, before training begins; refuse too few."""
        number, of = self.run.iteration(t).number, triples.responses_in_play
        found: dict[str, float] = {"triples": len(triples), "responses": of}
        if self.config.objective.needs.responses == "correct":
            which, advice = "right", "start from a better model, raise generate.samples"
            shown = f"{len(triples):,} of {of:,} responses are right"
        else:
            which, advice = "whole", "raise generate.max_new_tokens"
            found |= self._right_shares(triples)
            shown = f"the likeliest response to each of {len(triples):,} prompts is kept"
            if "right_share" in found:
                shown += (
                    f"; {found['right_share']:.1%} of them are right, and "
                    f"{found['right_share_of_all']:.1%} of all responses to these prompts"
                )
        if not len(triples):
            raise InputError(
                f"objective.name: {self.config.objective.name}: iteration {number}: none of the "
                f"{of:,} responses is {which}, so there is nothing to train on; {advice}, or train "
                "on all responses"
            )
        note(f"iteration {number}: {shown}")
        check_steps(self.config, len(triples), t)
        return found

    def _right_shares(self, triples: Triples) -> dict[str, float]:
        """Of the triples, and of all responses to their prompts; nothing if nothing tells them."""
        checker, examples = self.published.checker, triples.examples
        if not len(triples) or not checker.can_check(examples):
            return {}
        kept = [checker.is_right(example, found.text) for example, found, _ in triples]
        ids = {example.id for example, *_ in triples}
        of_all = [
            checker.is_right(example, text)
            for responses in triples.responses
            for example, text in zip(examples, responses.texts, strict=True)
            if example.id in ids
        ]
        return {
            "right_share": sum(kept) / len(kept),
            "right_share_of_all": sum(of_all) / len(of_all),
        }

    def _train(self, job: TrainingJob, triples: Triples | None = None) -> Player:
        """θ_{t+1}. Its saved steps are removed once it is published."""
        iteration = self.run.iteration(job.t)
        folder = iteration.checkpoint
        # Without adapters, what is trained is a whole model, even if θ_0 was an adapter.
        base = job.policy.base if self.config.model.adapter is not None else None
        if not is_published(folder):
            title = self._title(job.t, f"train θ_{iteration.number}")
            shown = progress(title, job.steps, "steps")
            self.engine.train(job, triples, self.trackers.following(job.t, shown))
            self._after_a_stage()
        remove_artifacts(iteration.training)
        return Player(iteration.number, str(folder), read_manifest(folder)["fingerprint"], base)

    def _remove_weights(self, t: int, *, is_trained: bool) -> None:
        """Remove the weights of the checkpoints before the newest that `keep` does not keep."""
        kept = kept_checkpoints(self.config, t, is_trained=is_trained)
        for i in sorted(set(range(1, max(kept))) - kept):
            remove_weights(self.run.checkpoint(i), f"keep: {self.config.keep}")

    def _answer(
        self,
        player: Player,
        prompts: Sequence[TokenIds],
        params: SamplingParams,
        seed: int,
        on_done: OnDone,
    ) -> list[Completion]:
        """One completion for each prompt, in their order."""
        shards = [Prompts(*part) for part in parts(prompts, PROMPTS_IN_PART)]
        found = dict(self.engine.do(AnswerTask(player, params, seed), shards, on_done))
        return [completion for first in sorted(found) for completion in found[first]]

    def _logps(
        self, player: Player, sequences: Sequence[TokenSequence], on_done: OnDone
    ) -> NDArray[np.float64]:
        """log π of each sequence, in their order."""
        shards = [Sequences(*part) for part in parts(sequences, SEQUENCES_IN_PART)]
        found = dict(self.engine.do(LogpsTask(player), shards, on_done))
        return np.concatenate([found[first] for first in sorted(found)])

    def _compare_with_server(self, players: Sequence[Player], t: int) -> None:
        """Store how far the log-probs of a server that generated D_t are from our own."""
        iteration = self.run.iteration(t)
        newest = next((player for player in players if player.index == t), None)
        if newest is None or iteration.server_drift.exists():
            return
        if not is_published(iteration.responses):  # a baseline
            return
        responses = read_responses(iteration.responses)
        prompts = self.data.examples(t).prompt_ids
        asked = chain.from_iterable(repeat(prompts, self.config.generate.samples))
        drift = server_drift(asked, responses, self.published.store(newest))
        if drift is not None:
            note(drift.described())
            write_sealed(iteration.server_drift, drift._asdict())

    def _decode(self, ids: TokenIds) -> str:
        return str(self.inputs.tokenizer.decode(ids.tolist(), skip_special_tokens=True))

    def _title(self, t: int, text: str) -> str:
        return f"[{self.run.iteration(t).number}/{self.config.iterations}] {text}"

    def _progress(self, t: int, text: str, total: int, unit: str):  # type: ignore[no-untyped-def]
        return self.watch.progress(self._title(t, text), total, unit)
