"""Memory and time of everything that a run does with rows, without a model that does work.

Each count of rows runs in a process of its own: read and tokenise, publish and load the inputs, and
four iterations of Algorithm 1 with a team of three. Responses and log-probs are random numbers, and
the policy is a model of one layer of width 8 that trains two steps an iteration. All else is the
package's own: templates, tokenizer, files, keys, log-prob stores, triples, checks and batches.

Rows are conversations with about 100 tokens of prompt and 200 of answer; a response has up to 300
tokens, 200 on average. Memory is sampled every 20 ms: `anonymous` is what the process itself holds,
`resident` includes the pages of mapped files, which the kernel takes back when it needs memory.

`--no-read` begins with random token ids instead of a file, which is far faster.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import row_files
from common import RESULTS, print_table, write_json
from transformers import Qwen2ForCausalLM, TrainingArguments

import tpaw.scoring.score
from tpaw.config.schema import RunConfig
from tpaw.data.examples import Example, Examples, ExampleWriter
from tpaw.data.inputs import Inputs, load_inputs, publish_inputs
from tpaw.data.token_ids import token_ids
from tpaw.evaluation.checker import checker_of
from tpaw.generation.generator import Completion, FakeGenerator
from tpaw.models.sharding import ALONE
from tpaw.models.tokenizers import load_tokenizer
from tpaw.pipeline.engines import InProcess
from tpaw.pipeline.preflight import read_inputs
from tpaw.pipeline.published import Published
from tpaw.pipeline.stages import Stages
from tpaw.pipeline.training import TrainingData
from tpaw.pipeline.worker import Worker
from tpaw.runtime.watch import Watch
from tpaw.selfplay import algorithm_1
from tpaw.storage.run_directory import RunDirectory
from tpaw.team import Player, Team
from tpaw.training.iteration import team_objective
from tpaw.training.trainer import TeamTrainer
from tpaw.training.triples import TripleDataset

MEASURED = ("seconds", "cpu", "anonymous", "resident")


class Sampler:
    """Peaks of this process's memory, and seconds, for each stage."""

    def __init__(self) -> None:
        self.stages: dict[str, dict[str, float]] = {}
        self._status = Path("/proc/self/status")
        self._now: dict[str, float] = {}
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def bytes_now(self) -> dict[str, float]:
        """Anonymous and resident memory."""
        found = dict(re.findall(r"^(\w+):\s+(\d+) kB$", self._status.read_text(), re.MULTILINE))
        return {
            "anonymous": 1024.0 * (int(found["RssAnon"]) + int(found["RssShmem"])),
            "resident": 1024.0 * int(found["VmRSS"]),
        }

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure a stage; one that comes again is added."""
        stage = self.stages.setdefault(name, dict.fromkeys(MEASURED, 0.0))
        self._now = stage
        began, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self._take()
            stage["seconds"] += time.perf_counter() - began
            stage["cpu"] += time.process_time() - cpu
            self._now = {}
            print(name, {k: round(v) for k, v in stage.items()}, file=sys.stderr, flush=True)

    def _take(self) -> None:
        now, stage = self.bytes_now(), self._now
        for name in now:
            stage[name] = max(stage.get(name, 0.0), now[name])

    def _sample(self) -> None:
        while not self._is_over.wait(0.02):
            self._take()


class Rows(Stages):
    """The stages of a run, with random numbers in place of the model's."""

    sampler: Sampler

    def initial_player(self) -> Player:
        """A player without a model."""
        return Player(0, self.config.model.path, "0" * 8)

    def evaluate(self, player: Player) -> None:
        """Nothing is held out."""

    def report(self, t: int) -> bool:
        """Nothing was evaluated."""
        return True

    def generate(self, *args: Any) -> None:
        """Measured."""
        with self.sampler.stage("generate"):
            super().generate(*args)

    def build_triples(self, *args: Any) -> Any:
        """Measured."""
        with self.sampler.stage("triples"):
            return super().build_triples(*args)

    def score(self, *args: Any) -> None:
        """Measured."""
        with self.sampler.stage("score"):
            super().score(*args)

    def train(self, policy: Player, triples: Any, team: Team, t: int) -> Player:
        """Two steps, and the next player without a checkpoint."""
        with self.sampler.stage("train"), tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder, max_steps=2, per_device_train_batch_size=16, report_to="none", use_cpu=True
            )
            stores = [self.published.store(player) for player in team.main_players]
            TeamTrainer(
                model=Qwen2ForCausalLM.from_pretrained(self.config.model.path),
                args=arguments,
                train_dataset=TripleDataset.of(triples, stores),
                processing_class=None,
                objective=team_objective(self.config.objective, t),
                start_column=0,
                first_step_tolerance=1e9,
            ).train()
        return Player(t + 1, policy.path, f"{t + 1:08d}")


def random_completions(
    prompts: Any, params: Any, seed: int, on_done: Any, first: int = 0
) -> list[Completion]:
    """In place of a model's."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(100, row_files.MAX_NEW_TOKENS + 1, len(prompts))
    flat = token_ids(rng.integers(3, row_files.VOCABULARY, lengths.sum()))
    on_done(len(prompts))
    return [Completion(ids, "stop") for ids in np.split(flat, lengths.cumsum()[:-1])]


def random_logps(scorer: Any, sequences: Any, *, tokens_per_row: int, on_done: Any) -> Any:
    """In place of a model's."""
    on_done(len(sequences))
    return -np.random.default_rng(len(sequences)).random(len(sequences)) * 300


def random_inputs(config: RunConfig, rows: int) -> Inputs:
    """In place of rows that are read: 100 tokens of prompt and 200 of target."""
    rng = np.random.default_rng(0)
    text = "a passage of some words. " * 40
    writer = ExampleWriter()
    for i in range(rows):
        prompt, target = np.split(
            rng.integers(3, row_files.VOCABULARY, 300).astype(np.int32), [100]
        )
        writer.append(Example(f"{i}-random", prompt, target, text[:400], text[:800]))
    return Inputs(writer.finish(), Examples.of([]), {}, load_tokenizer(config.model), (2,))


def measure(sender: Any, rows: int, read: bool, iterations: int) -> None:
    """Run all stages on so many rows and send what they took."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = row_files.make_files(folder, rows if read else 1, 1, (400, 800), iterations)
        run = RunDirectory(folder / "run")
        fake = FakeGenerator(lambda prompt, seed: ())
        fake.generate = random_completions  # type: ignore[method-assign]
        sampler = Sampler()
        before = sampler.bytes_now()
        if read:
            with sampler.stage("read"):
                inputs = read_inputs(config)
        else:
            inputs = random_inputs(config, rows)
        with sampler.stage("inputs"):
            publish_inputs(run.inputs, inputs)
            inputs = load_inputs(run.inputs, config)
            inputs.described()
        worker = Worker(config, run, inputs.tokenizer, fake.opener)
        data = TrainingData(config, inputs, Published(run, checker_of(config.checker)))
        stages = Rows(data, InProcess(worker, data), Watch())
        stages.sampler = sampler
        sampled = inputs.examples[:1000]
        text = "an answer of a few words. " * 60
        worker.decode = lambda ids: text[: 4 * len(ids)]  # type: ignore[method-assign]
        nobody: Any = SimpleNamespace(member=ALONE)
        worker.players.for_scoring = lambda player: nobody  # type: ignore[method-assign]
        with mock.patch.object(tpaw.scoring.score, "score_sequences", random_logps):
            algorithm_1(config, stages)
        tokens = np.mean([len(e.prompt_ids) + len(e.target_ids) for e in sampled])
        sender.send({"before": before, "tokens": float(tokens), "stages": sampler.stages})


def curve(options: argparse.Namespace) -> dict[str, Any]:
    """A process for each count of rows."""
    context = multiprocessing.get_context("spawn")
    results: dict[str, Any] = {}
    table = []
    for rows in options.rows:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=measure, args=(sender, rows, not options.no_read, options.iterations)
        )
        process.start()
        sender.close()
        found = receiver.recv()
        process.join()
        results[str(rows)] = found
        for name, stage in found["stages"].items():
            table.append(
                [
                    f"{rows:,}: {name}",
                    f"{stage['seconds']:.1f}",
                    f"{stage['cpu']:.1f}",
                    *(f"{stage[k] / 2**20:,.0f}" for k in ("anonymous", "resident")),
                ]
            )
        peaks = [max(s[k] for s in found["stages"].values()) for k in ("anonymous", "resident")]
        before = [found["before"][k] for k in ("anonymous", "resident")]
        table.append([f"{rows:,}: before", "", "", *(f"{b / 2**20:,.0f}" for b in before)])
        seconds = [sum(s[k] for s in found["stages"].values()) for k in ("seconds", "cpu")]
        totals = [*(f"{s:.1f}" for s in seconds), *(f"{p / 2**20:,.0f}" for p in peaks)]
        table.append([f"{rows:,}: all", *totals])
        title = (
            f"{options.iterations} iterations, {found['tokens']:.0f} tokens a row; MiB at the peak"
        )
        print_table(
            title, ["rows: stage", "seconds", "CPU seconds", "anonymous", "resident"], table
        )
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--no-read", action="store_true", help="begin with random token ids")
    parser.add_argument("--json", type=Path, default=RESULTS / "rows.json")
    options = parser.parse_args(argv)
    options.device = "cpu"
    write_json(options, {"rows": curve(options)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
