from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import socket
import subprocess
import sys

import pytest
from messages import refused, says

import tpaw.storage.artifacts
import tpaw.storage.run_directory
from tpaw.config.schema import RunConfig
from tpaw.errors import ArtifactError, InputError, Interrupted, RunLockedError, StorageError
from tpaw.runtime.interrupt import StopSignal
from tpaw.runtime.watch import Watch
from tpaw.storage.artifacts import ShardedArtifact, write_manifest
from tpaw.storage.run_directory import (
    RunDirectory,
    check_output,
    open_run,
    restart_iteration,
    verify_run,
)
from tpaw.storage.seals import seal_facts


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
    with pytest.raises(InputError), open_run(tmp_path / "home", config):
        pass
    assert os.listdir(tmp_path / "home") == ["thesis.tex"]  # not even a lock
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
    suite = ShardedArtifact(run.suite(2, "mine"))
    suite.publish("0", lambda path: path.write_text("c") and None)
    for step in (1, 2):
        (run.training(1) / f"checkpoint-{step}").mkdir(parents=True)
    write_manifest(run.training(1) / "checkpoint-1", {})  # a crash left the other one
    assert set(run.manifests(iterations=2)) == {
        run.responses(1) / "manifest.partial.json",
        run.logprobs("f") / "manifest.json",
        run.suite(2, "mine") / "manifest.partial.json",
        run.training(1) / "checkpoint-1" / "manifest.json",
    }
    run.checkpoint(1).mkdir(parents=True)
    (run.checkpoint(1) / "model.safetensors").touch()
    with refused(run.checkpoint(1), error=ArtifactError):
        run.manifests(iterations=2)


def test_a_log_without_steps_is_damaged(tmp_path):
    run = RunDirectory(tmp_path)
    run.checkpoint(1).mkdir(parents=True)
    write_manifest(run.checkpoint(1), {})  # as the first format: without a checksum of the log
    for content in ("", "{}\n", '{"step": 1}\n'):
        run.training_log(1).write_text(content)
        if "step" in content:
            assert run.read_training_log(1) == [{"step": 1}]
        else:
            with refused("iterations/1/training.jsonl", "θ_1", error=ArtifactError):
                run.read_training_log(1)


def test_only_numbered_folders_are_iterations(tmp_path):
    run = RunDirectory(tmp_path)
    assert not run.uses_initial_player()
    for name in ("1", "2", "10", "notes"):
        (tmp_path / "iterations" / name).mkdir(parents=True)
    for name in ("2", "notes"):
        (tmp_path / "iterations" / name / "training.jsonl").touch()
    assert run.iterations_begun() == 2
    assert run.uses_initial_player()


@pytest.mark.parametrize("made", ["iterations/0/evaluation", "iterations/1/responses", "logprobs"])
def test_a_run_uses_its_initial_player_from_the_first_artifact_on(tmp_path, made):
    (tmp_path / made).mkdir(parents=True)
    assert RunDirectory(tmp_path).uses_initial_player()


def test_a_format_of_the_future_is_refused(tmp_path, config):
    with open_run(tmp_path / "r", config) as run:
        facts = json.loads(run.run_file.read_text())
    run.run_file.write_text(json.dumps(seal_facts(facts | {"format": 99})))
    with refused(99, 1, 2):
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


@pytest.fixture
def run(tmp_path, config):
    with open_run(tmp_path / "r", config) as run:
        pass
    return run


def edits(text):
    """Single digits changed, and every cut at the border of a line."""
    yield text.replace("eta: 6.0", "eta: 1.0")
    yield text.replace("seed: 0", "seed: 1")
    lines = text.splitlines(keepends=True)
    yield from ("".join(lines[:count]) for count in range(len(lines)))
    yield text.replace("\n", "\n\0", 1)


def test_a_configuration_that_was_edited_or_cut_is_refused(run, config):
    text = run.config_file.read_text()
    assert "eta: 6.0" in text
    for edited in edits(text):
        assert edited != text
        run.config_file.write_text(edited)
        for use in (run.load_config, lambda: check_output(run.root, config)):
            with pytest.raises(ArtifactError) as caught:
                use()
            assert str(run.config_file) in str(caught.value)
            assert "--set" in str(caught.value)
    with refused(run.config_file, "--set", error=ArtifactError), open_run(run.root, config):
        pass
    run.config_file.write_text(text)
    assert run.load_config() == config


@pytest.mark.parametrize("change", [{"versions": {}}, {"began": "x"}, {"format": 1}])
def test_an_edited_run_file_is_refused(run, config, change):
    facts = json.loads(run.run_file.read_text())
    run.run_file.write_text(json.dumps(facts | change))
    with refused(run.run_file, error=ArtifactError):
        check_output(run.root, config)


def test_a_run_file_without_its_checksum_is_refused(run, config):
    facts = json.loads(run.run_file.read_text())
    del facts["sha256"]
    run.run_file.write_text(json.dumps(facts))
    with refused(run.run_file, "checksum", error=ArtifactError):
        check_output(run.root, config)


@pytest.mark.parametrize("content", ["{}", "[]", "{", "", "7"])
def test_a_damaged_run_file_is_named(run, config, content):
    run.run_file.write_text(content)
    with refused(run.run_file, error=ArtifactError, hide={"reason": re.compile("Expecting.*")}):
        check_output(run.root, config)


def with_versions(monkeypatch, **versions):
    original = tpaw.storage.run_directory.version
    monkeypatch.setattr(
        tpaw.storage.run_directory, "version", lambda name: versions.get(name) or original(name)
    )


def test_versions_are_recorded_and_said_whenever_they_changed(
    tmp_path, config, monkeypatch, capsys
):
    def session(**versions):
        with monkeypatch.context() as patch:
            with_versions(patch, **versions)
            with open_run(tmp_path / "r", config) as run:
                said = " ".join(capsys.readouterr().err.split())
                return run.facts(), said

    old = {"torch": "1.0", "tpaw": "0.0.1"}
    facts, said = session(**old)
    assert facts["versions"]["torch"] == "1.0"
    assert said == ""
    facts, said = session(torch="2.0", tpaw="0.0.1")
    says(said, "torch 1.0 → 2.0")
    assert "tpaw" not in said.replace("tpaw run", "")
    assert facts["versions"]["torch"] == "1.0"  # of the beginning
    assert [s["versions"]["torch"] for s in facts["resumed"]] == ["2.0"]
    before = (tmp_path / "r" / "run.json").stat().st_mtime_ns
    facts, said = session(torch="2.0", tpaw="0.0.1")
    assert said == ""
    assert len(facts["resumed"]) == 1
    assert (tmp_path / "r" / "run.json").stat().st_mtime_ns == before
    facts, said = session(**old)
    assert "torch 2.0 → 1.0" in said
    assert len(facts["resumed"]) == 2


def test_a_run_of_the_first_format_is_taken_over_with_one_line(run, config, capsys):
    text = run.config_file.read_text()
    run.config_file.write_text("".join(text.splitlines(keepends=True)[:-1]))
    facts = json.loads(run.run_file.read_text())
    del facts["sha256"]
    run.run_file.write_text(json.dumps(facts | {"format": 1}))
    run.initial_player_file.parent.mkdir()
    player = {"index": 0, "path": "m", "revision": None, "fingerprint": "f"}
    run.initial_player_file.write_text(json.dumps(player))
    assert run.load_config() == config
    with open_run(run.root, config):
        pass
    says(capsys.readouterr().err, run.root, "checksums")
    assert run.facts()["format"] == 2
    assert run.config_file.read_text() == text
    assert json.loads(run.initial_player_file.read_text()) == seal_facts(player)
    with open_run(run.root, config):
        pass
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "name",
    [
        "config.yaml",
        "iterations",
        "iterations/1",
        "iterations/1/training",
        "iterations/1/training.jsonl",
        "iterations/1/training/checkpoint-1",
        "inputs",
        "logprobs/f",
        "players/0.json",
        "summary.json",
    ],
)
def test_links_in_a_run_are_not_followed(run, config, name, tmp_path):
    outside = tmp_path / "precious"
    (outside / "checkpoint-1").mkdir(parents=True)
    (outside / "thesis.tex").write_text("x")
    place = run.root / name
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    place.symlink_to(outside / "thesis.tex" if place.suffix else outside)
    before = sorted(outside.rglob("*"))
    with refused(place), open_run(run.root, config):
        pass
    with refused(place):
        restart_iteration(run.root, 1)
    assert sorted(outside.rglob("*")) == before


def test_links_elsewhere_in_a_run_and_to_it_are_fine(run, config, tmp_path):
    (run.root / "notes").symlink_to(tmp_path)
    (tmp_path / "r2").symlink_to(run.root)
    (run.root / "mine").mkdir()
    (run.root / "mine" / ".tmp-draft").touch()
    with open_run(tmp_path / "r2", config):
        pass
    assert (run.root / "mine" / ".tmp-draft").exists()  # nothing of ours


def test_a_signal_is_heard_while_published_files_are_checked(run, monkeypatch):
    monkeypatch.setattr(tpaw.storage.artifacts, "BYTES_READ_AT_ONCE", 10)
    ShardedArtifact(run.responses(1)).publish("0", lambda path: path.write_text("a" * 99) and None)
    stop = StopSignal()
    seen = []
    original = tpaw.storage.run_directory.verify

    def verify(manifest, on_bytes):
        def heard(count):
            seen.append(count)
            stop.signal_number = 15
            on_bytes(count)

        original(manifest, heard)

    monkeypatch.setattr(tpaw.storage.run_directory, "verify", verify)
    with pytest.raises(Interrupted):
        verify_run(run, 1, Watch(stop))
    assert seen == [10]


def test_a_failure_of_the_disk_says_what_is_kept_and_how_to_resume(run, config):
    with refused(run.root, "/x/y", error=StorageError) as caught, open_run(run.root, config):
        raise OSError(errno.EROFS, "Read-only file system", "/x/y")
    assert caught.value.exit_code == 4
    with pytest.raises(ValueError, match="ours"), open_run(run.root, config):
        raise ValueError("a bug of ours")
