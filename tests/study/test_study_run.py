"""A study on the starter through the command line: killed, resumed, and the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

CODE = "from tpaw.cli.main import main; main()"
STUDY = {
    "recipe": "starter",
    "methods": ["tpaw", "spin"],
    "seeds": 2,
    "set": {
        "iterations": 2,
        "data": {"limit": 128},
        "evaluate": {"data": {"limit": 60}},
        "train": {"learning_rate": 1e-4, "epochs": 1, "batch_size": 16, "log_every": 2},
    },
}


@pytest.fixture
def study(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(STUDY))
    return path


def start(study, output):
    # Four at a time: on machines of few cores each has one thread, as so small a model likes best.
    return subprocess.Popen(
        [sys.executable, "-c", CODE, "study", str(study), "-o", str(output), "--jobs", "4"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process, expected=0):
    text, _ = process.communicate(timeout=900)
    assert process.returncode == expected, text
    return text


def wait_for(pattern, folder, process):
    while not list(folder.glob(pattern)):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


def results(folder):
    """What a study has found, without times."""
    found = json.loads((folder / "study.json").read_text())
    for condition in found["conditions"].values():
        for run in condition["runs"].values():
            del run["seconds"]
    return found


def children(pid):
    found = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False
    )
    return [int(line) for line in found.stdout.split()]


def test_killed_and_resumed_a_study_gives_the_same(study, tmp_path):
    whole = start(study, tmp_path / "whole")
    killed = start(study, tmp_path / "killed")
    folder = tmp_path / "killed"

    # Once with its runs, once without them: those live on, and are waited for.
    wait_for("runs/*/*/iterations/1/training.jsonl", folder, killed)
    for child in children(killed.pid):
        os.kill(child, signal.SIGKILL)
    killed.kill()
    killed.wait()
    killed = start(study, folder)
    wait_for("runs/*/*/iterations/2/training.jsonl", folder, killed)
    killed.kill()
    killed.wait()

    finish(start(study, folder))
    text = finish(whole)
    assert results(folder) == results(tmp_path / "whole")
    for name in ("figures/accuracy-by-iteration.svg", "figures/gap-by-iteration.svg"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert "2 seeds: no exact paired test can go below p = 0.5" in text
    assert len(list((folder / "shared").iterdir())) == 2  # one a seed, for both methods

    # Another process is refused; when all is done, a second time costs nothing and changes nothing.
    again = start(study, folder)
    finish(again)
    assert results(folder) == results(tmp_path / "whole")


def test_a_stop_is_passed_on_and_the_study_goes_on(study, tmp_path):
    STOPPED = 128 + signal.SIGTERM
    settings = yaml.safe_load(study.read_text()) | {"methods": ["tpaw"], "seeds": 1}
    study.write_text(yaml.safe_dump(settings))
    process = start(study, tmp_path / "out")
    wait_for("out/runs/*/*/iterations/1/training.jsonl", tmp_path, process)
    process.send_signal(signal.SIGTERM)
    text = finish(process, expected=STOPPED)
    assert "go on with: tpaw study" in text
    assert not children(process.pid)
    finish(start(study, tmp_path / "out"))


def test_a_run_that_fails_does_not_stop_the_others(study, tmp_path):
    settings = yaml.safe_load(study.read_text()) | {
        "methods": {"tpaw": [], "hopeless": {"train": {"learning_rate": 1e30}}},
        "seeds": 1,
    }
    study.write_text(yaml.safe_dump(settings))
    text = finish(start(study, tmp_path / "out"), expected=1)
    assert "failed and left out: hopeless, seed 0" in text
    found = json.loads((tmp_path / "out" / "study.json").read_text())
    assert "no number" in found["failures"]["hopeless, seed 0"]
    assert len(found["conditions"]["tpaw"]["runs"]) == 1
    assert found["conditions"]["hopeless"]["runs"] == {}
