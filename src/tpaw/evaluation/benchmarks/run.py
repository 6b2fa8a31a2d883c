"""Evaluate a model, or every checkpoint of a run, on a suite of benchmarks.

Each task is published as soon as it is finished, so an interruption costs at most one task.
Finished evaluations are skipped.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tpaw.config.schema import GenerateConfig, ScoreConfig
from tpaw.errors import InputError
from tpaw.evaluation.benchmarks.suite import (
    Suite,
    benchmark_scores,
    load_suite,
    load_suites,
    suite_score,
)
from tpaw.evaluation.items import Item, items_file, write_items
from tpaw.models.checks import check_model, check_vocabulary
from tpaw.models.loading import load_model, pick_device
from tpaw.models.references import Checkpoint, checkpoint_of, find_checkpoints
from tpaw.models.tokenizers import load_tokenizer, stop_token_ids
from tpaw.runtime.interrupt import StopSignal
from tpaw.runtime.isolation import isolated
from tpaw.runtime.progress import note, progress
from tpaw.runtime.watch import Watch
from tpaw.scoring.score import Precision
from tpaw.storage.artifacts import (
    MANIFEST,
    PARTIAL_MANIFEST,
    ShardedArtifact,
    is_published,
    read_json,
    refuse_without_manifest,
    remove_temporaries,
    verify,
    write_json,
)
from tpaw.storage.run_directory import RunDirectory, environment, open_run

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    from tpaw.evaluation.benchmarks.harness import HarnessModel, LoadedTask


class Evaluated(NamedTuple):
    """A finished evaluation of one checkpoint.

    Attributes:
        folder: holds `results.json` and `items/`.
        results: the content of `results.json`.
    """

    folder: Path
    results: dict[str, Any]


class _Work(NamedTuple):
    """A checkpoint to evaluate.

    Attributes:
        checkpoint: the checkpoint.
        folder: folder of the results.
        origin: everything that decides the results, equal for all tasks of the folder.
    """

    checkpoint: Checkpoint
    folder: Path
    origin: dict[str, Any]


def evaluate_suite(
    reference: str,
    suite_name: str,
    output: Path | None = None,
    stop: StopSignal | None = None,
    *,
    trust: bool = False,
) -> list[Evaluated]:
    """Evaluate a model, or every checkpoint of a run. Skip finished evaluations.

    Args:
        reference: RUN, RUN@3 or MODEL; see `models/references.py`.
        suite_name: name of a suite or path of a YAML file; see `suite.load_suite`.
        output: folder for the results of a model. The default is evaluations/MODEL/SUITE.
        stop: tells whether the user asked for a stop.
        trust: whether a run may ask for `model.trust_remote_code`, and a suite may have task files
            that are not in the package.

    Returns:
        One evaluation for each checkpoint, θ_0 first.

    Raises:
        InputError: a name is unknown, lm_eval is not installed, data cannot be loaded, or the
            folder holds results of other settings. It is raised before a model is loaded.
        ArtifactError: a published file is damaged.
        RunLockedError: another process works on the run.
        Interrupted: the user asked for a stop; finished tasks are published.
    """
    stop = stop or StopSignal()
    suite = load_suite(suite_name, trust=trust)
    checkpoints = find_checkpoints(reference, trust=trust)
    if output is not None and checkpoints[0].run is not None:
        raise InputError(
            f"--output {output}: cannot be set for a run: its results are stored in the run; "
            "remove --output"
        )
    works = _with_weights([_work(checkpoint, suite, output) for checkpoint in checkpoints])
    todo = [work for work in works if not is_published(work.folder)]
    for work in works:
        _check_folder(work)
    if todo:
        # Tasks seed Python's random numbers as they are loaded.
        with isolated():
            for work in todo:
                pick_device(_settings(work.checkpoint)[0])
            tasks = _load_tasks(suite)
            for work in todo:
                _check_data(work, tasks)
            for work in todo:
                with _locked(work.checkpoint):
                    remove_temporaries(work.folder)
                    _evaluate(work, suite, tasks, stop)
    return [Evaluated(w.folder, dict(read_json(w.folder / "results.json"))) for w in works]


def check_suites(names: Sequence[str], run: RunDirectory, iterations: int) -> None:
    """Refuse suites that cannot be evaluated. It does not load their data.

    Args:
        names: names of suites or paths of YAML files.
        run: the run directory. It need not exist.
        iterations: number of iterations of the run, T.

    Raises:
        InputError: a suite is unknown or not valid, lm_eval is not installed, or a suite is not
            evaluated on a checkpoint whose weights were removed.
    """
    suites = load_suites(names, trust=True)
    if suites:
        from tpaw.evaluation.benchmarks.harness import harness_version

        harness_version()
    for suite in suites:
        for i in range(1, iterations + 1):
            removed = run.weights_removed(i)
            if removed is not None and not is_published(run.suite(i, suite.name)):
                raise InputError(
                    f"evaluate.suites: {suite.name}: θ_{i} cannot be evaluated, because {removed}; "
                    "remove this suite from the run's settings. `tpaw evaluate` evaluates the "
                    "other checkpoints."
                )


def _with_weights(works: list[_Work]) -> list[_Work]:
    """Leave out, with a note, checkpoints that cannot be evaluated any more.

    Raises:
        InputError: there is no other checkpoint.
    """
    kept = []
    removed = ""
    for work in works:
        run, i = work.checkpoint.run, work.checkpoint.player.index
        if run is None or is_published(work.folder) or not (clause := run.weights_removed(i)):
            kept.append(work)
            continue
        removed = f"{run.root}@{i}: cannot be evaluated, because {clause}"
        if len(works) > 1:
            note(removed)
    if not kept:
        raise InputError(
            f"{removed}; its finished evaluations are kept. Evaluate another checkpoint."
        )
    return kept


def missing_suites(run: RunDirectory, i: int, names: Sequence[str]) -> list[Suite]:
    """Return the suites of a run's configuration whose results for θ_i are not published.

    Raises:
        InputError: a suite is unknown or not valid.
    """
    suites = load_suites(names, trust=True)
    return [suite for suite in suites if not is_published(run.suite(i, suite.name))]


class SuitesOfRun:
    """Evaluates the checkpoints of a run on the suites of its configuration, while the run goes on.

    The caller has locked the run.
    """

    def __init__(self, run: RunDirectory, names: Sequence[str], stop: StopSignal) -> None:
        """Remember what to evaluate on.

        Args:
            run: the run directory.
            names: names of suites or paths of YAML files. Their task files may contain code.
            stop: tells whether the user asked for a stop.
        """
        self.run = run
        self.stop = stop
        self._names = names
        self._tasks: dict[str, list[LoadedTask]] = {}

    def publish(self, i: int) -> None:
        """Evaluate θ_i on every suite whose results are missing.

        Raises:
            InputError: lm_eval is not installed, data cannot be loaded, or a folder holds results
                of other settings.
            ArtifactError: a published file is damaged.
            Interrupted: the user asked for a stop; finished tasks are published.
        """
        for suite in missing_suites(self.run, i, self._names):
            # Tasks seed Python's random numbers as they are loaded.
            with isolated():
                work = _work(checkpoint_of(self.run, i, trust=True), suite, None)
                _check_folder(work)
                if suite.name not in self._tasks:
                    self._tasks[suite.name] = _load_tasks(suite)
                _check_data(work, self._tasks[suite.name])
                _evaluate(work, suite, self._tasks[suite.name], self.stop)


def _load_tasks(suite: Suite) -> list[LoadedTask]:
    from tpaw.evaluation.benchmarks.harness import load_tasks

    with progress("load tasks", len(suite.tasks), "tasks") as advance:
        return load_tasks(suite, advance)


def _work(checkpoint: Checkpoint, suite: Suite, output: Path | None) -> _Work:
    from tpaw.evaluation.benchmarks.harness import harness_version

    # A run has checked its models.
    found = check_model(checkpoint.model) if checkpoint.run is None else None
    tokenizer = load_tokenizer(checkpoint.model, checkpoint.tokenizer_folder)
    if found is not None:
        check_vocabulary(checkpoint.model, found, tokenizer.vocab_size - 1)
    has_template = tokenizer.chat_template is not None
    if suite.apply_chat_template is True and not has_template:
        raise InputError(
            f"{suite.name}: apply_chat_template: the tokenizer of {checkpoint.name} has no chat "
            "template; set it to auto or false"
        )
    run, index = checkpoint.run, checkpoint.player.index
    folder = (
        run.suite(index, suite.name)
        if run is not None
        else output or Path("evaluations") / checkpoint.name / suite.name
    )
    installed = environment()["versions"]
    versions = {key: installed[key] for key in ("tpaw", "transformers", "torch")}
    origin = {
        "player": index if run is not None else None,
        "name": checkpoint.name,
        "fingerprint": checkpoint.player.fingerprint,
        "versions": {"lm_eval": harness_version(), **versions},
        "settings": {
            "fewshot_seed": suite.fewshot_seed,
            "chat_template": has_template and bool(suite.apply_chat_template),
            "dtype": str(_dtype(checkpoint, found)).removeprefix("torch."),
            **({"quantization": q} if (q := checkpoint.model.quantization) is not None else {}),
            "tasks": [task.definition() for task in suite.tasks],
        },
    }
    return _Work(checkpoint, folder, origin)


def _check_folder(work: _Work) -> None:
    """Refuse a folder whose results are damaged or have other settings.

    Raises:
        InputError: the model, the lm_eval version or a setting differs.
        ArtifactError: a published file is damaged.
    """
    folder = work.folder
    refuse_without_manifest(folder)
    for name in (MANIFEST, PARTIAL_MANIFEST):
        if (folder / name).is_file():
            verify(folder / name)
    for entry in ShardedArtifact(folder).entries:
        there = entry.get("origin")
        if there is not None:
            for key, new, old in _compared(work.origin, there):
                if new != old:
                    raise InputError(
                        f"{folder}: holds results with another {key}: {old!r:.200}, now "
                        f"{new!r:.200}; move this folder away to evaluate again"
                    )


def _check_data(work: _Work, tasks: list[LoadedTask]) -> None:
    """Refuse to add tasks to a folder whose finished tasks used other data.

    Raises:
        InputError: the data of a Hub dataset has changed.
    """
    from tpaw.evaluation.benchmarks.harness import data_commits

    kept = {e["task"]: e["facts"] for e in ShardedArtifact(work.folder).entries if "task" in e}
    for name, _, task in tasks:
        commits = data_commits(task)
        old = kept[name].get("data_commits", commits) if name in kept else commits
        if old != commits:
            raise InputError(
                f"{work.folder}: holds results of {name} with other data: commit {old}, now "
                f"{commits}; move this folder away to evaluate again"
            )


def _compared(new: dict[str, Any], old: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    yield "fingerprint", new["fingerprint"], old["fingerprint"]
    yield "version of lm_eval", new["versions"]["lm_eval"], old["versions"]["lm_eval"]
    tasks, old_tasks = (
        {task["name"]: task for task in one["settings"]["tasks"]} for one in (new, old)
    )
    yield "list of tasks", list(tasks), list(old_tasks)
    for name, task in tasks.items():
        for key, value in task.items():
            yield f"{key} of {name}", value, old_tasks[name].get(key)
    for key, value in new["settings"].items():
        if key != "tasks":
            yield key, value, old["settings"].get(key)


def _evaluate(work: _Work, suite: Suite, tasks: list[LoadedTask], stop: StopSignal) -> None:
    from tpaw.evaluation.benchmarks.harness import run_task

    artifact = ShardedArtifact(work.folder)
    missing = [task for task in tasks if items_file(task.name) not in artifact.names]
    if missing:
        model = _load(work, stop)
    for task in missing:
        stop.check()
        started = time.monotonic()
        facts, items = run_task(
            model,
            task,
            chat=work.origin["settings"]["chat_template"],
            fewshot_seed=suite.fewshot_seed,
        )
        facts["seconds"] = round(time.monotonic() - started, 3)
        artifact.publish(
            items_file(task.name), _writer(items), task=task.name, facts=facts, origin=work.origin
        )
    found = {e["task"]: e["facts"] for e in artifact.entries if "task" in e}
    by_task = {task.name: found[task.name] for task in tasks}
    benchmarks = benchmark_scores(suite, by_task)
    results = {
        "suite": suite.name,
        **work.origin,
        **suite_score(benchmarks),
        "benchmarks": benchmarks,
        "tasks": by_task,
    }
    if "results.json" not in artifact.names:
        artifact.publish("results.json", lambda path: write_json(path, results))
    artifact.complete({"suite": suite.name, "fingerprint": work.origin["fingerprint"]})


def _load(work: _Work, stop: StopSignal) -> HarnessModel:
    import torch

    from tpaw.evaluation.benchmarks.harness import HarnessModel

    checkpoint = work.checkpoint
    run = checkpoint.run
    if run is not None and checkpoint.player.index > 0:
        verify(run.checkpoint(checkpoint.player.index) / MANIFEST)
    device, score, generate = _settings(checkpoint)
    model = load_model(
        checkpoint.player,
        checkpoint.model,
        dtype=getattr(torch, work.origin["settings"]["dtype"]),
        device=pick_device(device),
    )
    tokenizer = load_tokenizer(checkpoint.model, checkpoint.tokenizer_folder)

    return HarnessModel(
        model,
        tokenizer,
        stop_ids=stop_token_ids(checkpoint.model, tokenizer),
        tokens_per_row=score.tokens_per_row,
        tokens_per_batch=generate.tokens_per_batch,
        bar=Watch(stop).progress,
        name=checkpoint.name,
    )


def _settings(checkpoint: Checkpoint) -> tuple[str, ScoreConfig, GenerateConfig]:
    """Return device, score settings and generation settings: those of the run, or the defaults."""
    if checkpoint.run is None:
        return "auto", ScoreConfig(), GenerateConfig()
    config = checkpoint.run.load_config()
    return config.device, config.score, config.generate


def _dtype(checkpoint: Checkpoint, found: PreTrainedConfig | None) -> torch.dtype:
    """Return the dtype of a run's precision. For a model, return the dtype of its config.json.

    The harness loads a model in the same dtype.
    """
    import torch

    if checkpoint.run is not None:
        config = checkpoint.run.load_config()
        return Precision(config.device, config.precision == "bf16").dtype
    dtype = getattr(found, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


@contextlib.contextmanager
def _locked(checkpoint: Checkpoint) -> Iterator[None]:
    if checkpoint.run is None:
        yield
        return
    with open_run(checkpoint.run.root, checkpoint.run.load_config()):
        yield


def _writer(items: list[Item]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        write_items(path, items)

    return write
