"""Measure, on a few hundred rows, what a run would be made of. Nothing of it is kept.

A short run of one iteration in a temporary folder gives the responses and the margins: the same
code as the run itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch

from tpaw.config.plan import chunk_size, optimizer_steps, players_of
from tpaw.config.schema import DataConfig, EvaluateConfig, ObjectiveConfig, RunConfig, at_iteration
from tpaw.critic.comparisons import comparisons, split
from tpaw.critic.fit import fit
from tpaw.critic.model import reader_of, scores_of, small_critic
from tpaw.data.examples import Examples
from tpaw.data.token_ids import TokenSequence
from tpaw.errors import InputError
from tpaw.evaluation.checker import Checker
from tpaw.generation.responses import Responses, read_responses
from tpaw.pipeline.stages import Stages, opened_stages
from tpaw.probe.gradients import FirstStep, batch_gradients, first_step
from tpaw.probe.verdict import Answers, CriticFound, Margins
from tpaw.runtime.interrupt import StopSignal
from tpaw.runtime.progress import OnDone, progress
from tpaw.runtime.watch import Watch
from tpaw.storage.run_directory import RunDirectory
from tpaw.team import Player, Team

# Gradients of this many batches can tell signal from noise.
BATCHES = 16
STEPS_OF_CRITIC = 600
SAMPLES = 4


class Probe(NamedTuple):
    """Everything that the probe measures.

    Attributes:
        step: the gradients of the first step.
        answers: what the model answers.
        critic: what a small critic learns; None if the responses leave nothing to compare.
        margins: after a few steps of training.
    """

    step: FirstStep
    answers: Answers
    critic: CriticFound | None
    margins: Margins


def probe(config: RunConfig, rows: int, stop: StopSignal) -> Probe:
    """Measure on the first rows of the data.

    Args:
        config: the configuration of a run of self-play.
        rows: how many rows to use.
        stop: tells whether the user asked for a stop.

    Raises:
        InputError: the configuration cannot be run, or is not one of self-play.
    """
    short = shortened(config, rows)
    with TemporaryDirectory() as folder, opened_stages(short, folder, stop) as stages:
        return _Measuring(config, short, stages, RunDirectory(folder), Watch(stop)).all()


def shortened(config: RunConfig, rows: int) -> RunConfig:
    """The configuration of one iteration over the first rows, with several responses to a prompt.

    Raises:
        InputError: it is not one of self-play, or asks for a cluster.
    """
    if config.method != "self_play":
        raise InputError(
            f"method: {config.method}: the probe asks what self-play would add; leave method out"
        )
    if config.launch.engine != "in_process":
        raise InputError(
            f"launch.engine: {config.launch.engine}: the probe runs in this process; set it to "
            "in_process"
        )
    limit = min(rows, config.data.limit or rows)
    several = config.generate.temperature > 0 and not config.objective.needs.one_response
    samples = max(SAMPLES, config.generate.samples) if several else config.generate.samples
    changes: dict[str, object] = {
        "iterations": 1,
        "data": config.data.model_copy(update={"limit": limit, "chunks": 1}),
        "evaluate": EvaluateConfig(),
        "generate": config.generate.model_copy(update={"samples": samples}),
        "train": config.train.model_copy(
            update={
                "learning_rate": at_iteration(config.train.learning_rate, 0),
                "epochs": 1,
                "report_to": (),
            }
        ),
    }
    if isinstance(config.objective, ObjectiveConfig):
        lambda_ = at_iteration(config.objective.lambda_, 0)
        changes["objective"] = config.objective.model_copy(update={"lambda_": lambda_})
    return config.model_copy(update=changes)


class _Measuring:
    def __init__(
        self,
        config: RunConfig,
        short: RunConfig,
        stages: Stages,
        run: RunDirectory,
        watch: Watch,
    ) -> None:
        self.config = config
        self.short = short
        self.stages = stages
        self.run = run
        self.watch = watch
        self.examples: Examples = stages.inputs.examples
        self.checker: Checker = stages.published.checker

    def all(self) -> Probe:
        """Everything, one after the other."""
        start = self.stages.initial_player()
        self.stages.generate(start, self.examples, 0)
        parts = read_responses(self.run.responses(1)).in_parts_of(len(self.examples))
        answers = self._answers(start, parts)
        step = self._first_step(start, parts)
        critic = self._critic(parts)
        return Probe(step, answers, critic, self._margins(start))
