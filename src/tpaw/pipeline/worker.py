"""What a process of a run holds, and the tasks that it can do with a shard of a stage's work.

The process of `tpaw run` is one. With `launch.engine: ray` there are more, and they may be on other
machines, so a task holds paths and settings alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tpaw.config.schema import RunConfig
from tpaw.data.token_ids import TokenIds, TokenSequence
from tpaw.evaluation.benchmarks.run import SuitesOfRun
from tpaw.generation.generator import Completion, OpenGenerator, SamplingParams
from tpaw.generation.responses import PromptShard, deliver_responses
from tpaw.models.sharding import ALONE, Member
from tpaw.pipeline.players import LoadedPlayers
from tpaw.runtime.interrupt import StopSignal
from tpaw.runtime.progress import OnDone
from tpaw.runtime.shards import Do
from tpaw.scoring.score import ScoredShard, SequenceShard, deliver_logps, score_sequences
from tpaw.storage.run_directory import RunDirectory
from tpaw.team import Player

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Worker:
    """What a process of a run holds between shards and stages: the last player that it loaded.

    Args:
        config: the configuration of the run.
        run: the run directory.
        tokenizer: the tokenizer of the run.
        open_generator: opens whatever generates responses. Default: the Hugging Face model.
        stop: tells whether the user asked for a stop.
        member: this process in the group that scores together; see `score.sharded`.
    """

    def __init__(
        self,
        config: RunConfig,
        run: RunDirectory,
        tokenizer: PreTrainedTokenizerBase,
        open_generator: OpenGenerator | None = None,
        stop: StopSignal | None = None,
        member: Member = ALONE,
    ) -> None:
        self.config = config
        self.run = run
        self.tokenizer = tokenizer
        self.stop = stop or StopSignal()
        self.players = LoadedPlayers(config, self.stop, member)
        self.open_generator = open_generator or self.players.open_generator

    def decode(self, ids: TokenIds) -> str:
        """Token ids of a response to text, without special tokens."""
        return str(self.tokenizer.decode(ids.tolist(), skip_special_tokens=True))


class GenerateTask(NamedTuple):
    """Generates the responses of a shard of prompts, and delivers them to D_t.

    Attributes:
        player: the checkpoint that generates.
        folder: folder of D_t.
        params: sampling settings.
    """

    player: Player
    folder: Path
    params: SamplingParams

    @contextlib.contextmanager
    def opened(self, worker: Worker) -> Iterator[Do[PromptShard, Path]]:
        """See `ShardTask`."""
        with worker.open_generator(self.player, worker.config.generate) as generator:
            yield lambda shard, on_done: deliver_responses(
                self.folder, shard, generator, self.params, worker.decode, on_done
            )

    def title(self, shard: PromptShard) -> str:
        """See `ShardTask`."""
        return f"θ_{self.player.index} generates {shard.name}"


class ScoreTask(NamedTuple):
    """Computes the log-probs of a shard of sequences, and delivers them to the player's store.

    Attributes:
        player: the main player that scores.
        folder: folder of its store.
    """

    player: Player
    folder: Path

    @contextlib.contextmanager
    def opened(self, worker: Worker) -> Iterator[Do[SequenceShard, ScoredShard]]:
        """See `ShardTask`."""
        scorer = worker.players.for_scoring(self.player)
        budget = worker.config.score.tokens_per_row
        if scorer.member.rank == 0:
            yield lambda shard, on_done: deliver_logps(
                self.folder, shard, scorer, tokens_per_row=budget, on_done=on_done
            )
        else:  # the first member of the group delivers what all have computed
            compute: Any = lambda shard, on_done: score_sequences(  # noqa: E731
                scorer, shard.sequences, tokens_per_row=budget, on_done=on_done
            )
            yield compute

    def title(self, shard: SequenceShard) -> str:
        """See `ShardTask`."""
        return f"θ_{self.player.index} scores {shard.name}"


class Prompts(NamedTuple):
    """A part of the held-out prompts; `first` is the place of the first of them."""

    first: int
    prompts: Sequence[TokenIds]


class AnswerTask(NamedTuple):
    """Answers a part of the held-out prompts.

    Attributes:
        player: the checkpoint that is evaluated.
        params: sampling settings.
        seed: of all prompts.
    """

    player: Player
    params: SamplingParams
    seed: int

    @contextlib.contextmanager
    def opened(self, worker: Worker) -> Iterator[Do[Prompts, tuple[int, list[Completion]]]]:
        """See `ShardTask`. A result has the place of the first prompt."""
        with worker.open_generator(self.player, worker.config.generate) as generator:

            def do(part: Prompts, on_done: OnDone) -> tuple[int, list[Completion]]:
                found = generator.generate(
                    part.prompts, self.params, self.seed, on_done, first=part.first
                )
                return part.first, found

            yield do

    def title(self, shard: Prompts) -> str:
        """See `ShardTask`."""
        return f"θ_{self.player.index} answers held-out prompts from number {shard.first} on"


class Sequences(NamedTuple):
    """A part of the held-out sequences; `first` is the place of the first of them."""

    first: int
    sequences: Sequence[TokenSequence]


class LogpsTask(NamedTuple):
    """Computes the log-probs of a part of the held-out sequences under `player`."""

    player: Player

    @contextlib.contextmanager
    def opened(self, worker: Worker) -> Iterator[Do[Sequences, tuple[int, NDArray[np.float64]]]]:
        """See `ShardTask`. A result has the place of the first sequence."""
        scorer = worker.players.for_scoring(self.player)
        budget = worker.config.score.tokens_per_row

        def do(part: Sequences, on_done: OnDone) -> tuple[int, NDArray[np.float64]]:
            return part.first, score_sequences(
                scorer, part.sequences, tokens_per_row=budget, on_done=on_done
            )

        yield do

    def title(self, shard: Sequences) -> str:
        """See `ShardTask`."""
        return f"θ_{self.player.index} scores held-out sequences from number {shard.first} on"


class SuitesTask(NamedTuple):
    """Evaluates θ_i on the suites of the configuration; a shard is the index i."""

    @contextlib.contextmanager
    def opened(self, worker: Worker) -> Iterator[Do[int, None]]:
        """See `ShardTask`."""
        worker.players.release()  # the harness loads the player itself
        suites = SuitesOfRun(worker.run, worker.config.evaluate.suites, worker.stop)
        yield lambda i, on_done: suites.publish(i)

    def title(self, shard: int) -> str:
        """See `ShardTask`."""
        return f"θ_{shard} is evaluated on suites"
