from __future__ import annotations

import errno
import json
import math
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from messages import refused

import tpaw.storage.artifacts
from tpaw.errors import ArtifactError, RunLockedError, StorageError
from tpaw.storage.artifacts import (
    MANIFEST,
    PARTIAL_MANIFEST,
    ShardedArtifact,
    deliver,
    is_published,
    own_folder,
    publishing,
    read_files,
    read_json,
    read_manifest,
    remove_artifacts,
    remove_temporaries,
    verify,
    write_file,
    write_json,
)


def publish(folder):
    with publishing(folder, {"rows": 3}) as temporary:
        (temporary / "a.txt").write_text("one")
        (temporary / "sub").mkdir()
        (temporary / "sub" / "b.bin").write_bytes(bytes(100))
    return folder


def test_a_published_folder_lists_its_files_and_can_be_moved(tmp_path):
    folder = publish(tmp_path / "x")
    manifest = read_manifest(folder)
    assert manifest["rows"] == 3
    assert [(e["path"], e["bytes"]) for e in manifest["files"]] == [
        ("a.txt", 3),
        ("sub/b.bin", 100),
    ]
    # sha256 of "one", from coreutils' sha256sum.
    assert (
        manifest["files"][0]["sha256"]
        == "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"
    )
    folder.rename(tmp_path / "y")
    verify(tmp_path / "y" / MANIFEST)


def test_nothing_appears_before_all_is_written(tmp_path):
    def fail_half_way():
        with publishing(tmp_path / "x", {}) as temporary:
            (temporary / "a.txt").write_text("half")
            assert not (tmp_path / "x").exists()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert not is_published(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
    publish(tmp_path / "x")


def test_a_folder_appears_with_its_manifest_or_not_at_all(tmp_path, monkeypatch):
    def die(path, value):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tpaw.storage.artifacts, "write_json", die)
        with pytest.raises(KeyboardInterrupt):
            publish(tmp_path / "x")
    assert not any(tmp_path.iterdir())
    # What a killed process left behind is no part of the next one.
    (tmp_path / ".tmp-x").mkdir()
    (tmp_path / ".tmp-x" / "c.txt").write_text("left behind")
    publish(tmp_path / "x")
    assert {e["path"] for e in read_manifest(tmp_path / "x")["files"]} == {"a.txt", "sub/b.bin"}


def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def half(temporary):
        temporary.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_file(path, half)
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "two"),
        ("a.txt", "on"),
        ("sub/b.bin", None),
        (MANIFEST, "{"),
        (MANIFEST, "{}"),
        (MANIFEST, '{"files": [{"path": 1}]}'),
        (MANIFEST, '{"files": [{"path": 1, "bytes": 3, "sha256": "a"}]}'),
    ],
)
def test_damage_is_named(tmp_path, name, content):
    folder = publish(tmp_path / "x")
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with refused(folder / name, error=ArtifactError, hide={"reason": re.compile("Expecting.*")}):
        verify(folder / MANIFEST)


def test_json_is_whole_or_absent_and_never_holds_nan(tmp_path):
    write_json(tmp_path / "a.json", {"θ": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"x": math.nan})
    assert read_json(tmp_path / "a.json") == {"θ": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def write(text):
    return lambda path: path.write_text(text) and None


def test_shards_count_from_the_moment_they_are_listed(tmp_path):
    folder = tmp_path / "s"
    shards = ShardedArtifact(folder)
    shards.publish("0.txt", write("a"), rows=1)
    shards.publish("1.txt", write("b"), rows=2)
    (folder / "2.txt").write_text("written, and then the power went")
    again = ShardedArtifact(folder)
    assert again.names == {"0.txt", "1.txt"}
    assert not again.is_complete
    assert not is_published(folder)
    verify(folder / PARTIAL_MANIFEST)
    again.publish("2.txt", write("c"), rows=3)
    again.complete({"total": 6})
    assert is_published(folder)
    assert not (folder / PARTIAL_MANIFEST).exists()
    done = ShardedArtifact(folder)
    assert done.is_complete
    assert [e["rows"] for e in done.entries] == [1, 2, 3]
    assert json.loads((folder / MANIFEST).read_text())["total"] == 6
    verify(folder / MANIFEST)


def test_a_growing_store_exists_from_its_first_file_on(tmp_path):
    ShardedArtifact(tmp_path / "s", always_growing=True).publish("0.txt", write("a"))
    assert is_published(tmp_path / "s")
    ShardedArtifact(tmp_path / "s", always_growing=True).publish("1.txt", write("b"))
    assert ShardedArtifact(tmp_path / "s", always_growing=True).names == {"0.txt", "1.txt"}
    verify(tmp_path / "s" / MANIFEST)


@pytest.mark.parametrize("path", ["../../../etc/passwd", "/etc/passwd", "a/../../b", "", "."])
def test_a_manifest_that_names_a_file_outside_of_its_folder_is_refused(tmp_path, path):
    folder = publish(tmp_path / "x")
    entry = {"path": path, "bytes": 0, "sha256": "0"}
    (folder / MANIFEST).write_text(json.dumps({"files": [entry]}))
    for read in (verify, read_files):
        with refused(folder / MANIFEST, error=ArtifactError):
            read(folder / MANIFEST)
    with refused(folder / MANIFEST, error=ArtifactError):
        ShardedArtifact(folder)


@pytest.mark.parametrize("manifest", ["manifest.json", "manifest.partial.json"])
def test_a_manifest_whose_values_were_changed_is_named(tmp_path, manifest):
    shards = ShardedArtifact(tmp_path / "a")
    shards.publish("0.txt", lambda path: path.write_text("x"), rows=12)
    if manifest == "manifest.json":
        shards.complete({"seconds": 3.5})
    path = tmp_path / "a" / manifest
    content = json.loads(path.read_text())
    assert ShardedArtifact(tmp_path / "a").entries[0]["rows"] == 12
    content["files"][0]["rows"] = {"12": 13}
    path.write_text(json.dumps(content))
    with refused(path, error=ArtifactError):
        ShardedArtifact(tmp_path / "a")


def test_a_kill_while_artifacts_are_removed_leaves_no_manifest_of_lost_files(tmp_path, monkeypatch):
    steps = tmp_path / "training"
    folders = [publish(steps / "checkpoint-1"), publish(steps / "checkpoint-2")]

    def killed(folder, **kwargs):
        next(path for path in folders[0].iterdir() if path.is_file()).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tpaw.storage.artifacts.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_artifacts(steps)
    assert list(folders[1].iterdir())
    assert not any(is_published(folder) for folder in folders)
    remove_artifacts(steps)
    assert not steps.exists()
    remove_artifacts(steps)  # nothing there


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("number", [1, 2])
def test_a_kill_while_a_sharded_artifact_is_completed_leaves_the_old_or_the_new_manifest(
    tmp_path, monkeypatch, number, when
):
    shards = ShardedArtifact(tmp_path / "a")
    shards.publish("0.txt", lambda path: path.write_text("x"))
    replace, renames = os.replace, []

    def killed(source, target):
        renames.append(target)
        if len(renames) < number or when == "after":
            replace(source, target)
        if len(renames) == number:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            shards.complete({"total": 6})
    again = ShardedArtifact(tmp_path / "a")
    assert again.names == {"0.txt"}
    assert again.is_complete == is_published(tmp_path / "a") == ((number, when) == (2, "after"))
    if not again.is_complete:
        again.complete({"total": 6})
    assert read_manifest(tmp_path / "a")["total"] == 6


def test_a_value_that_a_manifest_lacks_is_named(tmp_path):
    manifest = read_manifest(publish(tmp_path / "x"))
    with refused(tmp_path / "x" / MANIFEST, "'seconds'", error=ArtifactError):
        manifest["seconds"]
    with refused(tmp_path / "x" / MANIFEST, "'seconds'", error=ArtifactError):
        manifest["files"][0]["seconds"]


def test_checking_a_large_file_can_be_stopped_within_it(tmp_path, monkeypatch):
    monkeypatch.setattr(tpaw.storage.artifacts, "BYTES_READ_AT_ONCE", 10)
    folder = publish(tmp_path / "x")
    read = []

    def on_bytes(count):
        read.append(count)
        if sum(read) > 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify(folder / MANIFEST, on_bytes)
    assert read == [3, 10, 10, 10]
    read.clear()
    monkeypatch.undo()
    verify(folder / MANIFEST, read.append)
    assert sum(read) == 103


def test_many_may_write_the_same_file_at_once(tmp_path):
    path, meeting = tmp_path / "reply.json", threading.Barrier(8)

    def write_one(number):
        meeting.wait()
        for _ in range(20):
            write_json(path, {"from": number})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write_one, range(8)))
    assert read_json(path)["from"] in range(8)
    assert list(tmp_path.iterdir()) == [path]


def test_the_second_of_two_publications_is_told(tmp_path):
    with refused(tmp_path / "x", error=RunLockedError), publishing(tmp_path / "x", {}):
        publish(tmp_path / "x")
    verify(tmp_path / "x" / MANIFEST)
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


def test_a_file_that_cannot_be_written_leaves_nothing_on_the_disk(tmp_path, monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space"):
        write_json(tmp_path / "a.json", {})
    with pytest.raises(OSError, match="No space"):
        publish(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_that_cannot_flush_is_named(tmp_path, monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fsync)
    hide = {"name": re.compile(r"\.tmp-\S+(?=:)")}
    with refused(tmp_path, "Invalid argument", error=StorageError, hide=hide):
        write_json(tmp_path / "a.json", {})


def test_a_name_of_any_length_can_be_written(tmp_path):
    for name in ("n" * 255, "ß" * 127):
        write_json(tmp_path / name, {})


def test_temporaries_that_are_links_are_not_followed(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").touch()
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / ".tmp-z").symlink_to(tmp_path / "precious")
    (tmp_path / "x" / ".tmp-y").mkdir()
    remove_temporaries(tmp_path / "x")
    assert (tmp_path / "precious" / "thesis.tex").exists()
    assert not (tmp_path / "x" / ".tmp-y").exists()


def test_an_output_folder_with_links_is_refused(tmp_path):
    own_folder(tmp_path / "o", {"a": 1})
    (tmp_path / "o" / "outputs.json").symlink_to(tmp_path / "elsewhere")
    with refused(tmp_path / "o" / "outputs.json"):
        own_folder(tmp_path / "o", {"a": 1})


def shard_of(folder):
    artifact = ShardedArtifact(folder)
    artifact.begin({"size": 4})
    return artifact


def test_what_was_delivered_before_a_crash_is_published(tmp_path):
    folder = tmp_path / "s"
    shard_of(folder)
    deliver(folder, "1.txt", write("b"), rows=2)
    deliver(folder, "0.txt", write("a"), rows=1)
    assert ShardedArtifact(folder).names == set()
    again = shard_of(folder)
    assert again.names == {"0.txt", "1.txt"}
    again.complete({})
    assert [entry["rows"] for entry in ShardedArtifact(folder).entries] == [1, 2]
    verify(folder / MANIFEST)
    assert sorted(p.name for p in folder.iterdir()) == ["0.txt", "1.txt", MANIFEST]


def test_the_first_delivery_of_a_file_counts_and_later_ones_are_removed(tmp_path):
    folder = tmp_path / "s"
    artifact = shard_of(folder)
    first, second = (deliver(folder, "0.txt", write(text)) for text in "ab")
    artifact.receive(second)
    artifact.receive(first)
    assert (folder / "0.txt").read_text() == "b"
    assert len(artifact.entries) == 1
    assert not list(folder.glob("delivered-*"))
    verify(folder / PARTIAL_MANIFEST)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("number", [1, 2])
def test_a_kill_while_a_delivery_is_published_loses_nothing(tmp_path, monkeypatch, number, when):
    folder = tmp_path / "s"
    artifact = shard_of(folder)
    record = deliver(folder, "0.txt", write("a"), rows=3)
    replace, renames = os.replace, []

    def killed(source, target):
        renames.append(target)
        if len(renames) < number or when == "after":
            replace(source, target)
        if len(renames) == number:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            artifact.receive(record)
    again = shard_of(folder)
    assert [(entry["path"], entry["rows"]) for entry in again.entries] == [("0.txt", 3)]
    verify(folder / PARTIAL_MANIFEST)
    assert not list(folder.glob("delivered-*"))


def test_a_delivery_that_is_not_whole_or_not_its_own_is_removed(tmp_path):
    folder = tmp_path / "s"
    artifact = shard_of(folder)
    (folder / "delivered-0123-0.txt").write_text("a file without a record")
    record = deliver(folder, "1.txt", write("b"))
    record.with_suffix("").unlink()  # a record without a file
    elsewhere = deliver(folder, "2.txt", write("c"))
    facts = json.loads(elsewhere.read_text())
    facts.pop("sha256")
    facts["entry"]["path"] = "../../2.txt"
    elsewhere.write_text(json.dumps(facts))
    (folder / "delivered-4567-3.txt.json").symlink_to(tmp_path / "somewhere")
    again = shard_of(folder)
    assert again.names == set()
    assert [p.name for p in folder.iterdir()] == [PARTIAL_MANIFEST]
    assert not (tmp_path.parent / "2.txt").exists()
    assert artifact.folder == folder


def test_the_first_beginning_decides_what_the_manifest_says(tmp_path):
    shard_of(tmp_path / "s")
    assert ShardedArtifact(tmp_path / "s").begin({"size": 9})["size"] == 4
