"""The run directory: paths, lock, and the checks before a run begins or resumes.

All paths inside a run directory are relative, so it can be moved. `tpaw run RUN` resumes the run.
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
from tpaw.config.schema import ModelConfig, RunConfig
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
        t: t of Algorithm 1; counts from 0.
    """

    run_root: Path
    t: int

    @property
    def number(self) -> int:
        """The number in folders and tables, t + 1: iteration 1 trains θ_1."""
        return self.t + 1

    @property
    def folder(self) -> Path:
        """Folder that holds all files of this iteration."""
        return self.run_root / "iterations" / str(self.number)

    @property
    def responses(self) -> Path:
        """Sharded artifact: D_t, the responses of θ_t."""
        return self.folder / "responses"

    @property
    def checkpoint(self) -> Path:
        """Artifact: θ_{t+1}, which transformers and vLLM can load."""
        return self.folder / "checkpoint"

    @property
    def training(self) -> Path:
        """Folder of the saved steps during training. It is removed when θ_{t+1} is published."""
        return self.folder / "training"

    @property
    def training_log(self) -> Path:
        """JSON lines file: one line for each logged optimizer step."""
        return self.folder / "training.jsonl"

    def last_saved_step(self) -> Path | None:
        """Folder of the newest complete saved step, or None."""
        complete = [path for path in self.training.glob("checkpoint-*") if is_published(path)]
        return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


class RunDirectory:
    """The paths of one run.

    Args:
        root: the run directory. It need not exist.

    The methods that take i mean the iteration that trains θ_i.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    @property
    def run_file(self) -> Path:
        """JSON file: format, package versions and start time. Written once, when the run begins."""
        return self.root / "run.json"

    @property
    def config_file(self) -> Path:
        """YAML file: the complete configuration."""
        return self.root / "config.yaml"

    @property
    def initial_player_file(self) -> Path:
        """JSON file: path or Hub id, revision and fingerprint of θ_0."""
        return self.root / "players" / "0.json"

    @property
    def inputs(self) -> Path:
        """Artifact: the tokenised examples, the held-out examples and the tokenizer."""
        return self.root / "inputs"

    @property
    def summary_file(self) -> Path:
        """JSON file: the results that `tpaw run` prints at its end."""
        return self.root / "summary.json"

    def iteration(self, t: int) -> Iteration:
        """The iteration that trains θ_{t+1} from θ_t."""
        return Iteration(self.root, t)

    def responses(self, i: int) -> Path:
        """Sharded artifact: D_{i-1}, the responses of θ_{i-1}."""
        return self.iteration(i - 1).responses

    def checkpoint(self, i: int) -> Path:
        """Artifact: θ_i, which transformers and vLLM can load."""
        return self.iteration(i - 1).checkpoint

    def training(self, i: int) -> Path:
        """Folder of the saved steps of the iteration that trains θ_i."""
        return self.iteration(i - 1).training

    def last_saved_step(self, i: int) -> Path | None:
        """Folder of the newest complete saved step of the iteration that trains θ_i, or None."""
        return self.iteration(i - 1).last_saved_step()

    def training_log(self, i: int) -> Path:
        """JSON lines file: one line for each logged optimizer step of the training of θ_i."""
        return self.iteration(i - 1).training_log

    def evaluation(self, i: int) -> Path:
        """Artifact: held-out results of θ_i, in total and for each record."""
        return self.iteration(i - 1).folder / "evaluation"

    def suite(self, i: int, name: str) -> Path:
        """Sharded artifact: results of θ_i on a benchmark suite, in total and for each item."""
        return self.iteration(i - 1).folder / "suites" / name

    def logprobs(self, fingerprint: str) -> Path:
        """Sharded artifact: log-probs of sequences under the player with this fingerprint."""
        return self.root / "logprobs" / fingerprint

    def iterations_begun(self) -> int:
        """Number of iterations whose training has begun."""
        names = (path.name for path in (self.root / "iterations").glob("*"))
        numbers = (int(name) for name in names if name.isdecimal())
        return max((i for i in numbers if self.training_log(i).exists()), default=0)

    def has_begun(self) -> bool:
        """Whether the folder is the run directory of a run that has begun."""
        return os.path.exists(self.run_file)  # false also for a name that no file can have

    def load_config(self) -> RunConfig:
        """Read the configuration with which the run began or was last resumed.

        Raises:
            ArtifactError: config.yaml is missing.
            InputError: config.yaml is invalid.
        """
        if not self.config_file.is_file():
            raise ArtifactError(
                f"{self.config_file}: missing, but the run has begun; restore it from a backup"
            )
        return RunConfig.load(str(self.config_file))

    def manifests(self, iterations: int) -> list[Path]:
        """The manifests of all artifacts in the run, complete or not.

        Args:
            iterations: number of iterations of the run, T.

        Raises:
            ArtifactError: an artifact has files but no manifest.
        """
        folders = [self.inputs, *sorted((self.root / "logprobs").glob("*"))]
        for i in range(iterations + 1):
            folders += [self.responses(i), self.checkpoint(i), self.evaluation(i)]
            folders += sorted(self.suite(i, "").glob("*"))
        for folder in folders:
            refuse_without_manifest(folder)
        # A crash can leave a saved step without a manifest. It is ignored, so it is no error.
        folders += sorted((self.root / "iterations").glob("*/training/checkpoint-*"))
        candidates = [folder / name for folder in folders for name in (MANIFEST, PARTIAL_MANIFEST)]
        return [manifest for manifest in candidates if manifest.is_file()]


def refuse_untrusted_code(model: ModelConfig, run: RunDirectory, *, trust: bool) -> None:
    """Refuse code that the stored configuration of a run asks for.

    A run directory may come from somebody else, so its configuration is data. A configuration
    file that the user names is the user's own decision.

    Args:
        model: the section `model` of a configuration that was read from `run`.
        run: the run directory.
        trust: whether the user has allowed the code (`--trust`).

    Raises:
        InputError: `model.trust_remote_code` is true, and `trust` is false.
    """
    if model.trust_remote_code and not trust:
        raise InputError(
            f"model.trust_remote_code: True: {run.config_file} asks to run the Python code that "
            "comes with the model; add --trust if you trust whoever made this run and its model"
        )


def check_output(root: str | Path, config: RunConfig) -> RunConfig | None:
    """Check that a run can begin or resume in a folder.

    Args:
        root: the folder.
        config: the configuration to begin or resume with.

    Returns:
        The stored configuration of the run in the folder, or None if no run has begun there.

    Raises:
        InputError: the folder cannot be written, holds files that tpaw did not write, or holds a
            run with other settings (the message names them).
        ArtifactError: run.json is damaged.
    """
    run = RunDirectory(root)
    if run.root.exists() and not run.root.is_dir():
        raise InputError(f"--output {root}: is a file; give a folder")
    nearest = next(p for p in (run.root.absolute(), *run.root.absolute().parents) if p.exists())
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"--output {root}: {nearest} is not writable; choose another --output")
    if not run.has_begun():
        if run.root.exists() and (foreign := _foreign(run.root)):
            raise InputError(
                f"--output {root}: the folder is not empty and was not created by tpaw: it holds "
                f"{', '.join(foreign[:5])}; choose another --output"
            )
        return None
    facts = read_json(run.run_file)
    if not isinstance(facts, dict):
        raise ArtifactError(f"{run.run_file}: damaged: not a mapping; restore it from a backup")
    if (found := facts.get("format")) != FORMAT:
        raise InputError(
            f"--output {root}: has format {found}; this version reads {FORMAT}; use the version of "
            "tpaw that began the run"
        )
    kept = run.load_config()
    if changed := differences(kept, config, begun=run.iterations_begun()):
        raise InputError(
            f"--output {root}: holds a run with other settings (stored → given):\n  "
            + "\n  ".join(changed)
            + "\nChoose another --output, or use the settings that the run began with."
        )
    return kept


@contextlib.contextmanager
def open_run(root: str | Path, config: RunConfig) -> Iterator[RunDirectory]:
    """Lock a run directory and begin or resume the run in it.

    Args:
        root: the run directory. It is created if it does not exist.
        config: the configuration to begin or resume with. It is stored in the run directory.

    Yields:
        The run directory, locked until the context ends.

    Raises:
        InputError: the folder cannot be used; see `check_output`.
        RunLockedError: another process works on the run.
        ArtifactError: run.json is damaged.
    """
    run = RunDirectory(root)
    if not run.has_begun():
        check_output(root, config)  # before a lock file appears in a folder that is not a run
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
    """Discard the unfinished training of an iteration.

    Responses and log-probs are kept. The iteration then counts as not begun, so its per-iteration
    settings may change.

    Args:
        root: the run directory.
        number: i, the iteration that trains θ_i.

    Raises:
        InputError: the iteration has not begun to train, or its checkpoint is already published.
        RunLockedError: another process works on the run.
    """
    run = RunDirectory(root)
    key = f"--restart-iteration {number}"
    if not run.has_begun():
        raise InputError(f"{key}: {root} is not a run directory; give the directory of a run")
    iteration = run.iteration(number - 1)
    if number < 1 or not (iteration.training_log.exists() or iteration.training.exists()):
        raise InputError(
            f"{key}: iteration {number} of {root} has not begun to train; run without "
            "--restart-iteration"
        )
    if is_published(iteration.checkpoint):
        raise InputError(
            f"{key}: θ_{number} is already published in {root}; only an unfinished iteration can "
            "restart"
        )
    with locked(run.root / "lock"):
        shutil.rmtree(iteration.training, ignore_errors=True)
        iteration.training_log.unlink(missing_ok=True)


def verify_run(run: RunDirectory, iterations: int, watch: Watch) -> None:
    """Check every published file of a run against its manifest.

    Args:
        run: the run directory.
        iterations: number of iterations of the run, T.
        watch: shows the progress in bytes.

    Raises:
        ArtifactError: naming the file that is missing, truncated or altered.
        Interrupted: a signal has arrived.
    """
    manifests = run.manifests(iterations)
    if manifests:
        size = sum(int(f["bytes"]) for m in manifests for f in read_files(m))
        with watch.progress("verify published files", size, "bytes") as on_done:
            for manifest in manifests:
                verify(manifest, on_done)


def environment() -> dict[str, Any]:
    """Package versions, Python version and machine type, to store with results."""
    packages = ("tpaw", "torch", "transformers", "tokenizers", "accelerate", "datasets", "pyarrow")
    found = {}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return {"versions": found, "python": platform.python_version(), "machine": platform.machine()}


def _foreign(root: Path) -> list[str]:
    """Names in a folder without a run that an earlier attempt to begin a run did not write."""
    names = sorted(path.name for path in root.iterdir() if not path.name.startswith(".tmp-"))
    holder = (root / "lock").read_text(errors="replace") if "lock" in names else ""
    # A crash during the first write leaves an empty lock file.
    left_by_us = ["lock", "config.yaml"] if '"pid"' in holder else ["lock"] if not holder else []
    return [name for name in names if name not in left_by_us]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock inside the context.

    Args:
        path: the lock file. It is created if it does not exist and is never removed.

    Raises:
        RunLockedError: another process holds the lock.
    """
    with path.open("a+", encoding="utf-8") as file:
        try:
            # The kernel releases this lock when the process ends, even if it is killed.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise RunLockedError(
                f"{path.parent}: in use by {_holder(file.read())}; wait for it or stop it"
            ) from None
        file.truncate(0)
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": _now()}
        file.write(json.dumps(holder))
        file.flush()
        # Otherwise a forked child, such as a data loader worker, would hold the lock after this
        # process has ended.
        os.register_at_fork(after_in_child=file.close)
        yield


def _holder(text: str) -> str:
    try:
        holder = json.loads(text)
        return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (ValueError, KeyError):
        return "another process"
