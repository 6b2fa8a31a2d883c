"""Train one iteration: the same in the process of the run and in each process of a group.

The processes of a group read the data from the run directory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from transformers import Trainer, TrainingArguments

from tpaw.config.plan import chunk_size
from tpaw.config.schema import RunConfig
from tpaw.data.examples import Examples
from tpaw.data.inputs import Inputs
from tpaw.models.fingerprint import adapter_fingerprint, fingerprint
from tpaw.models.size import size_of
from tpaw.objectives.base import Objective
from tpaw.pipeline.job import TrainingJob
from tpaw.pipeline.players import LoadedPlayers
from tpaw.pipeline.published import Chosen, Published
from tpaw.pipeline.space import space_for_training
from tpaw.runtime.interrupt import StopSignal
from tpaw.runtime.memory import memory_limited_by
from tpaw.runtime.processes import as_main_process_sees, is_main_process
from tpaw.runtime.progress import Advance
from tpaw.storage.artifacts import is_published, publishing, remove_temporaries
from tpaw.team import Base, Player
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
    from peft import PeftModel
    from transformers import PreTrainedModel


class TrainingData:
    """The data of a run, read when a trainer is built.

    Args:
        config: the configuration of the run.
        inputs: its examples and its tokenizer.
        published: its responses and log-probs.
    """

    def __init__(self, config: RunConfig, inputs: Inputs, published: Published) -> None:
        self.config = config
        self.inputs = inputs
        self.published = published

    def examples(self, t: int) -> Examples:
        """D_SFT, or the part of it that an iteration uses; see `data.chunks`.

        Args:
            t: the iteration that trains θ_{t+1}; counts from 0.
        """
        config, examples = self.config, self.inputs.examples
        if config.data.chunks == 1:
            return examples
        order = np.random.default_rng((config.seed, config.data.chunks)).permutation(len(examples))
        part = t % config.data.chunks
        begin = sum(chunk_size(config, len(examples), c) for c in range(part))
        members = order[begin : begin + chunk_size(config, len(examples), part)]
        return Examples.of(examples[int(i)] for i in np.sort(members))

    def chosen(self, t: int) -> Chosen:
        """Of each prompt, the response of θ_t that the critics like best, as its target."""
        return self.published.chosen(self.inputs.examples, t, self.config.critic.agree)

    def kept(self, triples: Triples, players: Sequence[Player]) -> Triples:
        """What the objective trains on: all, or of each prompt the likeliest response.

        Args:
            triples: D_O.
            players: the main players, newest first; their log-probs are stored.
        """
        if self.config.objective.needs.responses != "likeliest":
            return triples
        return self.published.likeliest(triples, players[0])

    def trainer_of(self, job: TrainingJob, triples: Triples | None = None) -> BuildTrainer:
        """Return what makes the trainer of the run's method.

        Args:
            job: what is trained.
            triples: what is trained on, if the caller has it already.
        """
        config = self.config
        if config.trains_by_sft:
            is_chosen = config.method == "critic"
            examples = self.chosen(job.t).examples if is_chosen else self.inputs.examples
            return lambda policy, arguments: sft_trainer(
                policy, arguments, examples, self.inputs.tokenizer
            )
        if config.method == "dpo":
            objective: Objective = dpo_objective(config.objective, job.t)
            read: Callable[[], Triples] = lambda: preference_pairs(self.inputs.examples)  # noqa: E731
        elif config.method == "critic":
            objective = team_objective(config.objective, job.t)
            read = lambda: self.published.triples_of_chosen(  # noqa: E731
                self.chosen(job.t), job.opponents
            )
        else:
            objective = team_objective(config.objective, job.t)
            read = lambda: self.kept(  # noqa: E731
                self.published.triples(self.examples(job.t), job.opponents, objective.needs),
                job.players,
            )
        # The policy need not be a player: then there is nothing to compare its first step with.
        start_column = job.players.index(job.policy) if job.policy in job.players else None

        def build(policy: PreTrainedModel | PeftModel, arguments: TrainingArguments) -> Trainer:
            stores = [self.published.store(player) for player in job.players]
            dataset = TripleDataset.of(read() if triples is None else triples, stores)
            return team_trainer(
                policy, arguments, dataset, self.inputs, config, objective, start_column
            )

        return build


def train_and_publish(
    job: TrainingJob,
    data: TrainingData,
    players: LoadedPlayers,
    advance: Advance,
    stop: StopSignal,
    triples: Triples | None = None,
) -> None:
    """Train θ_{t+1} and publish it. Every process of a group calls it; the main one writes.

    Args:
        job: what is trained.
        data: the data of the run.
        players: loads the policy, and frees its memory afterwards.
        advance: called with 1 after each step.
        stop: tells whether the user asked for a stop.
        triples: what is trained on, if the caller has it already.

    Raises:
        TpawError: see `train_iteration`.
        StorageError: the disk is too full.
    """
    iteration, config = data.published.run.iteration(job.t), data.config
    if as_main_process_sees(is_published(iteration.checkpoint)):
        return  # a process of the group died after that
    meta: dict[str, object] = {"index": iteration.number}
    if job.kept is not None:
        meta |= job.kept
    # Without adapters, what is trained is a whole model, even if θ_0 was an adapter.
    base = job.policy.base if config.model.adapter is not None else None
    policy = players.for_training(job.policy, job.t)
    if is_main_process():
        remove_temporaries(iteration.folder, below=False)  # of a process that died
        space_for_training(iteration, config, size_of(policy), job.steps)
    with (
        _published_by_the_main_process(iteration.checkpoint, meta) as folder,
        memory_limited_by("train.tokens_per_row", config.train.tokens_per_row),
    ):
        meta |= train_iteration(
            policy,
            data.trainer_of(job, triples),
            data.inputs,
            config,
            iteration,
            base,
            publish_to=folder,
            advance=advance,
            stop=stop,
        )
        if is_main_process():
            meta |= _identified(folder, base, config)
    del policy  # otherwise its memory would not be freed
    # TRL replaces the forward of a base.
    players.release(keep_base=not config.trains_by_sft)


def _identified(checkpoint: Path, base: Base | None, config: RunConfig) -> dict[str, object]:
    """What the manifest of a checkpoint says of the player that it is."""
    if base is None:
        return {"fingerprint": fingerprint(checkpoint)}
    return {
        "fingerprint": adapter_fingerprint(base.fingerprint, checkpoint),
        "base": base.fingerprint,
        "quantization": config.model.quantization,
    }


@contextlib.contextmanager
def _published_by_the_main_process(folder: Path, meta: dict[str, object]) -> Iterator[Path]:
    if not is_main_process():
        yield folder  # nothing is written into it
        return
    with publishing(folder, meta) as temporary:
        yield temporary
