from __future__ import annotations


import pytest
from messages import says

from tpaw.config.schema import RunConfig
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
