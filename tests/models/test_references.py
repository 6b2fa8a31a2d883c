"""References to checkpoints: a run, one of its iterations, a model."""

from __future__ import annotations

import shutil

from messages import IN_BRACKETS, refused

from tpaw.models.fingerprint import fingerprint
from tpaw.models.references import find_checkpoint, find_checkpoints
from tpaw.storage.artifacts import MANIFEST, read_manifest


def test_a_run_stands_for_its_newest_checkpoint(finished):
    run, _ = finished
    newest = find_checkpoint(str(run.root))
    assert newest.player.index == 4
    assert newest.name == "run@4"
    assert newest.player.path == str(run.checkpoint(4))
    assert newest.player.fingerprint == read_manifest(run.checkpoint(4))["fingerprint"]
    assert find_checkpoint(f"{run.root}@4").player == newest.player


def test_iteration_0_is_the_sft_model(finished, model_folder):
    run, _ = finished
    start = find_checkpoint(f"{run.root}@0")
    alone = find_checkpoint(str(model_folder))
    assert start.player == alone.player
    assert alone.player.fingerprint == fingerprint(model_folder)
    assert alone.run is None
    assert start.run is not None


def test_all_of_a_run_that_are_whole(finished, tmp_path):
    run, _ = finished
    copy = shutil.copytree(run.root, tmp_path / "copy@1")  # a name like a reference
    (copy / "iterations" / "3" / "checkpoint" / MANIFEST).unlink()
    assert [c.player.index for c in find_checkpoints(str(copy))] == [0, 1, 2, 4]
    with refused("copy@1@3", "@0, @1, @2, @4"):
        find_checkpoint(f"{copy}@3")


def test_what_is_neither_is_refused(tmp_path):
    with refused(tmp_path):
        find_checkpoint(str(tmp_path))
    with refused("nobody/nothing", hide=IN_BRACKETS):
        find_checkpoint("nobody/nothing")
