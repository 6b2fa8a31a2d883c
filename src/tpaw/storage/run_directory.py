"""The run directory: paths, lock, and the checks before a run begins or resumes.

All paths inside a run directory are relative, so it can be moved. `tpaw run RUN` resumes the run.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tpaw.config.changes import differences
from tpaw.config.files import to_yaml
from tpaw.config.schema import GenerateConfig, ModelConfig, RunConfig
from tpaw.errors import ArtifactError, InputError, StorageError, TpawError, brief
from tpaw.runtime.progress import note
from tpaw.runtime.watch import Watch
from tpaw.storage.artifacts import (
    MANIFEST,
    PARTIAL_MANIFEST,
    TEMPORARY_PREFIX,
    Facts,
    is_published,
    read_files,
    read_manifest,
    read_sealed,
    refuse_links,
    refuse_without_manifest,
    remove_artifacts,
    remove_temporaries,
    verify,
    verify_file,
    write_sealed,
    write_text,
)
from tpaw.storage.failures import nearest_folder, storage_failure
from tpaw.storage.lock import locked, now
from tpaw.storage.removal import finish_removal, removed_by
from tpaw.storage.seals import SEAL, is_intact, seal_text

FORMAT = 2
# In format 1, config.yaml, run.json, players/0.json and training.jsonl have no checksums.
WITHOUT_CHECKSUMS = 1
# What tpaw writes into a run directory. Anything else in it belongs to somebody else.
NAMES = (
    "lock",
    "run.json",
    "config.yaml",
    "report.html",
    "summary.json",
    "players",
    "inputs",
    "iterations",
    "logprobs",
    "prepared",
    "trackers.json",
    "tensorboard",
)


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
    def server_drift(self) -> Path:
        """JSON file, sealed: how far a generation server's log-probs of D_t are from our own."""
        return self.folder / "server_drift.json"

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

    @property
    def critic(self) -> Path:
        """Artifact of method critic: the critic, its scores of D_t, and its results."""
        return self.folder / "critic"

    @property
    def critic_training(self) -> Path:
        """Folder of the saved steps of the critic. It is removed when the critic is published."""
        return self.folder / "critic-training"

    @property
    def critic_log(self) -> Path:
        """JSON lines file: one line for each logged step of the critic."""
        return self.folder / "critic.jsonl"

    def last_saved_step(self) -> Path | None:
        """Folder of the newest complete saved step of the policy, or None."""
        return _newest_step_in(self.training)

    def last_saved_step_of_critic(self) -> Path | None:
        """Folder of the newest complete saved step of the critic, or None."""
        return _newest_step_in(self.critic_training)


def _newest_step_in(folder: Path) -> Path | None:
    complete = [path for path in folder.glob("checkpoint-*") if is_published(path)]
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
        """JSON file, sealed: format, versions, when the run began and was resumed, its name."""
        return self.root / "run.json"

    @property
    def lock_file(self) -> Path:
        """The lock; it names the process that holds it."""
        return self.root / "lock"

    @property
    def config_file(self) -> Path:
        """YAML file, sealed: the complete configuration."""
        return self.root / "config.yaml"

    @property
    def initial_player_file(self) -> Path:
        """JSON file, sealed: path or Hub id, revision and fingerprint of θ_0."""
        return self.root / "players" / "0.json"

    @property
    def inputs(self) -> Path:
        """Artifact: the tokenised examples, the held-out examples and the tokenizer."""
        return self.root / "inputs"

    @property
    def report_file(self) -> Path:
        """HTML file: what the run did, for people."""
        return self.root / "report.html"

    @property
    def summary_file(self) -> Path:
        """JSON file: the results that `tpaw run` prints at its end."""
        return self.root / "summary.json"

    @property
    def trackers_file(self) -> Path:
        """JSON file: what the trackers of `train.report_to` have got, and their runs."""
        return self.root / "trackers.json"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard's event files."""
        return self.root / "tensorboard"

    def iteration(self, t: int) -> Iteration:
        """The iteration that trains θ_{t+1} from θ_t."""
        return Iteration(self.root, t)

    def responses(self, i: int) -> Path:
        """Sharded artifact: D_{i-1}, the responses of θ_{i-1}."""
        return self.iteration(i - 1).responses

    def checkpoint(self, i: int) -> Path:
        """Artifact: θ_i, which transformers and vLLM can load."""
        return self.iteration(i - 1).checkpoint

    def weights_removed(self, i: int) -> str | None:
        """Say that `keep` has removed the weights of θ_i, as a clause; None if it has not."""
        by = removed_by(self.checkpoint(i))
        return f"the weights of θ_{i} were removed by {by}" if by else None

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
        return self.suites(i) / name

    def suites(self, i: int) -> Path:
        """Folder of the results of θ_i on benchmark suites, one folder for each suite."""
        return self.iteration(i - 1).folder / "suites"

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

    def uses_initial_player(self) -> bool:
        """Whether the run has files that were made with θ_0."""
        made = (self.evaluation(0), self.responses(1), self.root / "logprobs")
        return any(path.exists() for path in made) or self.iterations_begun() > 0

    def facts(self) -> Facts:
        """Read run.json.

        Raises:
            InputError: another version of TPAW wrote the run.
            ArtifactError: run.json is damaged.
        """
        facts = read_sealed(self.run_file)
        if (found := facts["format"]) not in (FORMAT, WITHOUT_CHECKSUMS):
            raise InputError(
                f"{self.root}: has format {found}; this version reads {WITHOUT_CHECKSUMS} and "
                f"{FORMAT}; use the version of tpaw that began the run"
            )
        if found == FORMAT and SEAL not in facts:
            raise ArtifactError(
                f"{self.run_file}: damaged or edited: its checksum is missing; restore it from a "
                "backup"
            )
        return facts

    def name(self) -> str:
        """The name for people: the one that the run began with, or that of the folder.

        Raises:
            ArtifactError, InputError: see `facts`.
        """
        return str(self.facts().get("name") or self.root.resolve().name)

    def load_config(self) -> RunConfig:
        """Read the configuration with which the run began or was last resumed.

        Raises:
            ArtifactError: see `check_config`.
            InputError: see `check_config`; also if config.yaml is invalid.
        """
        self.check_config()
        return RunConfig.load(str(self.config_file))

    def check_config(self) -> None:
        """Check config.yaml against its checksum. It is not parsed.

        Raises:
            ArtifactError: run.json or config.yaml is missing, damaged or edited.
            InputError: another version of TPAW wrote the run.
        """
        has_checksums = self.facts()["format"] != WITHOUT_CHECKSUMS
        if not self.config_file.is_file():
            raise ArtifactError(
                f"{self.config_file}: missing, but the run has begun; restore it from a backup"
            )
        text = self.config_file.read_text(encoding="utf-8", errors="replace")
        intact = is_intact(text)
        if intact is False or (intact is None and has_checksums):
            raise ArtifactError(
                f"{self.config_file}: damaged, or edited after the run began; restore it, or begin "
                "a run in another folder. To change a setting that may change, use --set."
            )

    def read_training_log(self, i: int) -> list[dict[str, Any]]:
        """Read training.jsonl of a finished iteration, after checking it against θ_i's manifest.

        Returns:
            One mapping for each logged step, at least one.

        Raises:
            ArtifactError: the log is missing, damaged or edited. θ_i itself is not affected.
        """
        log = self.training_log(i)
        try:
            entry = read_manifest(self.checkpoint(i)).get("training_log")  # absent in format 1
            if entry is not None:
                verify_file(log, entry)
            lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
            if not all(isinstance(line["step"], int) for line in lines) or not lines:
                raise ValueError("no steps")
        except (ArtifactError, OSError, ValueError, KeyError, TypeError):
            raise ArtifactError(
                f"{log.relative_to(self.root)}: missing, damaged or edited; θ_{i} is not affected. "
                f"Training metrics of iteration {i} are left out. To see them again, restore this "
                "file from a backup."
            ) from None
        return lines

    def manifests(self, iterations: int) -> list[Path]:
        """The manifests of all artifacts in the run, complete or not.

        Args:
            iterations: number of iterations of the run, T.

        Raises:
            ArtifactError: an artifact has files but no manifest.
        """
        folders = [self.inputs, *sorted((self.root / "logprobs").glob("*"))]
        for i in range(iterations + 1):
            iteration = self.iteration(i - 1)
            folders += [self.responses(i), iteration.critic, self.checkpoint(i), self.evaluation(i)]
            folders += sorted(self.suite(i, "").glob("*"))
        for folder in folders:
            refuse_without_manifest(folder)
        # A crash can leave a saved step without a manifest. It is ignored, so it is no error.
        folders += sorted((self.root / "iterations").glob("*/training/checkpoint-*"))
        folders += sorted((self.root / "iterations").glob("*/critic-training/checkpoint-*"))
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


def needs_trust(config: RunConfig) -> bool:
    """Whether a run with this configuration needs `--trust` when it is resumed by its directory."""
    return config.model.trust_remote_code or config.generate.backend == "server"


def refuse_untrusted_server(generate: GenerateConfig, run: RunDirectory, *, trust: bool) -> None:
    """Refuse a generation server that the stored configuration of a run starts or asks.

    Args:
        generate: the section `generate` of a configuration that was read from `run`.
        run: the run directory.
        trust: whether the user has allowed it (`--trust`).

    Raises:
        InputError: there is such a server, and `trust` is false.
    """
    server = generate.server
    if trust or generate.backend != "server":
        return
    if server.command is not None:
        raise InputError(
            f"generate.server.command: {brief(server.command)}: {run.config_file} asks to run this "
            "command; add --trust if you trust whoever made this run"
        )
    raise InputError(
        f"generate.server.endpoints: {brief(list(server.endpoints))}: {run.config_file} asks to "
        "send prompts to these servers; add --trust if you trust whoever made this run"
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
        ArtifactError: run.json or config.yaml is damaged or edited.
    """
    run = RunDirectory(root)
    if run.root.exists() and not run.root.is_dir():
        raise InputError(f"--output {root}: is a file; give a folder")
    nearest = nearest_folder(run.root)
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"--output {root}: {nearest} is not writable; choose another --output")
    if not run.has_begun():
        if run.root.exists() and (foreign := _foreign(run.root)):
            raise InputError(
                f"--output {root}: the folder is not empty and was not created by tpaw: it holds "
                f"{', '.join(foreign[:5])}; choose another --output"
            )
        return None
    _refuse_links(run)
    kept = run.load_config()
    if changed := differences(kept, config, begun=run.iterations_begun()):
        raise InputError(
            f"--output {root}: holds a run with other settings (stored → given):\n  "
            + "\n  ".join(changed)
            + "\nChoose another --output, or go on with the settings that the run began with: "
            f"tpaw run {shlex.quote(str(root))}"
        )
    return kept


@contextlib.contextmanager
def open_run(
    root: str | Path, config: RunConfig, name: str | None = None
) -> Iterator[RunDirectory]:
    """Lock a run directory and begin or resume the run in it.

    Args:
        root: the run directory. It is created if it does not exist.
        config: the configuration to begin or resume with. It is stored in the run directory.
        name: of a run that begins, for people. Default: that of the folder.

    Yields:
        The run directory, locked until the context ends.

    Raises:
        InputError: the folder cannot be used; see `check_output`.
        RunLockedError: another process works on the run.
        ArtifactError: run.json or config.yaml is damaged or edited.
        StorageError: the file system failed, here or inside the context.
    """
    run = RunDirectory(root)
    with _storage_failures(run.root):
        if not run.has_begun():
            check_output(root, config)  # before a lock file appears in a folder that is not a run
        run.root.mkdir(parents=True, exist_ok=True)
        with locked(run.lock_file):
            kept = check_output(root, config)
            _remove_temporaries(run)
            old = run.facts() if run.has_begun() else None
            is_old_format = old is not None and old["format"] == WITHOUT_CHECKSUMS
            if kept != config or is_old_format:
                write_text(run.config_file, seal_text(to_yaml(config, comments=True)))
            if is_old_format and run.initial_player_file.is_file():
                write_sealed(run.initial_player_file, read_sealed(run.initial_player_file))
            _record_session(run, old, name)
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
    _refuse_links(run)
    iteration = run.iteration(number - 1)
    if number < 1 or not (iteration.training_log.exists() or iteration.training.exists()):
        raise InputError(
            f"{key}: iteration {number} of {root} has not begun to train; run without "
            "--restart-iteration"
        )
    if is_published(iteration.checkpoint):
        removed = f", and {clause}" if (clause := run.weights_removed(number)) else ""
        raise InputError(
            f"{key}: θ_{number} is already published in {root}{removed}; only an unfinished "
            "iteration can restart"
        )
    with _storage_failures(run.root), locked(run.lock_file):
        remove_artifacts(iteration.training)
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


def finish_removals(run: RunDirectory, iterations: int) -> None:
    """Remove the weights whose removal a crash cut short.

    Args:
        run: the run directory, locked.
        iterations: number of iterations of the run, T.
    """
    for i in range(1, iterations + 1):
        finish_removal(run.checkpoint(i))


def environment() -> dict[str, Any]:
    """Package versions, Python version and machine type, to store with results."""
    packages = ("tpaw", "torch", "transformers", "tokenizers", "accelerate", "datasets", "pyarrow")
    found = {}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return {"versions": found, "python": platform.python_version(), "machine": platform.machine()}


def _record_session(run: RunDirectory, old: Facts | None, name: str | None) -> None:
    """Record the package versions when the run begins, and again whenever they changed."""
    found = environment()
    if old is None:
        named = {} if name is None else {"name": name}
        write_sealed(run.run_file, {"format": FORMAT, "began": now(), **named, **found})
        return
    resumed = list(old.get("resumed", []))
    before = _flat(resumed[-1] if resumed else old)
    after = _flat(found)
    changes = [
        f"{name} {before.get(name, 'none')} → {after.get(name, 'none')}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]
    if old["format"] == WITHOUT_CHECKSUMS:
        note(
            f"{run.root}: an older version of tpaw began this run, without checksums for "
            "config.yaml, run.json and players/0.json; from now on they have them"
        )
    if changes:
        note(f"versions changed since the last session: {', '.join(changes)}; results may differ")
        resumed.append({"at": now(), **found})
    if changes or old["format"] == WITHOUT_CHECKSUMS:
        facts = dict(old) | {"format": FORMAT} | ({"resumed": resumed} if resumed else {})
        write_sealed(run.run_file, facts)


def _flat(session: Mapping[str, Any]) -> dict[str, str]:
    others = {key: session[key] for key in ("python", "machine") if key in session}
    return {**session.get("versions", {}), **others}


@contextlib.contextmanager
def _storage_failures(root: Path) -> Iterator[None]:
    """Raise a failure of the file system as a StorageError that says how to resume."""
    try:
        yield
    except TpawError:
        raise
    except Exception as error:
        failure = storage_failure(error, root)
        if failure is None:
            raise
        raise StorageError(
            f"{failure}. Published files and saved steps are kept. Correct the cause, then run the "
            f"same command again to resume {root}."
        ) from error


def _refuse_links(run: RunDirectory) -> None:
    refuse_links(run.root, (run.root / name for name in NAMES))


def _remove_temporaries(run: RunDirectory) -> None:
    """Remove what a crash left, in the places of ours alone."""
    for name in NAMES:
        remove_temporaries(run.root / name)
    remove_temporaries(run.root, below=False)


def _foreign(root: Path) -> list[str]:
    """Names in a folder without a run that an earlier attempt to begin a run did not write."""
    names = sorted(p.name for p in root.iterdir() if not p.name.startswith(TEMPORARY_PREFIX))
    lock = root / "lock"
    holder = lock.read_text(errors="replace") if lock.is_file() else ""
    # A crash during the first write leaves an empty lock file.
    left_by_us = ["lock", "config.yaml"] if '"pid"' in holder else ["lock"] if not holder else []
    return [name for name in names if name not in left_by_us]
