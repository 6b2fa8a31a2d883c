"""Fixtures: a small model, its data, a finished run, the command line, judges."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are too small to share out
# Trackio reads it on import, and TRL imports Trackio.
os.environ["TRACKIO_DIR"] = tempfile.mkdtemp(prefix="trackio-")

import builders
import pytest
import torch
from builders import run_settings, save_model, starter_rows, sums, write_jsonl
from fork_server import fork_server
from messages import GOLDEN

atexit.register(shutil.rmtree, os.environ["TRACKIO_DIR"], ignore_errors=True)


def pytest_addoption(parser):
    parser.addoption("--update-messages", action="store_true", help="Write messages.yaml anew.")
    parser.addoption(
        "--device",
        choices=["cpu", "cuda", "pretended"],
        default="cpu",
        help="Where models compute. pretended: a GPU that is not there, see pretended_gpu.py.",
    )


def pytest_configure(config):
    GOLDEN.updates = config.getoption("--update-messages")
    device = config.getoption("--device")
    if device == "pretended":
        import pretended_gpu

        pretended_gpu.start()
        device = "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch sees no CUDA device")
    builders.DEVICE = torch.device(device)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Files with slow tests come first, so that no worker is left alone with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("process")}
    items.sort(key=lambda item: item.path not in slow)
    if builders.DEVICE.type != "cpu":
        skip = pytest.mark.skip(reason="its claim is of a CPU")
        for item in items:
            if item.get_closest_marker("cpu"):
                item.add_marker(skip)
    if GOLDEN.updates:
        items[:] = [item for item in items if "from messages import" in item.path.read_text()]
    whole = not any("::" in argument for argument in config.args)
    for item in items:
        if whole:
            GOLDEN.collected.setdefault(item.nodeid.partition("::")[0], []).append(item.nodeid)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    with GOLDEN.telling(item.nodeid):
        return (yield)


def pytest_sessionfinish(session):
    """Workers hand over what was said; the file is written once."""
    if not GOLDEN.updates:
        return
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["messages"] = [GOLDEN.said, GOLDEN.collected]
    else:
        GOLDEN.write()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    if GOLDEN.updates:
        said, collected = getattr(node, "workeroutput", {}).get("messages", ({}, {}))
        GOLDEN.said |= said
        GOLDEN.collected |= collected


@pytest.fixture(scope="session", autouse=True)
def _nameless_folders(tmp_path_factory):
    GOLDEN.folders[str(tmp_path_factory.getbasetemp())] = "<tmp>"


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved random Qwen2 with a chat template."""
    return save_model(tmp_path_factory.mktemp("model") / "qwen2")


@pytest.fixture(scope="session")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 rows in GSM8K's shape."""
    return write_jsonl(tmp_path_factory.mktemp("data") / "train.jsonl", sums(24))


@pytest.fixture(scope="session")
def heldout_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10 other rows."""
    return write_jsonl(tmp_path_factory.mktemp("data") / "heldout.jsonl", sums(10, seed=1))


@pytest.fixture
def settings(model_folder: Path, data_file: Path, heldout_file: Path) -> dict:
    """A whole run that takes seconds, as the nested mapping of its YAML file."""
    return run_settings(model_folder, data_file, heldout_file)


@pytest.fixture(scope="session")
def finished(tmp_path_factory, model_folder, data_file, heldout_file):
    """A run of four iterations, and its configuration."""
    from tpaw.config.schema import RunConfig
    from tpaw.selfplay import self_play
    from tpaw.storage.run_directory import RunDirectory

    config = RunConfig.load(
        {
            "model": {"path": str(model_folder)},
            "data": {"path": str(data_file)},
            "max_length": 128,
            "generate": {"max_new_tokens": 12, "tokens_per_batch": 512, "shard_size": 16},
            "objective": {"lambda": [0.1, 0.1, 0.1, 5.0]},
            "train": {
                "learning_rate": 1e-3,
                "epochs": [2, 1, 1, 1],
                "batch_size": 8,
                "tokens_per_row": 256,
                "log_every": 2,
            },
            "evaluate": {"data": {"path": str(heldout_file)}},
            "precision": "fp32",
            "device": builders.DEVICE.type,
        }
    )
    folder = tmp_path_factory.mktemp("runs") / "run"
    last = self_play(config, folder)
    assert last.index == 4
    return RunDirectory(folder), config


@pytest.fixture
def tpaw_(monkeypatch, capsys):
    """Run a command in this process; gives the exit code, stdout and stderr."""
    from tpaw.cli.main import main

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["tpaw", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as exit_:
            code = exit_.code or 0
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def forks():
    """The server behind `fork_server.Forked`; gives its process id."""
    with fork_server() as (path, pid), pytest.MonkeyPatch.context() as patch:
        patch.setenv("FORK_SERVER", path)
        yield pid


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """Start judges on this machine, asked from an empty folder; nothing is tried twice."""
    from judge_server import JudgeServer

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("tpaw.evaluation.judge.endpoint.RETRIES", 0)
    monkeypatch.setattr("tpaw.evaluation.judge.endpoint.MALFORMED_RETRIES", 0)
    servers = []

    def start(reply):
        servers.append(JudgeServer(reply))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def six(tmp_path):
    """A wins three by length, loses one; one of equal length, one identical."""
    from judge_server import answers

    a = answers(tmp_path / "a.jsonl", "aaaa", "aaa", "aaaaa", "a", "ab", "same")
    b = answers(tmp_path / "b.jsonl", "b", "b", "b", "bbbb", "ba", "same")
    return a, b


@pytest.fixture(scope="session")
def adapted(tmp_path_factory):
    """A run that trains an adapter of the starter's model, on prompts without a chat template."""
    from tpaw.config.schema import RunConfig
    from tpaw.selfplay import self_play
    from tpaw.storage.run_directory import RunDirectory

    folder = tmp_path_factory.mktemp("adapted")
    rows = [{"prompt": row["question"], "completion": row["answer"]} for row in starter_rows(16)]
    data = write_jsonl(folder / "rows.jsonl", rows)
    settings = run_settings("tpaw://starter/model", data, None)
    del settings["evaluate"]
    settings["model"]["adapter"] = {"rank": 4}
    settings["iterations"] = 1
    settings["generate"]["max_new_tokens"] = 48
    settings["train"]["learning_rate"] = 1e-2
    self_play(RunConfig.load(settings), folder / "adapted")
    return RunDirectory(folder / "adapted")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for the Hub, which this process then uses."""
    import huggingface_hub
    from hub_server import TOKEN, HubServer

    server = HubServer()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    huggingface_hub.close_session()
    yield server
    huggingface_hub.close_session()
    server.close()


@pytest.fixture
def control_c():
    """Ctrl-C as in a terminal. A process of pytest-xdist ignores it."""
    import signal

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
