"""The stages of an iteration over a run directory: who does what, in which order.

A stage whose output is published returns at once. What a stage computes depends on its inputs and
the seed alone, never on how often the run was interrupted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import Trainer, TrainingArguments

from tpaw.config.plan import optimizer_steps
from tpaw.config.schema import RunConfig
from tpaw.data.examples import Example
from tpaw.data.inputs import Inputs, load_inputs, publish_inputs
from tpaw.data.token_ids import TokenIds
from tpaw.evaluation.benchmarks.run import SuitesOfRun
from tpaw.evaluation.heldout import HeldoutEvaluation
from tpaw.generation.generator import OpenGenerator, SamplingParams
from tpaw.generation.responses import generate_responses, read_responses
from tpaw.models.fingerprint import fingerprint
from tpaw.models.initial import initial_player
from tpaw.objectives.base import Objective
from tpaw.pipeline.players import LoadedPlayers
from tpaw.pipeline.preflight import read_and_check
from tpaw.pipeline.space import space_for_responses, space_for_scores, space_for_training
from tpaw.report.summary import write_summary
from tpaw.runtime.interrupt import StopSignal
from tpaw.runtime.isolation import isolated
from tpaw.runtime.memory import memory_limited_by
from tpaw.runtime.progress import note, progress
from tpaw.runtime.watch import Watch
from tpaw.scoring.score import fill_store
from tpaw.scoring.store import LogprobStore
from tpaw.storage.artifacts import is_published, publishing, read_manifest, remove_artifacts
from tpaw.storage.run_directory import RunDirectory, open_run, verify_run
from tpaw.team import Player, Team
from tpaw.training.iteration import (
    BuildTrainer,
    dpo_objective,
    team_objective,
    team_trainer,
    train_iteration,
)
from tpaw.training.triples import TripleDataset, Triples, preference_pairs
from tpaw.training.trl import sft_trainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextlib.contextmanager
def opened_stages(
    config: RunConfig,
    output: str | Path,
    stop: StopSignal,
    open_generator: OpenGenerator | None = None,
) -> Iterator[Stages]:
    """Check everything that can be checked beforehand, then lock the run directory.

    Args:
        open_generator: default: the Hugging Face model in this process.

    Raises:
        InputError: before anything is written.
        RunLockedError, ArtifactError: see `open_run`.
    """
    watch = Watch(stop)
    with isolated(deterministic=config.deterministic):
        inputs = read_and_check(config, output, watch)
        with open_run(output, config) as run:
            verify_run(run, config.iterations, watch)
            if inputs is not None and not is_published(run.inputs):
                publish_inputs(run.inputs, inputs)
            kept = load_inputs(run.inputs, config)
            note(kept.described())
            yield Stages(config, run, kept, watch, open_generator)


class Stages:
    """Everything that Algorithm 1 and the baselines ask for, over one run directory."""

    def __init__(
        self,
        config: RunConfig,
        run: RunDirectory,
        inputs: Inputs,
        watch: Watch,
        open_generator: OpenGenerator | None = None,
    ) -> None:
        self.config = config
        self.run = run
        self.inputs = inputs
        self.watch = watch
        self.players = LoadedPlayers(config)
        self.open_generator = open_generator or self.players.open_generator
        self.suites = SuitesOfRun(run, config.evaluate.suites, watch.stop)
        self.params = SamplingParams.of(config.generate, config.max_length, inputs.stop_ids)
        self._stores: dict[str, LogprobStore] = {}

    def load_examples(self) -> Sequence[Example]:
        """D_SFT."""
        return self.inputs.examples

    def initial_player(self) -> Player:
        """θ_0, the SFT model."""
        may_record = not self.run.uses_initial_player()
        record = self.run.initial_player_file
        return initial_player(self.config.model, record, may_record=may_record)

    def generate(self, player: Player, examples: Sequence[Example], t: int) -> None:
        """D_t: the newest checkpoint answers every prompt once.

        Raises:
            Interrupted: a stop was asked for; finished shards are published.
        """
        folder = self.run.iteration(t).responses
        if is_published(folder):
            return
        space_for_responses(self.run, self.config, len(examples))
        with self._progress(t, f"generate with θ_{t}", len(examples), "prompts") as on_done:
            generate_responses(
                folder,
                player,
                examples,
                self.open_generator,
                self.config.generate,
                self._decode,
                self.params,
                seed=self.config.seed,
                on_done=on_done,
            )

    def build_triples(self, examples: Sequence[Example], opponents: Sequence[Player]) -> Triples:
        """D_O: every example with the response of every opponent.

        Raises:
            ArtifactError: responses on disk belong to other examples.
        """
        indices = [opponent.index for opponent in opponents]
        return Triples(
            examples, [(i, read_responses(self.run.iteration(i).responses)) for i in indices]
        )

    def score(self, triples: Triples, players: Sequence[Player], t: int) -> None:
        """log π_j of every target and generated response that the store lacks.

        Raises:
            Interrupted: a stop was asked for; finished shards are published.
        """
        wanted = triples.sequences()
        for player in players:
            store = self._store(player)
            missing = int((~store.contains(wanted.keys)).sum())
            if not missing:
                continue
            space_for_scores(self.run, missing)
            title = f"score with θ_{player.index}"
            with self._progress(t, title, missing, "sequences") as on_done:
                fill_store(
                    store,
                    f"iteration-{self.run.iteration(t).number}",
                    wanted,
                    lambda player=player: self.players.for_scoring(player),  # type: ignore[misc]
                    config=self.config.score,
                    on_done=on_done,
                )

    def train(self, policy: Player, triples: Triples, team: Team, t: int) -> Player:
        """θ_{t+1}, from θ_t by minimising the objective over D_O."""
        objective = team_objective(self.config.objective, t)
        return self._train_on_triples(policy, triples, team.main_players, objective, t)

    def train_by_sft(self, policy: Player, t: int) -> Player:
        """θ_{t+1}, from θ_t by SFT on the targets."""
        examples = self.load_examples()

        def build(model: PreTrainedModel, arguments: TrainingArguments) -> Trainer:
            return sft_trainer(model, arguments, examples, self.inputs.tokenizer)

        return self._train(policy, t, len(examples), build)

    def train_by_dpo(self, policy: Player, t: int) -> Player:
        """θ_{t+1}, from θ_t by DPO on the preference data, with θ_t as the reference."""
        pairs = preference_pairs(self.load_examples())
        self.score(pairs, [policy], t)
        objective = dpo_objective(self.config.objective, t)
        return self._train_on_triples(policy, pairs, [policy], objective, t)

    def evaluate(self, player: Player) -> None:
        """Held-out outcomes of a checkpoint, item by item, and their means; then its suites."""
        if self.inputs.heldout and not is_published(self.run.evaluation(player.index)):
            space_for_responses(self.run, self.config, 2 * len(self.inputs.heldout))
            HeldoutEvaluation(
                config=self.config,
                heldout=self.inputs.heldout,
                folder_of=self.run.evaluation,
                open_generator=self.open_generator,
                load_for_scoring=self.players.for_scoring,
                decode=self._decode,
                params=self.params,
                watch=self.watch,
            ).publish(player)
        if self.suites.missing(player.index):
            self.players.release()  # the harness loads the player itself
            self.suites.publish(player.index)

    def report(self) -> None:
        """summary.json, from what is published."""
        write_summary(self.run, self.config)

    def _train_on_triples(
        self,
        policy: Player,
        triples: Triples,
        players: Sequence[Player],
        objective: Objective,
        t: int,
    ) -> Player:
        # The policy need not be a player: then there is nothing to compare its first step with.
        start_column = players.index(policy) if policy in players else None

        def build(model: PreTrainedModel, arguments: TrainingArguments) -> Trainer:
            dataset = TripleDataset.of(triples, [self._store(player) for player in players])
            return team_trainer(
                model, arguments, dataset, self.inputs, self.config, objective, start_column
            )

        return self._train(policy, t, len(triples), build)

    def _train(self, policy: Player, t: int, rows: int, build: BuildTrainer) -> Player:
        """θ_{t+1}, from θ_t with the trainer that `build` makes; the saved steps are removed."""
        iteration = self.run.iteration(t)
        folder = iteration.checkpoint
        if not is_published(folder):
            self.watch.stop.check()
            meta: dict[str, object] = {"index": iteration.number}
            steps = optimizer_steps(self.config, rows, t)
            model = self.players.for_training(policy)
            space_for_training(iteration, self.config, model.num_parameters(), steps)
            title = self._title(t, f"train θ_{iteration.number}")
            with (
                publishing(folder, meta) as temporary,
                progress(title, steps, "steps") as advance,
                memory_limited_by("train.tokens_per_row", self.config.train.tokens_per_row),
            ):
                meta |= train_iteration(
                    model,
                    build,
                    self.inputs,
                    self.config,
                    iteration,
                    publish_to=temporary,
                    advance=advance,
                    stop=self.watch.stop,
                )
                meta["fingerprint"] = fingerprint(temporary)
            del model  # otherwise its memory would not be freed
            self.players.release()
        remove_artifacts(iteration.training)
        return Player(iteration.number, str(folder), read_manifest(folder)["fingerprint"])

    def _store(self, player: Player) -> LogprobStore:
        if player.fingerprint not in self._stores:
            self._stores[player.fingerprint] = LogprobStore(self.run.logprobs(player.fingerprint))
        return self._stores[player.fingerprint]

    def _decode(self, ids: TokenIds) -> str:
        return str(self.inputs.tokenizer.decode(ids.tolist(), skip_special_tokens=True))

    def _title(self, t: int, text: str) -> str:
        return f"[{self.run.iteration(t).number}/{self.config.iterations}] {text}"

    def _progress(self, t: int, text: str, total: int, unit: str):  # type: ignore[no-untyped-def]
        return self.watch.progress(self._title(t, text), total, unit)
