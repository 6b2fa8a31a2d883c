"""A study through the command line: killed, resumed, and the same."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import time

import pytest
import yaml
from builders import Ended
from fork_server import Forked
from messages import says

import tpaw.study.runner
from tpaw.runtime.interrupt import StopSignal
from tpaw.study.config import read_study
from tpaw.study.runner import launch_process, run_study, runs_of, threads_of

STUDY = {
    "recipe": "recipe.yaml",
    "methods": {"tpaw": "tpaw", "spin": ["spin", {"train": {"epochs": 4}}]},
    "seeds": 2,
    "set": {"iterations": 2, "train": {"epochs": 4}},
}


@pytest.fixture
def study(tmp_path, settings):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(STUDY))
    return path


def start(study, output):
    arguments = ("study", study, "-o", output, "--jobs", 4)
    log = study.parent / f"{output.name}-{time.monotonic_ns()}.txt"
    return Forked("study_driver:study", *arguments, out=log)


def finish(process, expected=0):
    assert process.wait(timeout=300) == expected, process.out.read_text()
    return process.out.read_text()


def wait_for(pattern, folder, process):
    while not list(folder.glob(pattern)):
        assert process.poll() is None, process.out.read_text()
        time.sleep(0.005)


def results(folder):
    """What a study has found, without times."""
    found = json.loads((folder / "study.json").read_text())
    for condition in found["conditions"].values():
        for run in condition["runs"].values():
            del run["seconds"]
    return found


def living_runs(folder, server):
    """Process ids of a study's runs that have not ended."""
    command = ["ps", "-o", "pid=", "--ppid", str(server)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    pids = {int(path.read_text()) for path in folder.glob("logs/*.pid")}
    return pids & {int(line) for line in found.stdout.split()}


@pytest.mark.process
def test_killed_and_resumed_a_study_gives_the_same(study, tmp_path, forks):
    whole = start(study, tmp_path / "whole")
    killed = start(study, tmp_path / "killed")
    folder = tmp_path / "killed"

    # Once with its runs, once without them: those live on, and are waited for.
    wait_for("runs/*/*/iterations/1/training.jsonl", folder, killed)
    killed.send_signal(signal.SIGSTOP)  # it starts no other run meanwhile
    runs = living_runs(folder, forks)
    assert runs
    for run in runs:
        os.kill(run, signal.SIGKILL)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    killed = start(study, folder)
    wait_for("runs/*/*/iterations/2/training.jsonl", folder, killed)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    assert living_runs(folder, forks)

    finish(start(study, folder))
    text = finish(whole)
    assert results(folder) == results(tmp_path / "whole")
    for name in ("figures/accuracy-by-iteration.svg", "figures/gap-by-iteration.svg"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    [comparison] = results(folder)["comparisons"]
    says(comparison["caution"], 2, 0.5)
    assert comparison["caution"] in text
    assert len(list((folder / "shared").iterdir())) == 2  # one a seed, for both methods

    # When all is done, a second time costs nothing and changes nothing.
    again = start(study, folder)
    finish(again)
    assert results(folder) == results(tmp_path / "whole")


@pytest.mark.process
def test_a_stop_is_passed_on_and_the_study_goes_on(study, tmp_path, forks):
    STOPPED = 128 + signal.SIGTERM
    settings = yaml.safe_load(study.read_text()) | {"methods": ["tpaw"], "seeds": 1}
    study.write_text(yaml.safe_dump(settings))
    process = start(study, tmp_path / "out")
    wait_for("out/runs/*/*/iterations/1/training.jsonl", tmp_path, process)
    assert living_runs(tmp_path / "out", forks)
    process.send_signal(signal.SIGTERM)
    text = finish(process, expected=STOPPED)
    says(text.splitlines()[-1], f"tpaw study {study} -o {tmp_path / 'out'}")
    assert not living_runs(tmp_path / "out", forks)
    finish(start(study, tmp_path / "out"))


def test_a_run_that_fails_does_not_stop_the_others(study, tmp_path, tpaw_, monkeypatch):
    def launch(*arguments, log, threads):
        code, out, err = tpaw_(*arguments)
        log.write_text(out + err)
        return Ended(code)

    monkeypatch.setattr(tpaw.study.runner, "run_study", functools.partial(run_study, launch=launch))
    settings = yaml.safe_load(study.read_text()) | {
        "methods": {"tpaw": [], "hopeless": {"train": {"learning_rate": 1e6}}},
        "seeds": 1,
        "set": {"iterations": 1, "train": {"epochs": 2}},
    }
    study.write_text(yaml.safe_dump(settings))
    code, text, _ = tpaw_("study", study, "-o", tmp_path / "out")
    assert code == 1
    says(next(line for line in text.splitlines() if "hopeless, seed 0" in line))
    found = json.loads((tmp_path / "out" / "study.json").read_text())
    said = found["failures"]["hopeless, seed 0"]
    says(said, "train.learning_rate", tmp_path / "out", "--restart-iteration 1")
    assert len(found["conditions"]["tpaw"]["runs"]) == 1
    assert found["conditions"]["hopeless"]["runs"] == {}


def test_the_cores_are_divided_unless_the_user_says_how_many_threads(monkeypatch):
    monkeypatch.setattr(tpaw.study.runner, "cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [threads_of(jobs) for jobs in (1, 3, 20)] == [8, 2, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert [threads_of(jobs) for jobs in (1, 3, 20)] == [5, 5, 5]
    for no_number in ("", "0", "4,2", "many"):
        monkeypatch.setenv("OMP_NUM_THREADS", no_number)
        assert threads_of(1) == 8


@pytest.mark.parametrize("trusts", [True, False])
def test_a_study_allows_in_its_runs_the_code_that_its_own_file_allows(study, tmp_path, trusts):
    started = []

    def launch(*arguments, log, threads):
        started.append(arguments)
        log.write_text("")
        return Ended(1)

    tree = yaml.safe_load(study.read_text())
    tree["set"] = {"model": {"trust_remote_code": trusts}}
    study.write_text(yaml.safe_dump(tree))
    config, conditions = read_study(str(study))
    runs = runs_of(conditions, config.seeds, tmp_path / "out")
    run_study(runs, tmp_path / "out", 4, StopSignal(), launch)
    assert {arguments[0] for arguments in started} == {"prepare", "run"}
    assert {arguments[2:] for arguments in started} == {("--trust",) if trusts else ()}


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"iterations_done": null}'])
def test_a_run_whose_summary_is_damaged_is_not_done(study, tmp_path, content):
    config, conditions = read_study(str(study))
    run = runs_of(conditions, config.seeds, tmp_path / "out")[0]
    run.folder.mkdir(parents=True)
    (run.folder / "summary.json").write_text('{"iterations_done": 2}')
    assert run.is_done()
    (run.folder / "summary.json").write_text(content)
    assert not run.is_done()


@pytest.mark.process
def test_a_run_is_a_process_of_the_command_line_with_its_share_of_the_cores(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\nprint(*sys.orig_argv[1:], *map(os.getenv, ['OMP_NUM_THREADS',"
        " 'MKL_NUM_THREADS']), os.getpid() == os.getsid(0), flush=True)"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    log = tmp_path / "log"
    log.write_text("before\n")
    process = launch_process("run", str(tmp_path / "none"), log=log, threads=3)
    assert process.wait() == 2
    before, started, *_, last = log.read_text().splitlines()
    assert before == "before"
    assert started == f"-m tpaw run {tmp_path / 'none'} 3 3 True"
    assert last.startswith("tpaw: ")
    assert process.poll() == 2
