from __future__ import annotations

import shutil

import pytest
from messages import refused, says

from tpaw.config.schema import RunConfig
from tpaw.errors import ArtifactError
from tpaw.report.status import done_and_next
from tpaw.report.summary import _late_means, write_summary
from tpaw.report.tables import suites_of_run
from tpaw.storage.artifacts import read_json, write_manifest
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


def test_a_summary_is_written_only_where_it_differs(settings, tmp_path):
    run, config = RunDirectory(tmp_path), RunConfig.load(settings)
    write_summary(run, config)
    whole, before = read_json(run.summary_file), run.summary_file.stat()
    write_summary(run, config)
    assert run.summary_file.stat().st_ino == before.st_ino
    for damage in ("{}", "{", "\x00"):
        run.summary_file.write_text(damage)
        write_summary(run, config)
        assert read_json(run.summary_file) == whole


def test_every_suite_has_a_table_of_the_checkpoints_that_have_results():
    def found(score):
        part = {"score": score, "stderr": 1.0}
        return {**part, "benchmarks": {"task": part}}

    players = [
        {"iteration": 0, "suites": {"a": found(10.0)}},
        {"iteration": 1},
        {"iteration": 2, "suites": {"a": found(12.0), "b": found(20.0)}},
    ]
    tables = suites_of_run({"players": players})
    rows = [list(zip(*(column.cells for column in table.columns), strict=True)) for table in tables]
    assert rows == [
        [("θ_0", "10.0 ± 1.0", "10.0 ± 1.0"), ("θ_2", "12.0 ± 1.0", "12.0 ± 1.0")],
        [("θ_2", "20.0 ± 1.0", "20.0 ± 1.0")],
    ]
