"""Send a run to experiment trackers: one run of theirs over all iterations.

What is sent comes from the files of the run directory alone, so it does not matter which process
trains. `trackers.json` notes what was sent. A killed run goes on where it stopped, and a tracker
that was added later gets the whole run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, TypeAdapter

from tpaw.config.schema import RunConfig
from tpaw.errors import first_line, printable
from tpaw.report.alarms import Alarm
from tpaw.report.pace import not_before
from tpaw.report.status import done_and_next
from tpaw.report.summary import summarise
from tpaw.report.tables import SUMMARY_HEADINGS, summary_cells
from tpaw.report.tracker_clients import CLIENTS, Client, Start
from tpaw.runtime.progress import Advance, note
from tpaw.storage.artifacts import is_published, write_text
from tpaw.storage.run_directory import RunDirectory


class Sent(BaseModel):
    """What a tracker has got.

    Attributes:
        id: of its run; None if none has begun.
        rows: how many times numbers or a table were sent.
        lines: iteration i -> the step of the last line of its training.jsonl.
        others: what else was sent, by name.
    """

    id: str | None = None
    rows: int = 0
    lines: dict[int, int] = {}
    others: list[str] = []


_FILE = TypeAdapter(dict[str, Sent])


class Trackers:
    """The trackers of `train.report_to`. They never end the run.

    Args:
        run: the run directory, locked.
        config: the run's configuration.
    """

    def __init__(self, run: RunDirectory, config: RunConfig) -> None:
        self._run = run
        self._config = config
        self._sent = _read(run.trackers_file)
        for name, sent in list(self._sent.items()):
            # An unfinished iteration without a log begins anew; see --restart-iteration.
            begin_anew = {
                i
                for i in sent.lines
                if not (run.training_log(i).exists() or is_published(run.checkpoint(i)))
            }
            if begin_anew:
                sent.lines = {i: step for i, step in sent.lines.items() if i not in begin_anew}
                self._save(name, sent)
        self._trackers = [
            _Tracker(name, run, config, self._sent.get(name, Sent()), self._save)
            for name in config.train.report_to
        ]

    def after_a_stage(self) -> None:
        """Send what the run has published since."""
        self._send_all()

    def after_an_iteration(self) -> None:
        """The same, and the table if the run is finished."""
        self._send_all(with_table=True)

    def following(
        self, t: int, progress: AbstractContextManager[Advance]
    ) -> AbstractContextManager[Advance]:
        """A progress bar of training that also sends each new line of training.jsonl.

        Args:
            t: the iteration that trains θ_{t+1}; counts from 0.
            progress: the bar.
        """
        return self._following(t + 1, progress) if self._trackers else progress

    @contextlib.contextmanager
    def _following(self, i: int, progress: AbstractContextManager[Advance]) -> Iterator[Advance]:
        offsets = [tracker.steps_before(i) for tracker in self._trackers]
        with progress as advance:

            def advance_and_send(count: int, note: str = "") -> None:
                advance(count, note)
                for tracker, offset in zip(self._trackers, offsets, strict=True):
                    tracker.attempt(partial(tracker.send_lines, i, offset))

            yield advance_and_send

    def close(self) -> None:
        """Send what is left, and end the session of each tracker."""
        if not self._trackers:
            return
        self._send_all(with_table=True, in_a_hurry=False)
        is_done = False
        with contextlib.suppress(Exception):  # the run's own error is the one to show
            is_done = _is_done(self._run, self._config)
        for tracker in self._trackers:
            tracker.close(is_done=is_done)

    def _send_all(self, *, with_table: bool = False, in_a_hurry: bool = True) -> None:
        if not self._trackers:
            return
        try:
            summary = summarise(self._run, self._config)
        except Exception as error:  # the stage that needs the file says what is wrong
            note(f"train.report_to: nothing was sent: {printable(first_line(error))}")
            return
        for tracker in self._trackers:
            tracker.attempt(
                partial(tracker.send, summary, with_table=with_table), in_a_hurry=in_a_hurry
            )

    def _save(self, name: str, sent: Sent) -> None:
        self._sent[name] = sent
        text = _FILE.dump_json(self._sent, indent=2).decode()
        write_text(self._run.trackers_file, text + "\n")


class _Place(NamedTuple):
    """How far a log was read: inode of the file and bytes."""

    inode: int
    read: int


class _Tracker:
    def __init__(
        self,
        name: str,
        run: RunDirectory,
        config: RunConfig,
        sent: Sent,
        save: Callable[[str, Sent], None],
    ) -> None:
        self.name = name
        self.failures = 0
        self._run = run
        self._config = config
        self._kept = sent
        self._sent = sent.model_copy(deep=True)
        self._save = save
        self._client: Client | None = None
        self._places: dict[int, _Place] = {}
        self._not_before = 0.0

    def attempt(self, work: Callable[[], None], *, in_a_hurry: bool = True) -> None:
        """Do `work`. If it fails, say so once; it is then left out for a while.

        Args:
            in_a_hurry: leave it out if it failed a short time ago.
        """
        began = time.monotonic()
        if in_a_hurry and began < self._not_before:
            return
        try:
            with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
                work()
        except Exception as error:  # a tracker is no reason to lose a run
            self.failures += 1
            if self.failures == 1:
                note(
                    f"train.report_to: {self.name} failed, and the run goes on: "
                    f"{printable(first_line(error))}"
                )
            with contextlib.suppress(Exception):
                self._end(is_done=False)
            self._not_before = not_before(began)
            return
        self._not_before = 0.0

    def send(self, summary: Mapping[str, Any], *, with_table: bool) -> None:
        """Send everything of the run that was not sent yet.

        Args:
            summary: the content of summary.json.
            with_table: also the table, if the run is finished.
        """
        players = summary["players"]
        is_done = _is_done(self._run, self._config)
        if not is_done:
            self._open()  # a tracker that cannot work shows at the beginning
        ends = [0]
        for entry in players:
            i = entry["iteration"]
            self._once(f"responses {i}", _of_responses(entry), ends[-1])
            if i > 0:
                self.send_lines(i, ends[-1])
                ends.append(self.steps_before(i + 1))
            self._once(f"evaluation {i}", _of_evaluation(entry), ends[-1])
            for suite, found in entry.get("suites", {}).items():
                self._once(f"suite {i} {suite}", _of_suite(suite, found), ends[-1])
        for alarm in (Alarm(**found) for found in summary["alarms"]):
            if self._lacks(name := f"alarm {alarm.iteration} {alarm.name}"):
                text = f"{alarm.text} {alarm.advice}"
                self._open().alert(alarm.name, text, ends[alarm.iteration])
                self._got(name)
        if is_done and with_table:
            self._send_table(summary, ends[-1])

    def send_lines(self, i: int, offset: int) -> None:
        """Send the new lines of training.jsonl.

        Args:
            i: the iteration that trains θ_i.
            offset: optimizer steps of the iterations before.
        """
        for line in self._new_lines(i):
            if line["step"] <= self._sent.lines.get(i, 0):
                continue
            values = {"train/iteration": i, **_of_line(line)}
            self._open().log(values, offset + line["step"], self._sent.rows)
            self._sent.lines[i] = line["step"]
            self._got(rows=1)

    def steps_before(self, i: int) -> int:
        """Optimizer steps of the iterations before i, which are finished.

        The log of a finished iteration may be lost; what was sent of it says its steps too.
        """
        return sum(
            max(_last_step(self._run.training_log(j)), self._sent.lines.get(j, 0))
            for j in range(1, i)
        )

    def close(self, *, is_done: bool) -> None:
        """End the session, and say what failed."""
        self.attempt(partial(self._end, is_done=is_done), in_a_hurry=False)
        if self.failures:
            note(
                f"train.report_to: {self.name} failed {self.failures} times in this session; the "
                "same command sends again what it lacks"
            )

    def _send_table(self, summary: Mapping[str, Any], step: int) -> None:
        rows = [cells for entry in summary["players"] if (cells := summary_cells(entry))]
        digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
        if self._lacks(name := f"table {digest}"):
            self._open().table(SUMMARY_HEADINGS, rows, step, self._sent.rows)
            self._got(name, rows=1)

    def _once(self, name: str, values: Mapping[str, float], step: int) -> None:
        if values and self._lacks(name):
            self._open().log(values, step, self._sent.rows)
            self._got(name, rows=1)

    def _lacks(self, name: str) -> bool:
        return name not in self._sent.others

    def _got(self, name: str | None = None, rows: int = 0) -> None:
        if name is not None:
            self._sent.others.append(name)
        self._sent.rows += rows
        if self._client is not None and not self._client.is_buffered:
            self._keep()

    def _keep(self) -> None:
        """Write down what was sent, so that the next session does not send it again."""
        self._kept = self._sent.model_copy(deep=True)
        self._save(self.name, self._kept)

    def _open(self) -> Client:
        if self._client is None:
            newest = max(self._sent.lines, default=1)
            next_step = self.steps_before(newest) + self._sent.lines.get(newest, 0) + 1
            name = self._config.train.training_arguments.get("run_name")
            name = name or self._run.name()
            start = Start(self._sent.id, name, self._config, self._run.tensorboard, next_step)
            self._client = CLIENTS[self.name](start)
            if self._sent.id is None:
                self._sent.id = self._client.id
                self._keep()
            if self._lacks("config"):
                self._client.configure(self._config)
                self._got("config")
        return self._client

    def _end(self, *, is_done: bool) -> None:
        """End the session of the client; what it did not deliver counts as not sent."""
        client, self._client = self._client, None
        self._places.clear()
        try:
            if client is not None:
                client.close(is_done=is_done)
                if client.is_buffered:
                    self._keep()
        finally:
            self._sent = self._kept.model_copy(deep=True)

    def _new_lines(self, i: int) -> Iterator[dict[str, Any]]:
        """The complete lines that were not read yet. A log that was written anew is read again."""
        log = self._run.training_log(i)
        try:
            status = log.stat()
        except OSError:
            return
        place = self._places.get(i, _Place(status.st_ino, 0))
        if place.inode != status.st_ino or place.read > status.st_size:
            place = _Place(status.st_ino, 0)
        if place.read == status.st_size:
            return
        with log.open("rb") as file:
            file.seek(place.read)
            text = file.read()
        text = text[: text.rfind(b"\n") + 1]
        self._places[i] = _Place(status.st_ino, place.read + len(text))
        yield from (json.loads(line) for line in text.splitlines())


def _is_done(run: RunDirectory, config: RunConfig) -> bool:
    """Whether no stage is left, also because `evaluate.stop_when_worse` ended the run."""
    return done_and_next(run, config)[1] is None


def _read(path: Path) -> dict[str, Sent]:
    """Read trackers.json. If it is damaged, each tracker begins a new run and gets everything."""
    try:
        return _FILE.validate_json(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        note(f"{path}: damaged; the trackers of train.report_to begin new runs")
        return {}


def _last_step(log: Path) -> int:
    """The step of the last line of a training.jsonl; 0 if there is none."""
    try:
        return int(json.loads(log.read_bytes().splitlines()[-1])["step"])
    except (OSError, ValueError, LookupError, TypeError):
        return 0


def _of_line(line: Mapping[str, Any]) -> dict[str, float]:
    """A number that is not finite is text in training.jsonl. Other text is left out."""
    found = {}
    for name, value in line.items():
        with contextlib.suppress(ValueError, TypeError):
            found[f"train/{name}"] = float(value)
    del found["train/step"]
    return found


def _of_responses(entry: Mapping[str, Any]) -> dict[str, float]:
    found = entry.get("responses")
    if not found:
        return {}
    return {
        "responses/identical_share": found["identical_share"],
        "responses/truncated_share": found["truncated_share"],
        "responses/tokens": found["tokens"] / found["rows"],
    }


def _of_evaluation(entry: Mapping[str, Any]) -> dict[str, float]:
    evaluation = entry.get("evaluation", {})
    found = {f"evaluate/{name}": value for name, value in evaluation.get("logps", {}).items()}
    if "exact_match" in evaluation:
        found["evaluate/accuracy"] = evaluation["exact_match"]["accuracy"]
    for temperature, sampled in evaluation.get("sampled_exact_match", {}).items():
        for name in ("accuracy", "distinct_correct"):
            if name in sampled:
                found[f"evaluate/{name}_at_{temperature}"] = sampled[name]
    return found


def _of_suite(suite: str, found: Mapping[str, Any]) -> dict[str, float]:
    parts = {"score": found, **found["benchmarks"]}
    return {f"suites/{suite}/{name}": part["score"] for name, part in parts.items()}
