"""What trackers get: one run over all iterations, each value once, whatever happens to the run."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import random
import shutil
import struct
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml
from builders import contents, run_settings, stopped_at_step
from fork_server import Forked

from tpaw.config.schema import RunConfig
from tpaw.errors import InputError
from tpaw.report import pace
from tpaw.report.html.content import cost_rows
from tpaw.report.summary import summarise
from tpaw.report.tracker_clients import CLIENTS, check_trackers
from tpaw.report.trackers import Trackers
from tpaw.selfplay import self_play
from tpaw.storage.run_directory import RunDirectory, open_run, restart_iteration

TRAINED = [3, 6]  # steps of two iterations: 24 rows against one opponent and two, 8 a step


def is_installed(name):
    return importlib.util.find_spec(name) is not None


INSTALLED = [name for name in CLIENTS if is_installed(name)]
EACH = pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                name not in INSTALLED, reason=f"needs the library: pip install {name}"
            ),
        )
        for name in CLIENTS
    ],
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where trackers write, away from every network. Trackio's folder is in conftest.py."""
    folder = tmp_path_factory.mktemp("trackers")
    (folder / "wandb").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_DIR", str(folder))
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("MLFLOW_TRACKING_URI", str(folder / "mlflow"))
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        yield folder


@pytest.fixture(scope="module")
def patched():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


PROJECTS = ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME", "TRACKIO_PROJECT")


# What a tracker has, read with its own reader.


class Found(NamedTuple):
    """Curves are (step, value) by name."""

    curves: dict
    alarms: list
    config: dict
    tables: list
    runs: int


def read_tensorboard(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.tensorboard), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()

    def texts(tag):
        return [e.tensor_proto.string_val[0].decode() for e in events.Tensors(tag)]

    [config] = texts("config/text_summary")
    return Found(
        {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags["scalars"]},
        [text for tag in tags["tensors"] if tag.startswith("alarms/") for text in texts(tag)],
        yaml.safe_load(config.strip("`").removeprefix("yaml")),
        [
            [row.strip("| ").split(" | ") for row in text.split("\n")[2:]]
            for text in texts("table/text_summary")
        ],
        1,
    )


def wandb_records(path):
    """W&B writes LevelDB's log format: blocks of 32 KiB, records with a head of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def read_wandb(run):
    curves, alarms, config, tables, steps, ids = {}, [], {}, [], [], set()
    for file in sorted((run.root.parent / "wandb").glob("offline-run-*/run-*.wandb")):
        records = list(wandb_records(file))
        begun = [r.run for r in records if r.WhichOneof("record_type") == "run"]
        if not begun or begun[0].project != run.root.name:
            continue  # W&B had written nothing of it when it was killed
        ids.add(begun[0].run_id)
        for record in records:
            kind = record.WhichOneof("record_type")
            if kind == "history":
                row = {i.key or i.nested_key[0]: i.value_json for i in record.history.item}
                steps.append(int(row["_step"]))
                for name in row:
                    if "/" in name:
                        point = int(row["optimizer_step"]), float(json.loads(row[name]))
                        curves.setdefault(name, []).append(point)
            elif kind == "alert":
                alarms.append(record.alert.text)
            elif kind == "config":
                config |= {u.key: json.loads(u.value_json) for u in record.config.update}
        for table in sorted(file.parent.glob("files/media/table/*.json")):
            tables.append(json.loads(table.read_text())["data"])
    assert steps == sorted(set(steps))  # W&B drops rows whose own step does not rise
    return Found(curves, alarms, config, tables, len(ids))


def read_mlflow(run):
    import mlflow

    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name(run.root.name).experiment_id
    [kept, *others] = client.search_runs([experiment])

    def file(name):
        with open(client.download_artifacts(kept.info.run_id, name), encoding="utf-8") as opened:
            return yaml.safe_load(opened)

    curves = {
        name.replace(".player", "/player"): [
            (m.step, m.value) for m in client.get_metric_history(kept.info.run_id, name)
        ]
        for name in kept.data.metrics
    }
    alarms = [v for k, v in sorted(kept.data.tags.items()) if k.startswith("alarm.")]
    assert kept.data.params["objective.lambda"] == "0.1"
    assert kept.info.status == "FINISHED"
    return Found(curves, alarms, file("config.yaml"), [file("table.json")["data"]], 1 + len(others))


def read_trackio(run):
    from trackio.sqlite_storage import SQLiteStorage

    project = run.root.name
    [kept, *others] = SQLiteStorage.get_runs(project)
    curves, tables = {}, []
    for row in SQLiteStorage.get_logs(project, kept):
        for name, value in row.items():
            if "/" in name:
                curves.setdefault(name, []).append((row["step"], value))
            elif name == "table":
                tables.append([list(line.values()) for line in value["_value"]])
    alarms = sorted(SQLiteStorage.get_alerts(project, kept), key=lambda alert: alert["step"])
    config = SQLiteStorage.get_run_config(project, kept)
    return Found(curves, [alert["text"] for alert in alarms], config, tables, 1 + len(others))


READERS = {
    "tensorboard": read_tensorboard,
    "wandb": read_wandb,
    "mlflow": read_mlflow,
    "trackio": read_trackio,
}


def expected_curve(run, metric, trained=TRAINED):
    """From the logs: each iteration begins where the one before has ended."""
    points, offset = [], 0
    for i, steps in enumerate(trained, start=1):
        lines = map(json.loads, run.training_log(i).read_text().splitlines())
        points += [(offset + line["step"], float(line[metric])) for line in lines]
        offset += steps
    return points


def close(points):
    """TensorBoard has 32 bits."""
    return [(step, pytest.approx(value, rel=1e-6, nan_ok=True)) for step, value in points]


@pytest.fixture(scope="module")
def resumed(folder, patched, model_folder, data_file, heldout_file):
    """A run that was stopped in its first iteration and went on; all trackers followed it."""
    settings = run_settings(model_folder, data_file, heldout_file) | {"iterations": 2}
    settings["train"]["report_to"] = INSTALLED
    config = RunConfig.load(settings)
    root = folder / "resumed"
    for name in PROJECTS:
        patched.setenv(name, "resumed")
    stopped_at_step(2, config, root)
    lines = RunDirectory(root).training_log(1).read_text().splitlines()
    assert 0 < len(lines) < TRAINED[0]
    self_play(config, root)
    return RunDirectory(root), config, settings


@EACH
def test_the_curves_go_over_all_iterations_without_gap_or_duplicate(name, resumed):
    run, _, _ = resumed
    found = READERS[name](run)
    steps = list(range(1, sum(TRAINED) + 1))
    for metric in ("loss", "rewards/target", "rewards/margins/player_0", "learning_rate"):
        curve = found.curves[f"train/{metric}"]
        assert [step for step, _ in curve] == steps, metric
        assert curve == close(expected_curve(run, metric)), metric
    assert [v for _, v in found.curves["train/iteration"]] == [1] * 3 + [2] * 6
    assert found.runs == 1


@EACH
def test_evaluations_stand_where_their_iteration_ended(name, resumed):
    run, _, _ = resumed
    curves = READERS[name](run).curves
    results = [json.loads((run.evaluation(i) / "results.json").read_text()) for i in range(3)]
    ends = [0, 3, 9]
    for metric in ("margin", "gap", "nonpositive_gap_share", "target_logp"):
        values = [found["logps"][metric] for found in results]
        assert curves[f"evaluate/{metric}"] == close(zip(ends, values, strict=True)), metric
    accuracies = [found["exact_match"]["accuracy"] for found in results]
    assert curves["evaluate/accuracy"] == close(zip(ends, accuracies, strict=True))
    assert [step for step, _ in curves["responses/tokens"]] == [0, 3]


@EACH
def test_configuration_alarms_and_the_table(name, resumed):
    run, config, _ = resumed
    found = READERS[name](run)
    assert found.config["objective"]["lambda"] == config.objective.lambda_
    assert found.config["train"]["learning_rate"] == 1e-3
    cut = [text for text in found.alarms if "were cut at the length limit." in text]
    assert [text.partition("θ_")[2][0] for text in cut] == ["0", "1"]
    [table] = found.tables
    assert [row[0] for row in table] == ["θ_0", "θ_1", "θ_2"]
    results = json.loads((run.evaluation(2) / "results.json").read_text())
    assert float(table[2][3]) == pytest.approx(results["logps"]["margin"], abs=0.006)


def test_the_bytes_of_a_run_do_not_depend_on_trackers(resumed, tmp_path):
    run, _, settings = resumed
    without = RunConfig.load(settings, {"train": {"report_to": []}})
    self_play(without, tmp_path / "without")
    alone = RunDirectory(tmp_path / "without")
    assert contents(run.root) == contents(alone.root)
    for i in (1, 2):
        assert run.training_log(i).read_bytes() == alone.training_log(i).read_bytes()
    assert not alone.trackers_file.exists()
    assert not alone.tensorboard.exists()


def test_the_space_in_a_report_does_not_depend_on_trackers(resumed, tmp_path):
    run, config, _ = resumed
    shutil.copytree(run.root, tmp_path / "run")
    copy = RunDirectory(tmp_path / "run")
    shutil.rmtree(copy.tensorboard, ignore_errors=True)
    copy.trackers_file.unlink(missing_ok=True)
    with_them, without = (cost_rows(r, summarise(r, config)) for r in (run, copy))
    assert with_them == without


def test_a_finished_run_sends_nothing_again(resumed, capsys):
    run, config, _ = resumed

    def files():
        return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in run.root.parent.rglob("*.*")}

    before = files()
    self_play(config, run.root)
    changed = {p for p, stat in files().items() if before.get(p) != stat}
    assert not changed
    assert not capsys.readouterr().out


@pytest.fixture(scope="module")
def killed(folder, forks, patched, resumed):
    """A run that was killed without warning while it trained, and went on."""
    settings = resumed[2] | {"iterations": 1}
    settings["train"] = settings["train"] | {"save_every": 100}
    config = folder / "killed.yaml"
    config.write_text(yaml.safe_dump(settings))
    out = folder / "killed.txt"
    env = dict.fromkeys(PROJECTS, "killed")
    patched.delenv("WANDB_SERVICE", raising=False)  # a killed run has a W&B process of its own
    # A step has two micro-batches. Steps 1 and 2 are logged then, and no step is saved.
    command = ["kill_driver:main", config, folder / "killed", "train:5"]
    driver = Forked(*command, out=out, err=folder / "killed-err.txt", env=env)
    assert driver.wait(timeout=300) == 0
    assert out.read_text().split("\n")[:2] == ["killed", "exit 0"]
    return RunDirectory(folder / "killed")


@pytest.mark.process
@EACH
def test_killed_while_it_trains(name, killed):
    found = READERS[name](killed)
    assert found.curves["train/loss"] == close(expected_curve(killed, "loss", TRAINED[:1]))
    assert [step for step, _ in found.curves["train/loss"]] == [1, 2, 3]
    assert [step for step, _ in found.curves["evaluate/gap"]] == [0, 3]
    assert len(found.tables) == found.runs == 1


# What the libraries cannot be made to do: fail at a moment, lose what they hold.


class Fake:
    """A tracker that keeps what it gets; it fails where `breaks` says so."""

    id, is_buffered = "fake", False
    sessions: list

    def __init__(self, start):
        self.start = start
        self.breaks("open", start.next_step)
        self.got = []
        Fake.sessions.append(self)

    def configure(self, config):
        self._take("config", 0, config)

    def log(self, values, step, row):
        self._take("log", step, values)

    def table(self, headings, rows, step, row):
        self._take("table", step, rows)

    def alert(self, name, text, step):
        self._take("alert", step, name)

    def close(self, *, is_done):
        self.got.append(("close", None, is_done))

    def _take(self, kind, step, value):
        self.breaks(kind, step)
        self.got.append((kind, step, value))

    breaks = staticmethod(lambda kind, step: None)


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(Fake, "sessions", [], raising=False)
    monkeypatch.setitem(CLIENTS, "fake", Fake)
    monkeypatch.setattr(pace, "SHARE_OF_TIME", 1e9)  # tried again at once
    return Fake


@pytest.fixture
def copied(resumed, tmp_path):
    """A finished run of two iterations that no tracker has followed."""
    shutil.copytree(resumed[0].root, tmp_path / "run")
    run = RunDirectory(tmp_path / "run")
    run.trackers_file.unlink(missing_ok=True)
    settings = dict(resumed[2]) | {"train": resumed[2]["train"] | {"report_to": "fake"}}
    return run, RunConfig.load(settings)


def losses(fake):
    """(step, loss) of everything that was sent, in all sessions."""
    got = [item for session in fake.sessions for item in session.got]
    return [(s, v["train/loss"]) for kind, s, v in got if kind == "log" and "train/loss" in v]


def kinds(fake):
    return [kind for session in fake.sessions for kind, *_ in session.got]


def test_a_tracker_that_is_added_later_gets_the_whole_run(fake, copied):
    run, config = copied
    trackers = Trackers(run, config)
    trackers.close()
    [session] = fake.sessions
    assert session.start.name == "run"
    steps = [step for kind, step, _ in session.got if kind == "log"]
    assert steps == sorted(steps)
    assert losses(fake) == expected_curve(run, "loss")
    assert kinds(fake)[0] == "config"
    assert kinds(fake)[-2:] == ["table", "close"]
    assert session.got[-1] == ("close", None, True)
    Trackers(run, config).close()
    assert len(fake.sessions) == 1  # nothing was left to send, so none was opened


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        (None, {}, "seed-3"),
        ("tpaw, λ = 10, seed 3", {}, "tpaw, λ = 10, seed 3"),
        ("tpaw, λ = 10, seed 3", {"run_name": "mine"}, "mine"),
        (None, {"run_name": "mine"}, "mine"),
    ],
)
def test_the_name_of_a_run(fake, settings, tmp_path, name, arguments, expected):
    settings["train"] |= {"report_to": "fake", "training_arguments": arguments}
    config = RunConfig.load(settings)
    with open_run(tmp_path / "seed-3", config, name):
        pass
    with open_run(tmp_path / "seed-3", config) as run:  # as a study does: first it begins the run
        Trackers(run, config).after_a_stage()
    [session] = fake.sessions
    assert session.start.name == expected


@pytest.mark.parametrize("broken", ["open", "config", "log", "alert", "table"])
def test_a_tracker_that_fails_misses_nothing_and_one_line_says_so(
    fake, copied, broken, monkeypatch, capsys
):
    run, config = copied
    failed = []

    def breaks(kind, step):
        if kind == broken and (kind != "log" or step == 5) and len(failed) < 3:
            failed.append(kind)
            raise ConnectionError("the network\x1b[31m is gone\nmore")

    monkeypatch.setattr(Fake, "breaks", staticmethod(breaks))
    trackers = Trackers(run, config)
    for _ in range(4):
        trackers.after_an_iteration()
    trackers.close()
    assert len(failed) == 3
    assert losses(fake) == expected_curve(run, "loss")
    sent = [kind for kind in kinds(fake) if kind != "close"]
    assert (sent.count("config"), sent.count("table"), sent.count("alert")) == (1, 1, 1)
    err = capsys.readouterr().err
    assert err.count("fake failed, and the run goes on: the network\\x1b[31m is gone") == 1
    assert err.count("fake failed 3 times in this session") == 1
    assert "\x1b" not in err


def test_a_run_goes_on_when_its_tracker_fails(fake, resumed, tmp_path, monkeypatch, capsys):
    run, seen = RunDirectory(tmp_path / "run"), []

    def breaks(kind, step):
        random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
        if kind == "log" and step > 0:
            seen.append((step, run.checkpoint(1).exists()))
        if kind == "log" and step > 1:
            raise ConnectionError("gone")

    monkeypatch.setattr(Fake, "breaks", staticmethod(breaks))
    monkeypatch.setattr("tpaw.pipeline.preflight.check_trackers", lambda names: None)
    settings = resumed[2] | {"iterations": 1}
    settings["train"] = settings["train"] | {"report_to": "fake"}
    self_play(RunConfig.load(settings), run.root)
    assert seen[:2] == [(1, False), (2, False)]  # while it trains
    assert contents(run.checkpoint(1)) == contents(resumed[0].checkpoint(1))
    assert capsys.readouterr().err.count("fake failed, and the run goes on: gone") == 1


def test_a_tracker_that_fails_takes_a_small_share_of_the_time(fake, copied, monkeypatch):
    run, config = copied
    now, tried = [0.0], []

    def breaks(kind, step):
        tried.append(now[0])
        now[0] += 30.0
        raise TimeoutError

    monkeypatch.setattr(pace, "SHARE_OF_TIME", 0.03)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(Fake, "breaks", staticmethod(breaks))
    trackers = Trackers(run, config)
    while now[0] < 10_000:
        trackers.after_a_stage()
        now[0] += 10
    assert 5 <= len(tried) <= 10
    assert 30 * len(tried) <= 0.035 * 10_000


def test_what_a_tracker_held_when_it_was_killed_is_sent_again(fake, copied, monkeypatch):
    run, config = copied
    monkeypatch.setattr(Fake, "is_buffered", True)
    Trackers(run, config).after_an_iteration()  # and no close: the process has died
    assert fake.sessions[0].start.id is None
    Trackers(run, config).close()
    assert fake.sessions[1].start.id == "fake"
    fake.sessions = fake.sessions[1:]
    assert losses(fake) == expected_curve(run, "loss")
    Trackers(run, config).close()
    assert len(fake.sessions) == 1


def test_numbers_that_are_not_finite_are_numbers(fake, copied):
    run, config = copied
    log = run.training_log(2)
    lines = list(map(json.loads, log.read_text().splitlines()))
    lines[1] |= {"loss": "nan", "grad_norm": "-inf", "remark": "text", "list": [1]}
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    Trackers(run, config).close()
    assert [step for step, value in losses(fake) if math.isnan(value)] == [5]
    assert not {"train/remark", "train/list", "train/step"} & {
        name for kind, _, values in fake.sessions[0].got if kind == "log" for name in values
    }
    norms = [v.get("train/grad_norm") for kind, _, v in fake.sessions[0].got if kind == "log"]
    assert norms.count(-math.inf) == 1


def test_lines_are_sent_while_they_are_written(fake, copied, capsys):
    """As a process elsewhere writes them: nobody says when, and a line may be there in part."""
    run, config = copied
    log, checkpoint = run.training_log(2), run.checkpoint(2)
    lines = log.read_bytes().splitlines(keepends=True)
    shutil.rmtree(checkpoint)
    shutil.rmtree(run.evaluation(2))
    log.write_bytes(lines[0] + lines[1][:9])
    trackers = Trackers(run, config)
    shown = []

    class Bar(contextlib.nullcontext):
        def __enter__(self):
            return lambda count, note="": shown.append((count, note))

    with trackers.following(1, Bar()) as advance:
        advance(1)
        assert [step for step, _ in losses(fake)] == [4]
        log.write_bytes(b"".join(lines[:2]) + lines[2][:20])
        advance(1, "loss")
        assert [step for step, _ in losses(fake)] == [4, 5]
        # Trained again from a saved step: another file, shorter or longer than what was read.
        for longer, count in ((0, 1), (99, 3)):
            again = [b" " * longer + line for line in lines[:count]]
            (log.parent / "new").write_bytes(b"".join(again))
            (log.parent / "new").replace(log)
            advance(1)
        assert [step for step, _ in losses(fake)] == [4, 5, 6]
        log.write_bytes(b"".join([*again, lines[3]]))
        advance(1)
        assert [step for step, _ in losses(fake)] == [4, 5, 6, 7]
    assert shown == [(1, ""), (1, "loss"), *[(1, "")] * 3]
    assert "failed" not in capsys.readouterr().err
    trackers.close()
    assert sorted(losses(fake)) == expected_curve(run, "loss")[:7]
    assert "table" not in kinds(fake)
    assert fake.sessions[-1].got[-1] == ("close", None, False)


def test_a_lost_log_moves_no_later_step(fake, copied):
    run, config = copied
    Trackers(run, config).close()
    run.training_log(1).unlink()
    sent = json.loads(run.trackers_file.read_text())
    del sent["fake"]["lines"]["2"]  # as if the second iteration were new
    run.trackers_file.write_text(json.dumps(sent))
    Trackers(run, config).close()
    assert [s for s, _ in losses(fake)] == [*range(1, 10), *range(4, 10)]


@pytest.mark.skipif("tensorboard" not in INSTALLED, reason="needs the library: tensorboard")
def test_an_iteration_that_is_restarted_is_shown_anew(resumed, tmp_path):
    run, config, _ = resumed
    shutil.copytree(run.root, tmp_path / "run")
    run = RunDirectory(tmp_path / "run")
    config = config.model_copy(
        update={"train": config.train.model_copy(update={"report_to": ("tensorboard",)})}
    )
    log = run.training_log(2)
    lines = list(map(json.loads, log.read_text().splitlines()))
    shutil.rmtree(run.checkpoint(2))
    shutil.rmtree(run.evaluation(2))
    restart_iteration(run.root, 2)
    Trackers(run, config).close()  # the next session
    log.write_text("".join(json.dumps(line | {"loss": 7.0}) + "\n" for line in lines[:2]))
    Trackers(run, config).close()
    curve = read_tensorboard(run).curves["train/loss"]
    assert curve == [*close(expected_curve(run, "loss", TRAINED[:1])), (4, 7.0), (5, 7.0)]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"fake": {"rows": "x"}}', '{"fake": 3}'])
def test_a_damaged_record_begins_a_new_run(fake, copied, text, capsys):
    run, config = copied
    run.trackers_file.write_text(text)
    Trackers(run, config).close()
    assert losses(fake) == expected_curve(run, "loss")
    assert "trackers.json: damaged" in capsys.readouterr().err


@pytest.mark.skipif("wandb" not in INSTALLED, reason="needs the library: wandb")
def test_wandb_is_not_sent_the_rows_that_its_server_has(copied, monkeypatch):
    run, config = copied
    logged = []

    def log(values, step, commit):
        logged.append(step)

    def init(**options):
        assert (options["id"], options["resume"]) == ("abc", "allow")
        return SimpleNamespace(
            step=7,  # the server has rows 0 to 6
            log=log,
            config={},
            define_metric=lambda *names, **options: None,
            alert=lambda **options: None,
            finish=lambda exit_code: None,
        )

    monkeypatch.setattr("wandb.init", init)
    config = config.model_copy(
        update={"train": config.train.model_copy(update={"report_to": ("wandb",)})}
    )
    # The last session that ended had sent 3 rows: two of θ_0 and a line of training.
    others = ["config", "evaluation 0", "responses 1"]
    kept = {"id": "abc", "rows": 3, "lines": {"1": 1}, "others": others}
    run.trackers_file.write_text(json.dumps({"wandb": kept}))
    Trackers(run, config).close()
    # Five evaluations and responses, nine lines, and the table.
    assert logged == list(range(7, 5 + 9 + 1))


# Before a run.


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (["foo"], ["'foo'", "tensorboard, wandb, mlflow, trackio"]),
        (["all"], ["'all'", "tensorboard, wandb, mlflow, trackio"]),
        (["tensorboard", "tensorboard"], ["'tensorboard'", "twice"]),
    ],
)
def test_names_are_refused_before_anything_is_written(names, parts, resumed, tmp_path):
    settings = resumed[2] | {"train": resumed[2]["train"] | {"report_to": names}}
    with pytest.raises(InputError) as refused:
        self_play(RunConfig.load(settings), tmp_path / "run")
    assert all(part in str(refused.value) for part in ["train.report_to", *parts])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", CLIENTS)
def test_a_missing_library_is_named_with_the_line_that_installs_it(name, monkeypatch):
    module = "torch.utils.tensorboard" if name == "tensorboard" else name
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf"train\.report_to: '{name}'.*pip install {name} "):
        check_trackers([name])


@pytest.mark.skipif("wandb" not in INSTALLED, reason="needs the library: wandb")
def test_wandb_without_a_key_is_refused(tmp_path):
    code = (
        "from tpaw.report.tracker_clients import check_trackers\n"
        "from tpaw.errors import InputError\n"
        "try: check_trackers(['wandb'])\n"
        "except InputError as error: print(error)\n"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    env |= {"HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    found = subprocess.run(
        command, env=env, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert found.stdout.startswith("train.report_to: 'wandb': W&B has no key; run `wandb login`")
    assert not list(tmp_path.rglob("*-run-*"))
