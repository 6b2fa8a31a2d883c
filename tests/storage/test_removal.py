"""Weights go by one rename of the manifest; a crash at any operation leaves nothing undecided."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from messages import refused

from tpaw.errors import ArtifactError
from tpaw.storage.artifacts import (
    MANIFEST,
    is_published,
    publishing,
    read_manifest,
    remove_temporaries,
    verify,
    write_sealed,
)
from tpaw.storage.removal import finish_removal, remove_weights, removed_by

WEIGHTS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = "model.safetensors.index.json"


def checkpoint(folder):
    with publishing(folder, {"fingerprint": "f", "seconds": 1.5}) as temporary:
        for name in (*WEIGHTS, INDEX, "config.json", "tokenizer.json"):
            (temporary / name).write_text(name)
    return folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_manifest_stays_as_a_record(tmp_path):
    folder = checkpoint(tmp_path / "c")
    whole = read_manifest(folder)
    assert removed_by(folder) is None
    remove_weights(folder, "keep: last")
    assert names(folder) == ["config.json", MANIFEST, "tokenizer.json"]
    assert is_published(folder)
    verify(folder / MANIFEST)
    found = read_manifest(folder)
    assert (found["fingerprint"], found["seconds"]) == ("f", 1.5)
    assert removed_by(folder) == found["removed"]["by"] == "keep: last"
    assert [*found["files"], *found["removed"]["files"]] == sorted(
        whole["files"], key=lambda entry: "safetensors" in entry["path"]
    )
    before = (folder / MANIFEST).read_bytes()
    remove_weights(folder, "keep: team")  # once is enough
    assert (folder / MANIFEST).read_bytes() == before


def test_a_lost_weight_is_damage_and_no_removal(tmp_path):
    folder = checkpoint(tmp_path / "c")
    (folder / WEIGHTS[1]).unlink()
    with refused(WEIGHTS[1], error=ArtifactError):
        verify(folder / MANIFEST)
    folder = checkpoint(tmp_path / "d")
    remove_weights(folder, "keep: last")
    (folder / "config.json").unlink()
    with refused("config.json", error=ArtifactError):
        verify(folder / MANIFEST)


def test_a_crash_at_any_operation_leaves_all_or_nothing(tmp_path, monkeypatch):
    class Crash(BaseException):
        pass

    outcomes = []
    for count in range(1, 100):
        folder = checkpoint(tmp_path / str(count))
        left = count

        def counting(original):
            def operation(*args, **kwargs):
                nonlocal left
                left -= 1
                if left <= 0:  # a dead process does nothing more
                    raise Crash
                return original(*args, **kwargs)

            return operation

        with monkeypatch.context() as patch:
            for name in ("replace", "unlink", "fsync"):
                patch.setattr(os, name, counting(getattr(os, name)))
            try:
                remove_weights(folder, "keep: last")
            except Crash:
                pass
            else:
                break
        # What the next session does.
        remove_temporaries(folder)
        verify(folder / MANIFEST)
        outcomes.append((removed_by(folder), set(WEIGHTS) & set(names(folder))))
        finish_removal(folder)
        assert names(folder) == (
            sorted([*WEIGHTS, INDEX, "config.json", MANIFEST, "tokenizer.json"])
            if removed_by(folder) is None
            else ["config.json", MANIFEST, "tokenizer.json"]
        )
        remove_weights(folder, "keep: last")
        assert names(folder) == ["config.json", MANIFEST, "tokenizer.json"]
    # Before the rename; then with both files of weights, with one and with none.
    kinds = list(dict.fromkeys((by, len(left)) for by, left in outcomes))
    assert kinds == [(None, 2), ("keep: last", 2), ("keep: last", 1), ("keep: last", 0)]


def test_no_manifest_removes_a_file_elsewhere(tmp_path):
    folder = checkpoint(tmp_path / "c")
    other = tmp_path / "other.safetensors"
    other.write_text("mine")
    facts = dict(read_manifest(folder))
    for path in ("../other.safetensors", str(other), ".", ".."):
        write_sealed(folder / MANIFEST, facts | {"removed": {"by": "x", "files": [{"path": path}]}})
        finish_removal(folder)
    assert other.exists()
    for removed in ("x", {"files": [1]}, {"by": "x"}, None):
        write_sealed(folder / MANIFEST, facts | {"removed": removed})
        with refused(MANIFEST, error=ArtifactError):
            finish_removal(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"removed": 1}', '{"removed": {}}', "7"])
def test_a_manifest_of_somebody_else_removes_nothing(tmp_path: Path, text):
    (tmp_path / MANIFEST).write_text(text)
    assert removed_by(tmp_path) is None
    assert removed_by(tmp_path / "nowhere") is None
