"""Clients of experiment trackers. Each has one run of its own for the whole of ours.

A client begins its run when it is made, or continues it. Every method may raise whatever the
tracker's library raises; `report/trackers.py` deals with it.
"""

from __future__ import annotations

import importlib
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from uuid import uuid4

from tpaw.config.files import to_yaml
from tpaw.config.schema import RunConfig
from tpaw.errors import InputError, brief, first_line, printable

PROJECT = "tpaw"
"""The project or experiment, unless the tracker's own environment variable names another."""
SECONDS_TO_FINISH = 60
"""W&B may try to send for so long when a run ends."""
Values = Mapping[str, Any]
"""Numbers by name."""


class Start(NamedTuple):
    """What a client begins or continues its run with.

    Attributes:
        id: of the run to continue; None to begin one.
        name: of the run, for people.
        config: of the run.
        folder: for a tracker that writes files into the run directory.
        next_step: no optimizer step from here on was sent.
    """

    id: str | None
    name: str
    config: RunConfig
    folder: Path
    next_step: int


class Client(Protocol):
    """One tracker.

    Attributes:
        id: names the tracker's run.
        is_buffered: whether what is sent is safe only when `close` has returned.
    """

    id: str
    is_buffered: bool

    def configure(self, config: RunConfig) -> None:
        """Send the configuration, once, before anything else."""
        ...

    def log(self, values: Values, step: int, row: int) -> None:
        """Send numbers.

        Args:
            values: by name. They may be NaN or infinite.
            step: optimizer steps since the beginning of the run.
            row: number of the rows before. A row that may be lost is sent again with its number.
        """
        ...

    def table(
        self, headings: Sequence[str], rows: Sequence[Sequence[str]], step: int, row: int
    ) -> None:
        """Send the table of the run."""
        ...

    def alert(self, name: str, text: str, step: int) -> None:
        """Send an alarm."""
        ...

    def close(self, *, is_done: bool) -> None:
        """End the session.

        Args:
            is_done: whether the run is finished.
        """
        ...


class TensorBoard:
    """Event files in the run directory."""

    id = "tensorboard"
    is_buffered = False

    def __init__(self, start: Start) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard hides what an earlier session wrote from this step on.
        purge = None if start.id is None else start.next_step
        self._writer: Any = SummaryWriter(str(start.folder), purge_step=purge)

    def configure(self, config: RunConfig) -> None:
        """See `Client`."""
        self._text("config", f"```yaml\n{to_yaml(config, comments=False)}```", 0)

    def log(self, values: Values, step: int, row: int) -> None:
        """See `Client`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def table(
        self, headings: Sequence[str], rows: Sequence[Sequence[str]], step: int, row: int
    ) -> None:
        """See `Client`. TensorBoard renders Markdown."""
        lines = [headings, ["---"] * len(headings), *rows]
        self._text("table", "\n".join(f"| {' | '.join(line)} |" for line in lines), step)

    def alert(self, name: str, text: str, step: int) -> None:
        """See `Client`."""
        self._text(f"alarms/{name}", text, step)

    def close(self, *, is_done: bool) -> None:
        """See `Client`."""
        self._writer.close()

    def _text(self, tag: str, text: str, step: int) -> None:
        self._writer.add_text(tag, text, step)
        self._writer.flush()


class WandB:
    """A run of Weights & Biases; `WANDB_PROJECT`, `WANDB_MODE` and others have their meaning.

    A process of W&B's own writes and sends. What it holds is lost when the run is killed.
    """

    is_buffered = True

    def __init__(self, start: Start) -> None:
        import wandb

        self.id = start.id or uuid4().hex[:8]
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=self.id,
            name=start.name,
            resume="allow",
            reinit="create_new",  # the caller of self_play may have a run of its own
            settings=_wandb_settings(),
        )
        self._first_row = self._run.step  # of a run that goes on, W&B has the rows before
        self._run.define_metric("optimizer_step")
        self._run.define_metric("*", step_metric="optimizer_step")

    def configure(self, config: RunConfig) -> None:
        """See `Client`."""
        self._run.config.update(_as_json(config), allow_val_change=True)

    def log(self, values: Values, step: int, row: int) -> None:
        """See `Client`. W&B takes each of its own steps once; ours is a metric beside it."""
        if row >= self._first_row:
            self._run.log({**values, "optimizer_step": step}, step=row, commit=True)

    def table(
        self, headings: Sequence[str], rows: Sequence[Sequence[str]], step: int, row: int
    ) -> None:
        """See `Client`."""
        import wandb

        table = wandb.Table(columns=list(headings), data=[list(row) for row in rows])
        self.log({"table": table}, step, row)

    def alert(self, name: str, text: str, step: int) -> None:
        """See `Client`."""
        self._run.alert(title=name, text=text, level="WARN")

    def close(self, *, is_done: bool) -> None:
        """See `Client`."""
        self._run.finish(exit_code=0 if is_done else 1)


class MLflow:
    """A run of MLflow. It is not the active run of this process, which may be the caller's."""

    is_buffered = False
    PARAMETERS_AT_ONCE = 100  # MLflow's own limits
    LONGEST_PARAMETER = 500
    LONGEST_TAG = 5000

    def __init__(self, start: Start) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient()
        if start.id is not None:
            self.id = start.id
            self._client.update_run(self.id, "RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = (
            self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        )
        self.id = self._client.create_run(experiment_id, run_name=start.name).info.run_id

    def configure(self, config: RunConfig) -> None:
        """See `Client`. A long value is cut among the parameters; `config.yaml` has all."""
        from mlflow.entities import Param

        values = _flat(_as_json(config)).items()
        found = [Param(_mlflow_name(k), str(v)[: self.LONGEST_PARAMETER]) for k, v in values]
        for first in range(0, len(found), self.PARAMETERS_AT_ONCE):
            self._client.log_batch(self.id, params=found[first : first + self.PARAMETERS_AT_ONCE])
        self._client.log_text(self.id, to_yaml(config, comments=False), "config.yaml")

    def log(self, values: Values, step: int, row: int) -> None:
        """See `Client`."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(_mlflow_name(k), float(v), now, step) for k, v in values.items()]
        self._client.log_batch(self.id, metrics=metrics)

    def table(
        self, headings: Sequence[str], rows: Sequence[Sequence[str]], step: int, row: int
    ) -> None:
        """See `Client`. `log_table` would add the rows to those of an earlier table."""
        table = {"columns": list(headings), "data": [list(row) for row in rows]}
        self._client.log_dict(self.id, table, "table.json")

    def alert(self, name: str, text: str, step: int) -> None:
        """See `Client`. MLflow has no alerts."""
        self._client.set_tag(
            self.id, f"alarm.{step}.{_mlflow_name(name)}", text[: self.LONGEST_TAG]
        )

    def close(self, *, is_done: bool) -> None:
        """See `Client`."""
        self._client.set_terminated(self.id, "FINISHED" if is_done else "KILLED")


class Trackio:
    """A run of Trackio: in its local database, or in the Space of `TRACKIO_SPACE_ID`."""

    is_buffered = False

    def __init__(self, start: Start) -> None:
        import trackio

        self.id = start.id or f"{start.name}-{uuid4().hex[:8]}"  # Trackio finds runs by their name
        self._run: Any = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=self.id,
            config=_as_json(start.config),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def configure(self, config: RunConfig) -> None:
        """See `Client`. Trackio takes it anew in each session, when it begins."""

    def log(self, values: Values, step: int, row: int) -> None:
        """See `Client`."""
        self._run.log(dict(values), step=step)
        self._store()

    def table(
        self, headings: Sequence[str], rows: Sequence[Sequence[str]], step: int, row: int
    ) -> None:
        """See `Client`."""
        import trackio

        table = trackio.Table(columns=list(headings), data=[list(row) for row in rows])
        self._run.log({"table": table}, step=step)
        self._store()

    def alert(self, name: str, text: str, step: int) -> None:
        """See `Client`."""
        self._run.alert(title=name, text=text, step=step)
        self._store()

    def close(self, *, is_done: bool) -> None:
        """See `Client`. At the end of the process Trackio ends a run that is still its newest."""
        import trackio

        trackio.finish()

    def _store(self) -> None:
        """Write to the local database now: a thread would do it later, and may be killed before."""
        if self._run._is_local:
            with self._run._client_lock:
                self._run._flush_queues_inline()


CLIENTS: Mapping[str, Callable[[Start], Client]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
    "trackio": Trackio,
}


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that cannot work, without beginning a run of theirs.

    Args:
        names: of `train.report_to`.

    Raises:
        InputError: a name is unknown or given twice, a library is missing or does not load, or
            W&B has no key.
    """
    for name in names:
        key = f"train.report_to: {brief(name)}"
        if name not in CLIENTS:
            raise InputError(f"{key}: unknown tracker; allowed are {', '.join(CLIENTS)}")
        if names.count(name) > 1:
            raise InputError(f"{key}: is there twice; name each tracker once")
        try:
            importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
        except ImportError as error:
            why = printable(first_line(error))
            raise InputError(f"{key}: needs its library: pip install {name} ({why})") from None
        except Exception as error:
            why = printable(first_line(error))
            raise InputError(f"{key}: its library does not load: {why}") from None
        if name == "wandb":
            _check_wandb(key)


def _check_wandb(key: str) -> None:
    import wandb

    try:
        settings = wandb.setup(_wandb_settings()).settings
        has_key = settings.mode in ("offline", "dryrun", "disabled") or wandb.login(prompt=False)
    except Exception as error:
        why = printable(first_line(error))
        raise InputError(f"{key}: needs wandb 0.31 or newer, with valid settings ({why})") from None
    if not has_key:
        raise InputError(
            f"{key}: W&B has no key; run `wandb login`, or set WANDB_API_KEY, or WANDB_MODE=offline"
        )


def _wandb_settings() -> Any:
    import wandb

    return wandb.Settings(
        console="off", finish_timeout=SECONDS_TO_FINISH, finish_timeout_raises=True
    )


def _as_json(config: RunConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", by_alias=True)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, by dotted names; an empty one is a value."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def _mlflow_name(name: str) -> str:
    """The name with characters that MLflow allows, and with two slashes at most.

    In MLflow's file store a metric is a file, so the name of one cannot be the folder of another.
    """
    parts = re.sub(r"[^\w\-./ :]", "_", name).split("/")
    return ".".join(["/".join(parts[:3]), *parts[3:]])
