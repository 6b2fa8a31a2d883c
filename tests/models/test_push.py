"""`tpaw push`: what the Hub gets, and what is refused before it gets anything."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading

import pytest
import torch
from hub_server import TOKEN, HubServer, Repository
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from tpaw.storage.run_directory import RunDirectory


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def digest(folder):
    return {name: hashlib.sha256(data).hexdigest() for name, data in contents(folder).items()}


def arrived(hub, repository, folder):
    """The files of a repository as a folder."""
    folder.mkdir()
    for name, data in hub.repositories[repository].files.items():
        (folder / name).write_bytes(data)
    return folder


def leftovers(folder):
    return sorted(folder.glob("tpaw-push-*"))


def start_push(hub, tmp_path, *arguments):
    """The command in a process of its own, as a person starts it."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        "TMPDIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "tpaw", "push", *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.process
def test_what_arrives_is_what_export_writes_and_works(tpaw_, finished, tmp_path):
    run, _ = finished
    before, hub = digest(run.root), HubServer()
    process = start_push(hub, tmp_path, f"{run.root}@3", "me/mine", "--private")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert re.search(rf"Sent: {hub.url}/me/mine/commit/[0-9a-f]{{40}}", out)
    repository = hub.repositories["me/mine"]
    assert repository.private
    assert [commit["summary"] for commit in repository.commits] == ["run@3 in bf16"]
    assert digest(run.root) == before
    assert not leftovers(tmp_path)
    assert tpaw_("export", f"{run.root}@3", "--dtype", "bf16", "-o", tmp_path / "exported")[0] == 0
    expected = contents(tmp_path / "exported")
    sent = {name: data for name, data in repository.files.items() if name != ".gitattributes"}
    assert sent.keys() == expected.keys()
    # Transformers notes in it whether the process was offline.
    settings = [json.loads(files.pop("tokenizer_config.json")) for files in (sent, expected)]
    assert settings[0] | {"local_files_only": None} == settings[1] | {"local_files_only": None}
    assert {name for name in sent if sent[name] != expected[name]} == {"README.md"}
    # No folder of this machine, not even in the configurations.
    sent["tokenizer_config.json"] = json.dumps(settings[0]).encode()
    text = [data for name, data in sent.items() if not name.endswith(".safetensors")]
    assert not any(str(tmp_path.parent).encode() in data for data in text)
    folder = arrived(hub, "me/mine", tmp_path / "arrived")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(folder).chat_template
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "transformers"
    assert "tpaw" in card.data.tags
    assert 'path = "me/mine"' in card.text
    hub.close()


def test_an_adapter_is_sent_as_an_ordinary_model(tpaw_, hub, adapted, tmp_path):
    code, _, err = tpaw_("push", adapted.root, "me/mine")
    assert code == 2
    for part in ("adapted@1", "base", "not on the Hub", "--merge"):
        assert part in err
    assert hub.requests == []
    code, _, err = tpaw_("push", adapted.root, "me/mine", "--merge", "--dtype=fp32", "--private")
    assert code == 0, err
    assert hub.repositories["me/mine"].private
    folder = arrived(hub, "me/mine", tmp_path / "arrived")
    assert AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == torch.float32
    assert not any("adapter" in path.name for path in folder.iterdir())


def test_a_later_push_replaces_the_files_and_keeps_the_history(tpaw_, hub, finished):
    run, _ = finished
    assert tpaw_("push", f"{run.root}@1", "me/mine")[0] == 0
    repository = hub.repositories["me/mine"]
    first, parent = dict(repository.files), repository.sha
    repository.files["model-00001-of-00002.safetensors"] = b"of a larger model"
    parent = repository.sha
    assert tpaw_("push", f"{run.root}@2", "me/mine")[0] == 0
    assert repository.files.keys() == first.keys()
    assert repository.files["model.safetensors"] != first["model.safetensors"]
    assert [commit.get("parentCommit") for commit in repository.commits] == [None, parent]


def test_somebody_who_is_faster_is_not_overwritten(tpaw_, hub, finished):
    run, _ = finished
    assert tpaw_("push", f"{run.root}@1", "me/mine")[0] == 0
    repository = hub.repositories["me/mine"]

    def hold(path):
        if path.endswith("/preupload/main"):
            repository.files["new.txt"] = b"of somebody else"

    hub.hold = hold
    before = repository.files
    code, _, err = tpaw_("push", f"{run.root}@2", "me/mine")
    assert code == 3, err
    assert repository.files is before


def test_an_empty_repository_is_filled(tpaw_, hub, finished):
    hub.repositories["me/mine"] = Repository(private=True)
    assert tpaw_("push", finished[0].root, "me/mine", "--private")[0] == 0
    assert "POST /api/repos/create" not in hub.requests
    assert "model.safetensors" in hub.repositories["me/mine"].files


def of_something_else(hub):
    hub.repositories["me/mine"] = Repository()
    hub.repositories["me/mine"].files["README.md"] = b"---\ntags: [other]\n---\nMine."


def public(hub):
    hub.repositories["me/mine"] = Repository()


@pytest.mark.parametrize(
    ("prepare", "options", "parts"),
    [
        (of_something_else, [], ["me/mine", "files", "tag tpaw"]),
        (public, ["--private"], ["--private", "me/mine", "public"]),
    ],
)
def test_a_repository_that_must_not_be_changed(
    tpaw_, hub, finished, monkeypatch, prepare, options, parts
):
    monkeypatch.setattr("tpaw.models.push.export", None)  # nothing is computed
    prepare(hub)
    before = dict(hub.repositories["me/mine"].files)
    code, _, err = tpaw_("push", finished[0].root, "me/mine", *options)
    assert code == 2
    assert all(part in err for part in parts), err
    assert hub.repositories["me/mine"].files == before
    assert not [request for request in hub.requests if request.startswith("P")]


@pytest.fixture
def references(finished, model_folder):
    run, _ = finished
    return {
        "run": run.root,
        "model": model_folder,
        "start": f"{run.root}@0",
        "missing": f"{run.root}@9",
    }


@pytest.mark.parametrize(
    ("which", "repository", "parts"),
    [
        ("model", "me/mine", ["not a checkpoint of a run", "hf upload"]),
        ("start", "me/mine", ["@0", "θ_0", "RUN@1"]),
        ("missing", "me/mine", ["θ_9", "@0, @1, @2, @3, @4"]),
        ("run", "mine", ["mine", "ORG/NAME"]),
        ("run", "me/a/b", ["me/a/b", "not the id of a repository"]),
        ("run", "me/mi ne", ["me/mi ne", "not the id of a repository"]),
        ("run", "me/\x1b]0;x\x07", ["not the id of a repository"]),
    ],
)
def test_what_cannot_be_sent_is_refused_before_anything_is_asked(
    tpaw_, hub, references, monkeypatch, which, repository, parts
):
    monkeypatch.setattr("tpaw.models.push.export", None)
    code, _, err = tpaw_("push", references[which], repository)
    assert code == 2, err
    assert all(part in err for part in parts), err
    assert "\x1b" not in err
    assert hub.requests == []


def test_without_a_token_nothing_is_asked(tpaw_, hub, finished, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("tpaw.models.push.export", None)
    code, _, err = tpaw_("push", finished[0].root, "me/mine")
    assert code == 2
    assert "hf auth login" in err
    assert "HF_TOKEN" in err
    assert hub.requests == []


def test_removed_weights_are_named(tpaw_, hub, finished, tmp_path):
    from tpaw.storage.removal import remove_weights

    copy = RunDirectory(shutil.copytree(finished[0].root, tmp_path / "copy"))
    remove_weights(copy.checkpoint(2), "keep: last")
    code, _, err = tpaw_("push", f"{copy.root}@2", "me/mine")
    assert code == 2
    assert "keep: last" in err
    assert "@3" in err
    assert hub.requests == []


def test_a_run_that_is_half_done_sends_its_newest_checkpoint(tpaw_, hub, finished, tmp_path):
    copy = RunDirectory(shutil.copytree(finished[0].root, tmp_path / "copy"))
    for t in (2, 3):
        shutil.rmtree(copy.iteration(t).folder)
    assert tpaw_("push", copy.root, "me/mine")[0] == 0
    repository = hub.repositories["me/mine"]
    assert repository.commits[0]["summary"] == "copy@2 in bf16"
    assert not repository.private
    assert b"iterations: 2 of 4" in repository.files["README.md"]
    assert "θ_3".encode() not in repository.files["README.md"]


@pytest.mark.parametrize(("part", "status"), [("whoami", 401), ("repos/create", 403)])
def test_a_token_that_may_not_is_refused_before_anything_is_computed(
    tpaw_, hub, finished, monkeypatch, part, status
):
    monkeypatch.setattr("tpaw.models.push.export", None)
    hub.refused[part] = status
    code, _, err = tpaw_("push", finished[0].root, "me/mine")
    assert code == 3
    assert "me/mine" in err
    assert TOKEN not in err
    assert hub.repositories == {}


@pytest.mark.parametrize(("part", "status"), [("/commit/", 500), ("/large/", 403)])
def test_a_failed_upload_keeps_the_model_and_the_run(tpaw_, hub, finished, tmp_path, part, status):
    run, _ = finished
    before = digest(run.root)
    hub.refused[part] = status
    code, _, err = tpaw_("push", run.root, "me/mine")
    assert code == 3
    assert "Traceback" not in err
    assert hub.repositories["me/mine"].files.keys() == {".gitattributes"}
    assert digest(run.root) == before
    (kept,) = leftovers(tmp_path)
    assert f"hf upload me/mine {kept / 'model'}" in err
    assert AutoModelForCausalLM.from_pretrained(kept / "model") is not None
    hub.refused.clear()
    assert tpaw_("push", run.root, "me/mine")[0] == 0
    assert leftovers(tmp_path) == [kept]


def test_a_hub_that_does_not_answer_is_one_line(tpaw_, hub, finished, monkeypatch):
    monkeypatch.setattr("tpaw.models.push.export", None)
    hub.close()
    code, _, err = tpaw_("push", finished[0].root, "me/mine")
    assert code == 3
    assert err.startswith("tpaw: me/mine: the Hub cannot be asked")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_during_the_upload_leaves_nothing(
    tpaw_, hub, finished, tmp_path, control_c, number, code
):
    run, _ = finished
    before = digest(run.root)
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    leave = threading.Event()

    def hold(path):
        if path.startswith("/large/"):
            os.kill(os.getpid(), number)  # the main thread waits for the reply
            leave.wait(60)

    hub.hold = hold
    found, _, err = tpaw_("push", run.root, "me/mine")
    leave.set()
    assert found == code, err
    assert "stopped; the run is unchanged" in err
    assert "Traceback" not in err
    assert hub.repositories["me/mine"].files.keys() == {".gitattributes"}
    assert not leftovers(tmp_path)
    assert digest(run.root) == before
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
