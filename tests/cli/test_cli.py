"""The command line as people use it: exit codes, messages, tables, signals."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import yaml
from builders import (
    contents,
    make_model,
    make_tokenizer,
    run_settings,
    save_model,
    sums,
    write_jsonl,
)
from fork_server import CLI, Forked
from messages import complains, prose, says
from transformers import AutoModelForCausalLM

import tpaw.pipeline.players
import tpaw.pipeline.stages
import tpaw.selfplay
from tpaw.errors import Interrupted


@pytest.fixture
def config(tmp_path, settings):
    return write_config(tmp_path, settings)


def write_config(folder, settings):
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_run_status_and_run_again(tpaw_, config, tmp_path):
    code, out, _ = tpaw_("run", config, "-o", tmp_path / "r", "--set", "iterations=1")
    assert code == 0
    for heading in (
        "iteration",
        "accuracy",
        "target reward",
        "margin",
        "identical",
        "truncated",
        "seconds",
    ):
        assert heading in out
    assert "θ_0" in out
    assert "θ_1" in out
    assert f"Results: {tmp_path / 'r'}" in out
    code, out, _ = tpaw_("status", tmp_path / "r")
    assert code == 0
    says(prose(out), "θ_0", "θ_1")
    code, again, _ = tpaw_("run", tmp_path / "r")
    assert code == 0
    assert "θ_1" in again
    code, _, err = tpaw_("run", config, "-o", tmp_path / "r", "--set", "iterations=2")
    assert code == 2
    complains(err, tmp_path / "r", "iterations: 1 → 2")


def test_sft_makes_a_starting_model(tpaw_, settings, tmp_path):
    del settings["iterations"], settings["train"]["epochs"]
    config = write_config(tmp_path, settings)
    code, out, err = tpaw_("sft", config, "-o", tmp_path / "s")
    assert code == 0, err
    assert "θ_1" in out
    assert "target reward" in out
    code, out, _ = tpaw_("status", tmp_path / "s")
    assert code == 0
    says(prose(out), "θ_1")
    code, _, _ = tpaw_("sft", tmp_path / "s")
    assert code == 0
    model = tmp_path / "s" / "iterations" / "1" / "checkpoint"
    code, out, _ = tpaw_("plan", config, "--set", f"model.path={model}")
    assert code == 0
    code, _, err = tpaw_("sft", config, "--set", "method=dpo", "-o", tmp_path / "t")
    assert code == 2
    complains(err, "method", "dpo", "sft")
    code, out, _ = tpaw_("plan", "sft", config)
    assert code == 0
    assert "–" in out


def test_plan_spends_nothing(tpaw_, config, monkeypatch, tmp_path):
    load = AutoModelForCausalLM.from_pretrained

    def without_memory(*args, device_map=None, **kwargs):
        assert device_map == "meta"
        return load(*args, device_map=device_map, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", without_memory)
    code, out, _ = tpaw_("plan", config)
    assert code == 0
    assert "24 examples, 10 held out; skipped: none" in out
    assert "Layout: packed rows, in which responses share their prompt." in out
    assert [word for word in out.split() if word in ("24", "48", "72")][:3] == ["24", "24", "48"]
    assert "θ_2 θ_1 θ_0" in out
    size = "28,960 parameters in fp32"
    says(re.search("Disk: .*", out)[0], "θ_3", "keep: all", size)
    says(re.search("With keep: team.*", out)[0], "keep: last")
    # Weights, gradients and squared gradients.
    assert f"Memory: training holds {12 * 28960 / 1000:.1f} kB" in out
    question, answer = sums(1)[0].values()
    assert f"prompt '<|user|>{question}<|end|>\\n<|assistant|>'" in out
    assert f"target {answer + '<|end|>'!r}" in out
    assert {p.name for p in tmp_path.iterdir()} == {"config.yaml"}


def test_config_show_and_schema(tpaw_):
    code, out, _ = tpaw_("config", "show", "starter", "spin", "--set", "seed=3")
    assert code == 0
    shown = yaml.safe_load(out)
    assert shown["seed"] == 3
    assert shown["team"]["opponents"] == {"last": 2}
    assert "# η ≥ 1" in out
    code, out, _ = tpaw_("config", "schema")
    assert code == 0
    assert json.loads(out)["properties"]["iterations"]["default"] == 4
    code, _, err = tpaw_("config", "show", "spni")
    assert code == 2
    complains(err, "spni", "spin")


BAD_INPUT = {
    "missing file": ("data.path", "{tmp}/none.jsonl"),
    "missing column": ("data.path", "{tmp}/column.jsonl", "text"),
    "empty data": ("data.path", "{tmp}/empty.jsonl"),
    "malformed line": ("data.path", "{tmp}/malformed.jsonl", "line 2", "JSON"),
    "missing held-out file": ("evaluate.data.path", "{tmp}/none.jsonl"),
    "no chat template": ("data.template",),
    "no eos": ("model.path", "model.eos_token"),
    "encoder-decoder": ("model.path", "{tmp}/t5"),
    "classifier": ("model.path", "{tmp}/classifier", "Qwen2ForSequenceClassification"),
    "adapter": ("model.path", "{tmp}/adapter"),
    "too long for the model": ("max_length", "999", "256"),
    "every target too long": ("24 of 24", "100.0%", "max_length", "14"),
    "too many skipped": ("2 of 12", "16.7%", "data.max_skipped", "1.0%"),
    "unknown tracker": ("train.report_to", "foo"),
    "optimizer without its package": ("train.optimizer", "schedule_free_adamw"),
    "schedule without its settings": ("train.schedule", "cosine_with_min_lr"),
    "schedule by metric": ("train.schedule", "'reduce_lr_on_plateau'"),
    "training argument of another type": ("train.training_arguments",),
    "no held-out rows to match": ("evaluate.exact_match",),
    "no held-out rows to sample for": ("evaluate.temperatures",),
    "output is a file": ("--output", "{tmp}/column.jsonl"),
    "output is foreign": ("--output", "{tmp}"),
    "unknown optimizer": ("train.optimizer", "'rmsporp'", "rmsprop"),
    "unknown schedule": ("train.schedule", "'cosin'", "cosine"),
    "unknown training argument": ("train.training_arguments", "'weight_dekay'", "weight_decay"),
    "owned training argument": ("train.training_arguments.seed", "seed"),
    "exact match without answers": ("evaluate.exact_match",),
    "sampled exact match without answers": ("evaluate.temperatures",),
    "foreign tokenizer": ("model.path", "{tmp}/foreign", "100"),
}
# Where another library says why.
REASON = re.compile(r"(?<=malformed JSON: ).*|(?<=_8bit: ).*|(?<=_min_lr: ).*|(?<=arguments: ).*")


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_ends_with_2_before_any_model_is_loaded(
    name, tpaw_, settings, tmp_path, monkeypatch
):
    from transformers import Qwen2ForSequenceClassification, T5Config

    write_jsonl(tmp_path / "column.jsonl", [{"text": "x"}])
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "malformed.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question": \n')
    output = tmp_path / "out"
    model, data = settings["model"], settings["data"]
    match name:
        case "missing file":
            data["path"] = f"{tmp_path}/none.jsonl"
        case "missing column":
            data["path"] = f"{tmp_path}/column.jsonl"
        case "empty data":
            data["path"] = f"{tmp_path}/empty.jsonl"
        case "malformed line":
            data["path"] = f"{tmp_path}/malformed.jsonl"
        case "missing held-out file":
            settings["evaluate"]["data"]["path"] = f"{tmp_path}/none.jsonl"
        case "no chat template":
            model["path"] = str(save_model(tmp_path / "plain", chat=False))
            row = {
                "messages": [
                    {"role": "user", "content": "u"},
                    {"role": "assistant", "content": "a"},
                ]
            }
            data["path"] = str(write_jsonl(tmp_path / "chats.jsonl", [row]))
        case "no eos":
            model["path"] = str(save_model(tmp_path / "endless"))
            tokenizer = make_tokenizer()
            tokenizer.eos_token = None
            tokenizer.save_pretrained(tmp_path / "endless")
            (tmp_path / "endless" / "generation_config.json").unlink()
        case "encoder-decoder":
            model["path"] = f"{tmp_path}/t5"
            T5Config(architectures=["T5ForConditionalGeneration"]).save_pretrained(tmp_path / "t5")
        case "classifier":
            model["path"] = f"{tmp_path}/classifier"
            Qwen2ForSequenceClassification(make_model().config).save_pretrained(
                tmp_path / "classifier"
            )
        case "adapter":
            model["path"] = f"{tmp_path}/adapter"
            (tmp_path / "adapter").mkdir()
            (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
        case "too long for the model":
            settings["max_length"] = 999
        case "every target too long":
            settings["max_length"] = 14
        case "too many skipped":
            rows = [*sums(10), {"question": "", "answer": "x"}, {"question": "x", "answer": None}]
            data["path"] = str(write_jsonl(tmp_path / "some.jsonl", rows))
        case "output is a file":
            output = tmp_path / "column.jsonl"
        case "output is foreign":
            output = tmp_path
        case "unknown optimizer":
            settings["train"]["optimizer"] = "rmsporp"
        case "unknown schedule":
            settings["train"]["schedule"] = "cosin"
        case "unknown training argument":
            settings["train"]["training_arguments"] = {"weight_dekay": 0.1}
        case "owned training argument":
            settings["train"]["training_arguments"] = {"seed": 1}
        case "unknown tracker":
            settings["train"]["report_to"] = "foo"
        case "optimizer without its package":
            settings["train"]["optimizer"] = "schedule_free_adamw"
        case "schedule without its settings":
            settings["train"]["schedule"] = "cosine_with_min_lr"
        case "schedule by metric":
            settings["train"]["schedule"] = "reduce_lr_on_plateau"
        case "training argument of another type":
            settings["train"]["training_arguments"] = {"hub_strategy": "sometimes"}
        case "no held-out rows to match":
            settings["evaluate"] = {"exact_match": True}
        case "no held-out rows to sample for":
            settings["evaluate"] = {"temperatures": [0.5]}
        case "exact match without answers" | "sampled exact match without answers":
            sampled = name.startswith("sampled")
            settings["evaluate"] |= {"temperatures": [1]} if sampled else {"exact_match": True}
            rows = [{"question": "q", "answer": "no idea"}]
            settings["evaluate"]["data"]["path"] = str(write_jsonl(tmp_path / "free.jsonl", rows))
        case "foreign tokenizer":
            model["path"] = str(save_model(tmp_path / "foreign"))
            make_model(vocab_size=100).save_pretrained(tmp_path / "foreign")

    def load_model(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(tpaw.pipeline.players, "load_model", load_model)
    (tmp_path / "config").mkdir()
    code, _, err = tpaw_("run", write_config(tmp_path / "config", settings), "-o", output)
    assert code == 2, err
    parts = [part.format(tmp=tmp_path) for part in BAD_INPUT[name]]
    complains(err, *parts, hide={"reason": REASON})
    assert not (tmp_path / "out").exists()


def test_an_unknown_key_and_a_missing_argument(tpaw_, config):
    code, _, err = tpaw_("run", config, "--set", "train.epcohs=2")
    assert code == 2
    complains(err, "train.epcohs", "train.epochs")
    assert tpaw_("run")[0] == 2
    code, _, err = tpaw_("status", config.parent)
    assert code == 2
    complains(err, config.parent)


def test_a_locked_run_and_a_damaged_artifact_have_exit_code_1(tpaw_, config, tmp_path):
    from tpaw.config.schema import RunConfig
    from tpaw.storage.run_directory import open_run

    with open_run(tmp_path / "r", RunConfig.load(str(config))):
        code, _, err = tpaw_("run", config, "-o", tmp_path / "r")
    assert code == 1
    held = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "time": re.compile(r"20\d\d-[^\s;,)]*"),
    }
    complains(err, tmp_path / "r", os.getpid(), hide=held)
    (tmp_path / "r" / "run.json").write_text("{")
    code, _, err = tpaw_("run", config, "-o", tmp_path / "r")
    assert code == 1
    complains(err, tmp_path / "r" / "run.json", hide={"reason": re.compile("Expecting.*")})


@pytest.mark.parametrize(("error", "code"), [(Interrupted(15), 143), (KeyboardInterrupt(), 130)])
def test_a_stopped_run_says_what_to_type(tpaw_, config, tmp_path, monkeypatch, error, code):
    def self_play(*arguments):
        raise error

    monkeypatch.setattr(tpaw.selfplay, "self_play", self_play)
    found, _, err = tpaw_("run", config, "-o", tmp_path / "my run")
    assert found == code
    says(err, f"tpaw run '{tmp_path / 'my run'}'\n")


def test_a_run_without_output_is_named_after_its_configuration(
    tpaw_, config, tmp_path, monkeypatch
):
    outputs = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tpaw.selfplay, "self_play", lambda *given: outputs.append(given[1]))
    tpaw_("run", config, "spin")
    assert [str(output) for output in outputs] == ["runs/config-spin"]


@pytest.fixture(scope="module")
def long_training(tmp_path_factory, forks, model_folder, data_file, heldout_file):
    """A configuration that trains long enough to be stopped, and what an unbroken run gives."""
    folder = tmp_path_factory.mktemp("long-training")
    settings = run_settings(model_folder, data_file, heldout_file) | {"iterations": 2}
    settings["train"] |= {"epochs": 6}
    config = write_config(folder, settings)
    process = Forked(CLI, "run", config, "-o", folder / "whole", out=folder / "whole.txt")
    assert process.wait(timeout=300) == 0, process.out.read_text()
    return config, contents(folder / "whole")


@pytest.mark.process
@pytest.mark.parametrize(
    ("number", "code", "stage"),
    [
        (signal.SIGTERM, 143, "iterations/1/training.jsonl"),
        (signal.SIGINT, 130, "iterations/2/responses"),
    ],
)
def test_a_signal_stops_at_a_safe_point_and_says_how_to_go_on(
    number, code, stage, long_training, tmp_path
):
    config, whole = long_training
    output = tmp_path / "r"
    process = Forked(
        CLI, "run", config, "-o", output, out=tmp_path / "out.txt", err=tmp_path / "err.txt"
    )
    deadline = time.monotonic() + 120
    while not (output / stage).exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(number)
    found, err = process.wait(timeout=120), process.err.read_text()
    assert found == code, err
    says(err.splitlines()[-1], f"tpaw run {output}")
    assert "Traceback" not in err
    if stage.endswith("training.jsonl"):
        assert list((output / "iterations" / "1" / "training").glob("checkpoint-*/manifest.json"))
    again = Forked(CLI, "run", config, "-o", output, out=tmp_path / "again.txt")
    assert again.wait(timeout=300) == 0, again.out.read_text()
    assert contents(output) == whole


@pytest.mark.process
def test_a_run_by_default_has_no_cluster_and_no_server(forks, tmp_path):
    """As the demo, with fewer rows and shorter responses, whether Ray is installed or not."""
    changes = ["iterations=1", "data.limit=16", "evaluate.data.limit=4", "train.epochs=1"]
    changes += ["generate.max_new_tokens=8", "train.batch_size=8", "train.learning_rate=1e-4"]
    arguments = [part for change in changes for part in ("--set", change)]
    command = ("run", "starter", "-o", tmp_path / "r", *arguments)
    process = Forked("in_process_driver:watched", *command, out=tmp_path / "out.txt")
    assert process.wait(timeout=300) == 0, process.out.read_text()
    seen = json.loads(process.out.read_text().splitlines()[-1])
    assert seen == {"begun": [], "imported": []}
    assert (tmp_path / "r" / "iterations" / "1" / "checkpoint").is_dir()


@pytest.fixture
def evil(finished, tmp_path):
    """A run directory from somebody else, whose configuration asks to run its model's code."""
    from tpaw.storage.run_directory import open_run

    run, config = finished
    theirs = shutil.copytree(run.root, tmp_path / "theirs")
    code = tmp_path / "model"
    shutil.copytree(config.model.path, code)
    facts = json.loads((code / "config.json").read_text())
    facts |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig"}}
    (code / "config.json").write_text(json.dumps(facts))
    (code / "evil.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'executed')!r}).touch()\n"
        "from transformers import Qwen2Config\n"
        "class EvilConfig(Qwen2Config):\n    model_type = 'evil'\n"
    )
    model = config.model.model_copy(update={"path": str(code), "trust_remote_code": True})
    for name in ("config.yaml", "run.json"):
        (theirs / name).unlink()
    shutil.move(theirs, tmp_path / "published")
    with open_run(theirs, config.model_copy(update={"model": model})):
        pass
    shutil.copytree(tmp_path / "published", theirs, dirs_exist_ok=True)
    return theirs


@pytest.mark.parametrize(
    "command",
    [
        ["run", "{run}"],
        ["run", "{run}/config.yaml", "-o", "{run}-2"],
        ["plan", "{run}", "--set", "seed=1"],
        ["evaluate", "{run}@0", "--suite", "starter"],
        ["answer", "{run}@1", "-o", "{run}-answers"],
        ["prepare", "{run}"],
    ],
    ids=lambda command: f"{command[0]} {len(command)}",
)
def test_a_run_of_somebody_else_runs_no_code_without_trust(tpaw_, evil, tmp_path, command):
    code, _, err = tpaw_(*(part.format(run=evil) for part in command))
    assert code == 2
    complains(err, "model.trust_remote_code", evil / "config.yaml", "--trust")
    assert not (tmp_path / "executed").exists()


def test_trust_is_given_by_the_person_who_types_the_command(tpaw_, evil, tmp_path):
    tpaw_("plan", evil, "--trust")
    assert (tmp_path / "executed").exists()  # so the code above would have run


def test_a_file_of_ones_own_is_trusted(tpaw_, settings, tmp_path):
    settings["model"]["trust_remote_code"] = True
    code, _, err = tpaw_("plan", write_config(tmp_path, settings))
    assert code == 0, err


def fails_with(error):
    def self_play(*arguments):
        raise error

    return self_play


def test_a_bug_of_ours_shows_its_traceback_and_asks_for_a_report(tpaw_, config, monkeypatch):
    monkeypatch.setattr(tpaw.selfplay, "self_play", fails_with(KeyError("a bug \x1b")))
    code, _, err = tpaw_("run", config)
    assert code == 1
    assert "Traceback" in err
    assert "\x1b" not in err
    says(err.splitlines()[-1], "report")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "/x/y"),
        PermissionError(errno.EACCES, "Permission denied", "/x/y"),
        OSError(errno.ENAMETOOLONG, "File name too long", "/x/y"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 4352 vs 4244"),
    ],
    ids=lambda error: str(error)[:10],
)
def test_a_failure_of_the_file_system_is_one_line_and_has_exit_code_4(
    tpaw_, config, monkeypatch, error
):
    monkeypatch.setattr(tpaw.selfplay, "self_play", fails_with(error))
    code, _, err = tpaw_("run", config)
    assert code == 4
    complains(
        err, getattr(error, "filename", "space"), hide={"free": re.compile(r"[\d.]+ [kMGT]?B")}
    )


def test_an_error_of_the_hubs_client_is_one_text(tpaw_, config, monkeypatch):
    monkeypatch.setattr(tpaw.selfplay, "self_play", fails_with(OSError("We couldn't connect")))
    code, _, err = tpaw_("run", config)
    assert code == 1
    complains(err, "We couldn't connect")


@pytest.mark.parametrize("output", ["x" * 300, "/proc/x/y", "y/" * 2500])
def test_an_output_that_cannot_be_made_is_one_line(tpaw_, config, output):
    code, _, err = tpaw_("run", config, "-o", output)
    assert code in (2, 4)
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("tpaw: ")
    assert output.rstrip("/") in err


@pytest.mark.parametrize("command", ["run", "plan", "status"])
def test_an_edited_configuration_of_a_run_is_not_taken_for_its_own(
    tpaw_, finished, tmp_path, command
):
    run, _ = finished
    copy = shutil.copytree(run.root, tmp_path / "r")
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("eta: 6.0", "eta: 1.0"))
    code, _, err = tpaw_(command, copy)
    assert code == 1
    complains(err, copy / "config.yaml", "--set")


@pytest.mark.parametrize("content", ["", "{}", "\0", None])
def test_a_damaged_configuration_of_a_run_is_named(tpaw_, finished, tmp_path, content):
    run, _ = finished
    copy = shutil.copytree(run.root, tmp_path / "r")
    (copy / "config.yaml").unlink()
    if content is not None:
        (copy / "config.yaml").write_text(content)
    for command in ("run", "plan", "status"):
        code, _, err = tpaw_(command, copy)
        assert code == 1
        complains(err, copy / "config.yaml", "restore it")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("unable to mmap 16 bytes from file <x>: Cannot allocate memory (12)"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_memory_that_runs_out_while_a_model_is_loaded_is_one_line(
    tpaw_, config, monkeypatch, error
):
    monkeypatch.setattr(tpaw.selfplay, "self_play", fails_with(error))
    code, _, err = tpaw_("run", config)
    assert code == 1
    assert "Traceback" not in err
    complains(err, "memory has run out", str(error) or "MemoryError")


def test_what_is_imported_is_not_collected_and_what_comes_later_is():
    """In a process of its own, because what is frozen stays so."""
    program = """
import gc, sys, weakref
from tpaw.cli.common import load_libraries

class Node: pass

def cycle():
    node = Node()
    node.itself = node
    return weakref.ref(node)

assert "tpaw.storage.artifacts" not in sys.modules and gc.get_freeze_count() == 0
load_libraries("tpaw.storage.artifacts")
found = gc.get_freeze_count()
assert "tpaw.storage.artifacts" in sys.modules and found > 10_000 and gc.isenabled()
load_libraries("tpaw.storage.artifacts")
later = cycle()
assert later() is not None
gc.collect()
assert later() is None and gc.get_freeze_count() <= found
try:
    load_libraries("tpaw.no_such_module")
except ModuleNotFoundError:
    assert gc.isenabled()
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_env_says_what_a_bug_report_needs(tpaw_, monkeypatch):
    import importlib.metadata

    code, out, _ = tpaw_("env")
    assert code == 0
    found = dict(line.split(None, 1) for line in out.splitlines())
    for name in ("tpaw", "torch", "transformers", "trl"):
        assert found[name] == importlib.metadata.version(name)
    assert found["python"].startswith("3.")
    assert {"system", "cores", "CUDA", "GPUs"} <= found.keys()
    real = importlib.metadata.version

    def without_ray(name):
        if name == "ray":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr("tpaw.cli.main.version", without_ray)
    _, out, _ = tpaw_("env")
    assert "ray           not installed\n" in out


def test_status_watches_a_run_until_it_is_finished(tpaw_, finished, tmp_path, monkeypatch):
    """The files of a finished run appear one after another, as those of a running one do."""
    import shutil

    import tpaw.cli.run

    source = finished[0].root
    steps = [
        ["run.json", "config.yaml", "players", "inputs", "iterations/0"],
        ["iterations/1/responses"],
        [],
        ["iterations/1/training.jsonl"],
        [p.relative_to(source).as_posix() for p in source.iterdir()],
    ]
    waited = []

    def copy():
        for name in steps.pop(0):
            target = tmp_path / "run" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            kind = shutil.copytree if (source / name).is_dir() else shutil.copy
            kind(source / name, target, **({"dirs_exist_ok": True} if kind != shutil.copy else {}))

    def sleep(seconds):
        waited.append(seconds)
        copy()

    copy()
    monkeypatch.setattr(tpaw.cli.run.time, "sleep", sleep)
    code, out, _ = tpaw_("status", str(tmp_path / "run"), "--watch")
    assert code == 0
    assert waited == [2.0] * 4
    shown = [line for line in out.splitlines() if line.startswith(("next", "finished"))]
    logged = (source / "iterations/1/training.jsonl").read_text().splitlines()[-1]
    step = json.loads(logged)["step"]
    assert shown == [
        "next  [1/4] generate with θ_0",
        "next  [1/4] score and train θ_1",
        f"next  [1/4] score and train θ_1 (step {step})",
        "finished",
    ]
    assert "\x1b" not in out


def commands():
    """Every command that a person is shown, by its name."""
    import typer

    from tpaw.cli.main import app

    def within(group, name):
        for key, command in group.commands.items():
            if command.hidden:
                continue
            if hasattr(command, "commands"):
                yield from within(command, f"{name} {key}")
            else:
                yield f"{name} {key}", command

    return dict(within(typer.main.get_command(app), "tpaw"))


@pytest.mark.parametrize("name", commands())
def test_every_help_has_an_example_that_is_accepted(name):
    import shlex

    command = commands()[name]
    # A line end within a paragraph would stay, however wide the terminal is.
    assert not any("\n" in paragraph for paragraph in command.help.split("\n\n"))
    [example] = [line for line in command.help.splitlines() if line.startswith("Example: ")]
    words = shlex.split(example.removeprefix("Example: ").partition(" > ")[0])
    own = name.split()
    assert words[: len(own)] == own
    # Parsing refuses an unknown option or a missing argument; nothing is carried out.
    command.make_context(name, words[len(own) :])
