"""The run directory: what lies where, whose it is, and that only one process works on it.

Everything in it is relative, so it can be moved. `tpaw run` on it goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tpaw.config.changes import differences
from tpaw.config.files import to_yaml
from tpaw.config.schema import RunConfig
from tpaw.errors import ArtifactError, InputError, RunLockedError
from tpaw.runtime.watch import Watch
from tpaw.storage.artifacts import (
    MANIFEST,
    PARTIAL_MANIFEST,
    is_published,
    read_files,
    read_json,
    refuse_without_manifest,
    remove_temporaries,
    verify,
    write_json,
    write_text,
)

FORMAT = 1


@dataclass(frozen=True)
class Iteration:
    """The iteration that trains θ_{t+1} from θ_t: its number and its paths.

    Attributes:
        run_root: the run directory.
        t: as in Algorithm 1, from 0.
    """

    run_root: Path
    t: int

    @property
    def number(self) -> int:
        """As folders and tables count, from 1: iteration 1 makes θ_1."""
        return self.t + 1

    @property
    def folder(self) -> Path:
        """Everything of this iteration."""
        return self.run_root / "iterations" / str(self.number)

    @property
    def responses(self) -> Path:
        """Sharded artifact: D_t, the responses of θ_t."""
        return self.folder / "responses"

    @property
    def checkpoint(self) -> Path:
        """Artifact: θ_{t+1}, loadable by from_pretrained and vLLM."""
        return self.folder / "checkpoint"

    @property
    def training(self) -> Path:
        """Saved steps while the iteration trains; removed when θ_{t+1} is published."""
        return self.folder / "training"

    @property
    def training_log(self) -> Path:
        """One JSON line for each logged step."""
        return self.folder / "training.jsonl"

    def last_saved_step(self) -> Path | None:
        """The newest saved step that is whole."""
        whole = [path for path in self.training.glob("checkpoint-*") if is_published(path)]
        return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


class RunDirectory:
    """Paths of one run. Iteration numbers are the paper's: iteration i makes θ_i."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    @property
    def run_file(self) -> Path:
        """Written once, when the run begins: format, versions, time."""
        return self.root / "run.json"

    @property
    def config_file(self) -> Path:
        """The complete configuration."""
        return self.root / "config.yaml"

    @property
    def initial_player_file(self) -> Path:
        """θ_0: path or hub id, revision, fingerprint."""
        return self.root / "players" / "0.json"

    @property
    def inputs(self) -> Path:
        """Artifact: rows, templated and tokenised once, and the tokenizer that did it."""
        return self.root / "inputs"

    @property
    def summary_file(self) -> Path:
        """What `tpaw run` prints at its end, for programs."""
        return self.root / "summary.json"

    def iteration(self, t: int) -> Iteration:
        """The iteration that trains θ_{t+1} from θ_t."""
        return Iteration(self.root, t)

    def responses(self, i: int) -> Path:
        """Sharded artifact: D_{i-1}, the responses of θ_{i-1}."""
        return self.iteration(i - 1).responses

    def checkpoint(self, i: int) -> Path:
        """Artifact: θ_i, loadable by from_pretrained and vLLM."""
        return self.iteration(i - 1).checkpoint

    def training(self, i: int) -> Path:
        """Saved steps of the iteration that makes θ_i."""
        return self.iteration(i - 1).training

    def last_saved_step(self, i: int) -> Path | None:
        """The newest saved step of the iteration that makes θ_i, if it is whole."""
        return self.iteration(i - 1).last_saved_step()

    def training_log(self, i: int) -> Path:
        """One JSON line for each logged step of the iteration that makes θ_i."""
        return self.iteration(i - 1).training_log

    def evaluation(self, i: int) -> Path:
        """Artifact: results and per-item outcomes of θ_i."""
        return self.iteration(i - 1).folder / "evaluation"

    def suite(self, i: int, name: str) -> Path:
        """Sharded artifact: results and per-item outcomes of θ_i on a suite of benchmarks."""
        return self.iteration(i - 1).folder / "suites" / name

    def logprobs(self, fingerprint: str) -> Path:
        """Sharded artifact: log-probs under one player."""
        return self.root / "logprobs" / fingerprint

    def iterations_begun(self) -> int:
        """How many iterations have begun to train."""
        names = (path.name for path in (self.root / "iterations").glob("*"))
        numbers = (int(name) for name in names if name.isdecimal())
        return max((i for i in numbers if self.training_log(i).exists()), default=0)

    def has_begun(self) -> bool:
        """Whether a run lies here."""
        return self.run_file.exists()

    def load_config(self) -> RunConfig:
        """The configuration that the run began with (or last went on with)."""
        if not self.config_file.is_file():
            raise ArtifactError(f"{self.config_file}: missing, though the run has begun")
        return RunConfig.load(str(self.config_file))

    def manifests(self, iterations: int) -> list[Path]:
        """The manifest of every artifact that is there, whole or growing.

        Raises:
            ArtifactError: an artifact has lost its manifest.
        """
        folders = [self.inputs, *sorted((self.root / "logprobs").glob("*"))]
        for i in range(iterations + 1):
            folders += [self.responses(i), self.checkpoint(i), self.evaluation(i)]
            folders += sorted(self.suite(i, "").glob("*"))
        for folder in folders:
            refuse_without_manifest(folder)
        # A saved step without a manifest is one that was half written.
        folders += sorted((self.root / "iterations").glob("*/training/checkpoint-*"))
        candidates = [folder / name for folder in folders for name in (MANIFEST, PARTIAL_MANIFEST)]
        return [manifest for manifest in candidates if manifest.is_file()]


def check_output(root: str | Path, config: RunConfig) -> RunConfig | None:
    """Refuse an output that cannot be written, holds other files, or holds another run.

    Returns:
        The configuration of the run that lies there; None if none has begun.

    Raises:
        InputError: naming the folder, and for another run the settings that differ.
        ArtifactError: run.json is damaged.
    """
    run = RunDirectory(root)
    if run.root.exists() and not run.root.is_dir():
        raise InputError(f"--output {root}: is a file, not a folder")
    nearest = next(p for p in (run.root.absolute(), *run.root.absolute().parents) if p.exists())
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"--output {root}: {nearest} is not writable")
    if not run.has_begun():
        if run.root.exists() and (foreign := _foreign(run.root)):
            raise InputError(
                f"--output {root}: the folder is not empty and was not created by tpaw: it holds "
                f"{', '.join(foreign[:5])}"
            )
        return None
    facts = read_json(run.run_file)
    if not isinstance(facts, dict):
        raise ArtifactError(f"{run.run_file}: damaged: it is no mapping")
    if (found := facts.get("format")) != FORMAT:
        raise InputError(f"--output {root}: has format {found}; this version reads {FORMAT}")
    kept = run.load_config()
    if changed := differences(kept, config, begun=run.iterations_begun()):
        raise InputError(
            f"--output {root}: holds a run with other settings:\n  "
            + "\n  ".join(changed)
            + "\nChoose another --output, or use the settings that the run began with."
        )
    return kept


@contextlib.contextmanager
def open_run(root: str | Path, config: RunConfig) -> Iterator[RunDirectory]:
    """Lock the run directory, and begin the run or check that it is this one.

    Raises:
        InputError: see `check_output`.
        RunLockedError: another process works on it.
        ArtifactError: run.json is damaged.
    """
    run = RunDirectory(root)
    if not run.has_begun():
        check_output(root, config)  # before a lock file is written into somebody's folder
    run.root.mkdir(parents=True, exist_ok=True)
    with locked(run.root / "lock"):
        kept = check_output(root, config)
        remove_temporaries(run.root)
        if kept != config:
            write_text(run.config_file, to_yaml(config, comments=True))
        if not run.has_begun():
            write_json(run.run_file, {"format": FORMAT, "began": _now(), **environment()})
        yield run


def restart_iteration(root: str | Path, number: int) -> None:
    """Forget the training of an iteration that has not published its checkpoint.

    The responses and log-probs stay. The iteration counts as not begun, so its settings may change.

    Raises:
        InputError: there is no such iteration under way.
        RunLockedError: another process works on the run.
    """
    run = RunDirectory(root)
    key = f"--restart-iteration {number}"
    if not run.has_begun():
        raise InputError(f"{key}: {root} is not a run directory")
    iteration = run.iteration(number - 1)
    if number < 1 or not (iteration.training_log.exists() or iteration.training.exists()):
        raise InputError(f"{key}: iteration {number} of {root} has not begun to train")
    if is_published(iteration.checkpoint):
        raise InputError(f"{key}: θ_{number} is published already in {root}")
    with locked(run.root / "lock"):
        shutil.rmtree(iteration.training, ignore_errors=True)
        iteration.training_log.unlink(missing_ok=True)


def verify_run(run: RunDirectory, iterations: int, watch: Watch) -> None:
    """Check every published file against its manifest.

    Raises:
        ArtifactError: naming the file that is missing, truncated or altered.
    """
    manifests = run.manifests(iterations)
    if manifests:
        size = sum(int(f["bytes"]) for m in manifests for f in read_files(m))
        with watch.progress("verify published files", size, "bytes") as on_done:
            for manifest in manifests:
                verify(manifest, on_done)


def environment() -> dict[str, Any]:
    """Versions and machine, for the record."""
    packages = ("tpaw", "torch", "transformers", "tokenizers", "accelerate", "datasets", "pyarrow")
    found = {}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return {"versions": found, "python": platform.python_version(), "machine": platform.machine()}


def _foreign(root: Path) -> list[str]:
    """What lies in a folder that never came to begin, and is not left from trying to."""
    names = sorted(path.name for path in root.iterdir() if not path.name.startswith(".tmp-"))
    holder = (root / "lock").read_text(errors="replace") if "lock" in names else ""
    # An empty lock is what a crash at the very first write leaves.
    left_by_us = ["lock", "config.yaml"] if '"pid"' in holder else ["lock"] if not holder else []
    return [name for name in names if name not in left_by_us]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file while in the context.

    Raises:
        RunLockedError: another process holds it.
    """
    with path.open("a+", encoding="utf-8") as file:
        try:
            # The kernel drops this lock when the process ends, however it ends.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise RunLockedError(f"{path.parent}: in use by {_holder(file.read())}") from None
        file.truncate(0)
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": _now()}
        file.write(json.dumps(holder))
        file.flush()
        # A forked child, such as a data loader's worker, would hold the lock after our death.
        os.register_at_fork(after_in_child=file.close)
        yield


def _holder(text: str) -> str:
    try:
        holder = json.loads(text)
        return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (ValueError, KeyError):
        return "another process"
