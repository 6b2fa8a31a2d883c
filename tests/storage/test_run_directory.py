from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys

import pytest
from messages import refused

import tpaw.storage.run_directory
from tpaw.config.schema import RunConfig
from tpaw.errors import RunLockedError
from tpaw.storage.artifacts import ShardedArtifact
from tpaw.storage.run_directory import RunDirectory, check_output, open_run


@pytest.fixture
def config(settings):
    return RunConfig.load(settings)


def changed(settings, **changes):
    return RunConfig.load(settings | changes)


def test_a_run_begins_once_and_keeps_its_configuration(tmp_path, config):
    with open_run(tmp_path / "r", config) as run:
        began = run.run_file.read_bytes()
        assert run.load_config() == config
    with open_run(tmp_path / "r", config) as run:
        assert run.run_file.read_bytes() == began
    assert json.loads(began)["versions"].keys() >= {"tpaw", "torch", "transformers"}


def test_another_configuration_is_refused_with_the_difference(tmp_path, settings, config):
    with open_run(tmp_path / "r", config):
        pass
    with refused(tmp_path / "r", "max_length: 128 → 100", "seed: 0 → 3"):
        check_output(tmp_path / "r", changed(settings, seed=3, max_length=100))


def test_what_may_change_is_taken_over(tmp_path, settings, config):
    with open_run(tmp_path / "r", config):
        pass
    other = changed(settings, train=settings["train"] | {"tokens_per_row": 99})
    with open_run(tmp_path / "r", other) as run:
        assert run.load_config().train.tokens_per_row == 99


def test_somebody_elses_folder_a_file_and_an_unwritable_place(tmp_path, config):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    with refused("thesis.tex", tmp_path / "home"):
        check_output(tmp_path / "home", config)
    with refused(tmp_path / "home" / "thesis.tex"):
        check_output(tmp_path / "home" / "thesis.tex", config)
    for name in ("config.yaml", "lock"):  # names of ours, contents of somebody else's
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("my: precious")
        with refused(tmp_path / name):
            check_output(tmp_path / name, config)
    with refused(tmp_path / "home" / "thesis.tex" / "run"):
        check_output(tmp_path / "home" / "thesis.tex" / "run", config)
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty", config)


def test_a_crash_at_the_very_first_write_leaves_no_foreign_folder(tmp_path, config):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "lock").write_text("")
    with open_run(tmp_path / "r", config):
        pass


def test_an_unwritable_folder(tmp_path, config, monkeypatch):
    # As root every folder is writable, so the answer of the system is given here.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with refused(tmp_path):
        check_output(tmp_path / "deep" / "run", config)


def test_a_run_that_never_came_to_begin_is_no_foreign_folder(tmp_path, config):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "lock").write_text('{"host": "h", "pid": 1, "since": "x"}')
    (tmp_path / "r" / "config.yaml").write_text("half")
    (tmp_path / "r" / ".tmp-run.json").write_text("{")
    (tmp_path / "r" / ".tmp-inputs").mkdir()
    with open_run(tmp_path / "r", config) as run:
        assert run.load_config() == config
        assert not list((tmp_path / "r").glob(".tmp-*"))


def test_a_run_that_began_between_the_look_and_the_lock_is_refused(
    tmp_path, settings, config, monkeypatch
):
    lock = tpaw.storage.run_directory.locked

    @contextlib.contextmanager
    def late(path):
        monkeypatch.setattr(tpaw.storage.run_directory, "locked", lock)
        with open_run(tmp_path / "r", changed(settings, seed=3)):
            pass
        with lock(path):
            yield

    monkeypatch.setattr(tpaw.storage.run_directory, "locked", late)
    with refused("seed: 3 → 0"), open_run(tmp_path / "r", config):
        pass


def test_growing_artifacts_are_checked_too(tmp_path):
    run = RunDirectory(tmp_path)
    ShardedArtifact(run.responses(1)).publish("0", lambda path: path.write_text("a") and None)
    store = ShardedArtifact(run.logprobs("f"), always_growing=True)
    store.publish("0", lambda path: path.write_text("b") and None)
    assert set(run.manifests(iterations=2)) == {
        run.responses(1) / "manifest.partial.json",
        run.logprobs("f") / "manifest.json",
    }


def test_a_format_of_the_future_is_refused(tmp_path, config):
    with open_run(tmp_path / "r", config) as run:
        facts = json.loads(run.run_file.read_text())
    run.run_file.write_text(json.dumps(facts | {"format": 99}))
    with refused(99, 1):
        check_output(tmp_path / "r", config)


HOLD = """
import sys
from tpaw.config.schema import RunConfig
from tpaw.storage.run_directory import open_run
with open_run(sys.argv[1], RunConfig.load(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.process
def test_a_second_process_is_refused_with_host_and_pid_until_the_first_ends(tmp_path, config):
    with open_run(tmp_path / "r", config) as run:
        pass
    command = [sys.executable, "-c", HOLD, str(tmp_path / "r"), str(run.config_file)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        held = {
            "pid": holder.pid,
            "host": socket.gethostname(),
            "time": re.compile(r"20\d\d-[^\s;,)]*"),
        }
        parts = (tmp_path / "r", holder.pid, held["host"], "20")
        with refused(*parts, error=RunLockedError, hide=held), open_run(tmp_path / "r", config):
            pass
        holder.kill()
    with open_run(tmp_path / "r", config):  # a killed process holds nothing
        pass


def test_every_path_is_inside_and_relative_to_the_root(tmp_path):
    run = RunDirectory(tmp_path)
    paths = [
        run.responses(1),
        run.checkpoint(2),
        run.training_log(2),
        run.evaluation(0),
        run.logprobs("f"),
        run.inputs,
    ]
    names = [path.relative_to(tmp_path).as_posix() for path in paths]
    assert names == [
        "iterations/1/responses",
        "iterations/2/checkpoint",
        "iterations/2/training.jsonl",
        "iterations/0/evaluation",
        "logprobs/f",
        "inputs",
    ]
