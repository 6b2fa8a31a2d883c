from __future__ import annotations

import shutil

import pytest
from messages import refused, says

from tpaw.config.schema import RunConfig
from tpaw.errors import ArtifactError
from tpaw.report.status import done_and_next
from tpaw.report.summary import _late_means
from tpaw.storage.artifacts import write_manifest
from tpaw.storage.run_directory import RunDirectory


def test_late_means_are_over_the_last_half_of_the_steps_and_each_step_counts_once():
    steps = [(1, 9.0), (3, 7.0), (6, 2.0), (8, 4.0), (9, 8.0)]
    lines = [{"step": step, "loss": loss, "epoch": 1.0} for step, loss in steps]
    # Of 9 steps, those of the lines at 6, 8 and 9: three of loss 2, two of 4, one of 8.
    assert _late_means(lines) == {"loss": pytest.approx((3 * 2 + 2 * 4 + 8) / 6)}


def test_what_is_next_is_the_first_thing_that_is_not_done(settings, tmp_path):
    run = RunDirectory(tmp_path)
    done, coming = done_and_next(run, RunConfig.load(settings))
    assert done == []
    says(coming, "θ_0", "1/3")
    run.responses(1).mkdir(parents=True)
    write_manifest(run.responses(1), {"rows": 24})
    done, then = done_and_next(run, RunConfig.load(settings))
    assert done == [coming]
    says(then, "θ_1", "1/3")


@pytest.mark.parametrize("content", ["{}", "[]", "{", "", '{"files": 1}'])
@pytest.mark.parametrize(
    "name",
    [
        "run.json",
        "inputs/manifest.json",
        "iterations/1/responses/manifest.json",
        "iterations/2/checkpoint/manifest.json",
        "iterations/0/evaluation/manifest.json",
        "iterations/3/evaluation/results.json",
        "logprobs/*/manifest.json",
    ],
)
def test_status_names_the_file_that_is_damaged(finished, tpaw_, tmp_path, name, content):
    run, _ = finished
    copy = shutil.copytree(run.root, tmp_path / "run")
    path = next(copy.glob(name))
    path.write_text(content)
    code, _, err = tpaw_("status", copy)
    assert code == 1
    assert str(path) in err
    assert len(err.splitlines()) == 1


def test_status_of_a_partial_manifest_that_is_damaged(settings, tmp_path):
    run = RunDirectory(tmp_path)
    run.responses(1).mkdir(parents=True)
    partial = run.responses(1) / "manifest.partial.json"
    partial.write_text('{"files": [{"path": "a", "bytes": 1, "sha256": "x"}]}')
    with refused(partial, "'rows'", error=ArtifactError):
        done_and_next(run, RunConfig.load(settings))
