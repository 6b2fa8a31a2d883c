"""The stages of an iteration over a run directory.

A stage whose output is published returns at once. What a stage computes depends on its inputs and
the seed alone, never on how often the run was interrupted.
"""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from tpaw.config.plan import optimizer_steps, plan_run
from tpaw.config.schema import RunConfig
from tpaw.data.examples import Example
from tpaw.data.inputs import Inputs, load_inputs, publish_inputs
from tpaw.data.token_ids import TokenIds, read_table, write_table
from tpaw.errors import ArtifactError
from tpaw.evaluation.exact_match import has_answers
from tpaw.evaluation.heldout import exact_match_items, exact_match_results, logp_items, logp_results
from tpaw.evaluation.items import read_items, write_items
from tpaw.generation.generator import Generator, SamplingParams
from tpaw.generation.hf import HFGenerator
from tpaw.generation.responses import generate_responses, read_responses
from tpaw.models.fingerprint import fingerprint
from tpaw.models.initial import initial_player
from tpaw.models.loading import load_model, pick_device
from tpaw.pipeline.preflight import read_inputs
from tpaw.report.summary import write_summary
from tpaw.runtime.interrupt import StopSignal
from tpaw.runtime.progress import note, progress
from tpaw.scoring.score import Precision, fill_store, score_sequences
from tpaw.scoring.store import LogprobStore, sequence_key
from tpaw.storage.artifacts import (
    is_published,
    publishing,
    read_files,
    read_manifest,
    verify,
    write_json,
)
from tpaw.storage.run_directory import RunDirectory, check_output, open_run
from tpaw.team import Player, Team
from tpaw.training.arguments import check_training
from tpaw.training.iteration import BuildTrainer, team_trainer, train_iteration
from tpaw.training.split_weights import round_weights
from tpaw.training.triples import Triple, TripleDataset

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SEED_OF_HELDOUT_ANSWERS = 1


@contextlib.contextmanager
def opened_stages(config: RunConfig, output: str | Path, stop: StopSignal) -> Iterator[Stages]:
    """Check everything that can be checked beforehand, then lock the run directory.

    Raises:
        InputError: before anything is written.
        RunLockedError, ArtifactError: see `rundir.open_run`.
    """
    check_output(output, config)
    inputs = None
    if not is_published(RunDirectory(output).inputs):
        with progress("reading and tokenising", None, "rows") as advance:
            inputs = read_inputs(config, _stoppable(advance, stop))
        plan_run(config, len(inputs.examples))  # for what it refuses
    else:
        check_training(config)  # some of its settings may have changed
    with open_run(output, config) as run:
        _verify(run, config.iterations)
        if inputs is not None and not is_published(run.inputs):
            publish_inputs(run.inputs, inputs)
        kept = load_inputs(run.inputs, config)
        note(kept.described())
        yield Stages(config, run, kept, stop)


class Stages:
    """Everything Algorithm 1 asks for, over one run directory."""

    def __init__(
        self, config: RunConfig, run: RunDirectory, inputs: Inputs, stop: StopSignal
    ) -> None:
        self.config = config
        self.run = run
        self.inputs = inputs
        self.stop = stop
        self.device = pick_device(config.device)
        self.precision = Precision(self.device.type, config.precision == "bf16")
        self._stores: dict[str, LogprobStore] = {}
        self._loaded: tuple[str, torch.dtype, PreTrainedModel] | None = None
        if config.deterministic:  # without it torch refuses matrix products on CUDA
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(config.deterministic)
        # Nothing reads memory that it has not written; filling it first took half of the time in
        # which TRL trains the starter.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

    def load_examples(self) -> list[Example]:
        """D_SFT."""
        return self.inputs.examples

    def initial_player(self) -> Player:
        """θ_0, the SFT model."""
        return initial_player(self.config.model, self.run.initial_player_file)

    def generate(self, player: Player, examples: Sequence[Example], t: int) -> None:
        """D_t: the newest checkpoint answers every prompt once."""
        folder = self.run.responses(t + 1)
        if is_published(folder):
            return
        with self._progress(f"θ_{t} answers", len(examples), "prompts") as on_done:
            generate_responses(
                folder,
                player,
                examples,
                lambda: self._generator(player),
                self._decode,
                self._sampling(),
                shard_size=self.config.generate.shard_size,
                seed=self.config.seed,
                on_done=on_done,
            )

    def build_triples(
        self, examples: Sequence[Example], opponents: Sequence[Player]
    ) -> list[Triple]:
        """D_O: every example with the response of every opponent."""
        triples = []
        for opponent in opponents:
            responses = read_responses(self.run.responses(opponent.index + 1))
            for example, response in zip(examples, responses, strict=True):
                if example.id != response.example_id:
                    folder = self.run.responses(opponent.index + 1)
                    raise ArtifactError(f"{folder}: answers other examples than {self.run.inputs}")
                triples.append(Triple(example, response, opponent.index))
        return triples

    def score(self, triples: Sequence[Triple], main_players: Sequence[Player], t: int) -> None:
        """log π_j of every target and generated response, where the store lacks it."""
        wanted = {
            sequence_key(sequence): sequence
            for triple in triples
            for sequence in (triple.target, triple.generated)
        }
        stage = f"iteration-{t + 1}"
        for player in main_players:
            store = self._store(player)
            missing = sum(key not in store for key in wanted)
            if not missing:
                continue
            with self._progress(f"θ_{player.index} scores", missing, "sequences") as on_done:
                fill_store(
                    store,
                    stage,
                    wanted,
                    lambda player=player: self._model(player, torch.float32),  # type: ignore[misc]
                    config=self.config.score,
                    precision=self.precision,
                    on_done=on_done,
                )

    def train(self, policy: Player, triples: Sequence[Triple], team: Team, t: int) -> Player:
        """θ_{t+1}, from θ_t by minimising the objective over D_O."""
        return self.fit(policy, t, lambda: self.rows(triples, team.main_players), team_trainer)

    def rows(self, triples: Sequence[Triple], players: Sequence[Player]) -> TripleDataset:
        """Triples with their log-probs under each player, which were scored."""
        targets = [sequence_key(triple.target) for triple in triples]
        generated = [sequence_key(triple.generated) for triple in triples]
        stores = [self._store(player) for player in players]
        return TripleDataset(
            triples,
            np.stack([store.logps(targets) for store in stores], axis=1),
            np.stack([store.logps(generated) for store in stores], axis=1),
        )

    def fit(
        self, policy: Player, t: int, load_rows: Callable[[], Sized], build: BuildTrainer
    ) -> Player:
        """θ_{t+1}, from θ_t with the trainer that `build` makes."""
        folder = self.run.checkpoint(t + 1)
        if not is_published(folder):
            self.stop.check()
            self._fit(policy, load_rows(), t, folder, build)
        shutil.rmtree(self.run.training(t + 1), ignore_errors=True)
        return Player(t + 1, str(folder), read_manifest(folder)["fingerprint"])

    def evaluate(self, player: Player) -> None:
        """Held-out outcomes of a checkpoint, item by item, and their means."""
        folder = self.run.evaluation(player.index)
        if is_published(folder) or not self.inputs.heldout:
            return
        self.stop.check()
        started = time.monotonic()
        meta = {"player": player.index, "fingerprint": player.fingerprint}
        with publishing(folder, meta) as temporary:
            results = self._evaluate(player, temporary)
            results["seconds"] = round(time.monotonic() - started, 3)
            write_json(temporary / "results.json", meta | results)

    def report(self) -> None:
        """summary.json, from what is published."""
        write_summary(self.run, self.config)

    def _fit(self, policy: Player, rows: Sized, t: int, folder: Path, build: BuildTrainer) -> None:
        self._loaded = None  # its memory is the policy's
        model = load_model(policy, self.config.model, dtype=torch.float32, device=self.device)
        steps = optimizer_steps(self.config, len(rows), t)
        meta: dict[str, object] = {"index": t + 1}
        with (
            publishing(folder, meta) as temporary,
            progress(f"θ_{t + 1} trains", steps, "steps") as advance,
        ):
            meta["seconds"] = train_iteration(
                model,
                self.inputs,
                rows,
                self.config,
                self.run,
                t,
                publish_to=temporary,
                on_step=advance,
                stop=self.stop,
                build=build,
            )
            meta["fingerprint"] = fingerprint(temporary)
        del model
        gc.collect()  # the trainer and its policy hold each other
        torch.cuda.empty_cache()

    def _evaluate(self, player: Player, folder: Path) -> dict[str, object]:
        heldout, results = self.inputs.heldout, dict[str, object]()
        prompts = [example.prompt_ids for example in heldout]
        name = f"θ_{player.index}"
        if player.index == 0:
            # Sampled once: what later checkpoints' gaps are measured against.
            with self._progress(f"{name} answers held-out", len(heldout), "prompts") as on_done:
                answers = self._generator(player).generate(
                    prompts, self._sampling(), self.config.seed + SEED_OF_HELDOUT_ANSWERS, on_done
                )
            ids = [answer.token_ids for answer in answers]
            write_table(folder / "initial_answers.parquet", {"token_ids": ids})
        initial_folder = folder if player.index == 0 else self.run.evaluation(0)
        initial_answers = read_table(initial_folder / "initial_answers.parquet")["token_ids"]

        exact_match = self.config.evaluate.exact_match
        if has_answers(heldout) if exact_match is None else exact_match:
            with self._progress(f"{name} solves held-out", len(heldout), "prompts") as on_done:
                greedy = self._sampling()._replace(
                    temperature=0.0,
                    max_new_tokens=self.config.evaluate.max_new_tokens
                    or self.config.generate.max_new_tokens,
                )
                completions = self._generator(player).generate(prompts, greedy, 0, on_done)
            items = exact_match_items(heldout, completions, self._decode)
            write_items(folder / "exact_match.jsonl", items)
            start = read_items(initial_folder / "exact_match.jsonl")
            results["exact_match"] = exact_match_results(items, start)

        targets = [(example.prompt_ids, example.target_ids) for example in heldout]
        sequences = targets + list(zip(prompts, initial_answers, strict=True))
        with self._progress(f"{name} scores held-out", len(sequences), "sequences") as on_done:
            logps = score_sequences(
                self._model(player, torch.float32),
                sequences,
                tokens_per_row=self.config.score.tokens_per_row,
                precision=self.precision,
                on_done=on_done,
            )
        scored = logp_items(heldout, logps[: len(heldout)], logps[len(heldout) :])
        write_items(folder / "logps.jsonl", scored)
        results["logps"] = logp_results(scored, read_items(initial_folder / "logps.jsonl"))
        return results

    def _model(self, player: Player, dtype: torch.dtype) -> PreTrainedModel:
        """Load a player; one at a time stays in memory."""
        if self._loaded is None or self._loaded[:2] != (player.fingerprint, dtype):
            self._loaded = None
            model = load_model(player, self.config.model, dtype=dtype, device=self.device)
            if dtype == torch.float32 and self.config.train.weights == "split":
                round_weights(model)  # scored as it trains
            self._loaded = (player.fingerprint, dtype, model)
        return self._loaded[2]

    def _generator(self, player: Player) -> Generator:
        dtype = torch.bfloat16 if self.precision.use_bf16 else torch.float32
        return HFGenerator(self._model(player, dtype))

    def _store(self, player: Player) -> LogprobStore:
        if player.fingerprint not in self._stores:
            folder = self.run.logprobs(player.fingerprint)
            self._stores[player.fingerprint] = LogprobStore(folder)
        return self._stores[player.fingerprint]

    def _sampling(self) -> SamplingParams:
        generate = self.config.generate
        return SamplingParams(
            temperature=generate.temperature,
            top_p=generate.top_p,
            top_k=generate.top_k,
            max_new_tokens=generate.max_new_tokens,
            max_length=self.config.max_length,
            stop_token_ids=self.inputs.stop_ids,
            tokens_per_batch=generate.tokens_per_batch,
        )

    def _decode(self, ids: TokenIds) -> str:
        return str(self.inputs.tokenizer.decode(ids.tolist(), skip_special_tokens=True))

    @contextlib.contextmanager
    def _progress(self, description: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        self.stop.check()
        with progress(description, total, unit) as advance:
            yield _stoppable(advance, self.stop)


def _verify(run: RunDirectory, iterations: int) -> None:
    """Check every published file, so that a damaged one is refused before it can be used."""
    manifests = run.manifests(iterations)
    if manifests:
        size = sum(int(f["bytes"]) for m in manifests for f in read_files(m))
        with progress("checking what is published", size, "bytes") as advance:
            for manifest in manifests:
                verify(manifest, advance)


def _stoppable(advance: Callable[..., None], stop: StopSignal) -> Callable[[int], None]:
    def on_done(count: int) -> None:
        advance(count)
        stop.check()

    return on_done
