"""Runs that generate by servers: endpoints, servers that they start, and what is left of them."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

import generation_server
import pytest
import torch
import yaml
from builders import SAMPLING, ignore
from fork_server import CLI, Forked
from generation_server import GenerationServer
from messages import complains, refused

import tpaw.generation.server
import tpaw.generation.serving
from tpaw.config.schema import GenerateConfig, RunConfig, ServerConfig
from tpaw.data.token_ids import read_table, token_ids
from tpaw.errors import Interrupted, ServerError
from tpaw.generation.endpoint import Endpoint, Unavailable
from tpaw.generation.generator import FakeGenerator
from tpaw.generation.responses import read_responses
from tpaw.generation.server import Servers
from tpaw.pipeline.players import LoadedPlayers
from tpaw.runtime.interrupt import StopSignal
from tpaw.selfplay import self_play
from tpaw.storage.artifacts import read_sealed
from tpaw.storage.run_directory import RunDirectory, open_run
from tpaw.team import Base, Player

STUB = f"{sys.executable} {generation_server.__file__} --port {{port}} --model {{model}}"
LOG = {"log": re.compile(r"/\S+\.log")}
PLAYER = Player(0, "/models/theta", "f")


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # logs of servers that fail are kept
    monkeypatch.setattr(tpaw.generation.server, "SECONDS_BETWEEN_LOOKS", 0.02)
    monkeypatch.setattr(tpaw.generation.server, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(tpaw.generation.serving, "SECONDS_BETWEEN_TRIES", 0.01)


@pytest.fixture
def servers():
    with contextlib.closing(Servers()) as opened:
        yield opened


def by_command(more="", **settings):
    command = f"{STUB} {more}"
    return GenerateConfig(backend="server", server=ServerConfig(command=command, **settings))


def pids(file):
    return [int(line) for line in file.read_text().split()] if file.exists() else []


def is_alive(pid):
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def wait_for(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def answer(prompt, seed):
    return [int(prompt[0]) % 50 + 5, 11, 4]


def files(folder):
    return {p.name: p.read_bytes() for p in folder.rglob("responses/*.parquet")}


def test_a_run_over_endpoints_gives_the_responses_of_any_generator(settings, tmp_path):
    settings |= {"iterations": 1}
    self_play(
        RunConfig.load(settings), tmp_path / "fake", open_generator=FakeGenerator(answer).opener
    )
    server = GenerationServer(answer)
    try:
        settings["generate"] |= {
            "backend": "server",
            "server": {"endpoints": [server.url], "model": "m", "logprobs": False},
        }
        self_play(RunConfig.load(settings), tmp_path / "served")
    finally:
        server.close()
    assert files(tmp_path / "served") == files(tmp_path / "fake") != {}
    assert not list((tmp_path / "served").rglob("server_drift.json"))


def test_the_log_probs_of_a_server_are_compared_and_used_for_nothing(settings, tmp_path, capsys):
    settings |= {"iterations": 1}
    server = GenerationServer(answer)
    try:
        settings["generate"] |= {
            "backend": "server",
            "server": {"endpoints": [server.url], "model": "m"},
        }
        self_play(RunConfig.load(settings), tmp_path / "run")
    finally:
        server.close()
    run = RunDirectory(tmp_path / "run")
    responses = read_responses(run.responses(1))
    assert {r.server_logp for r in responses} == {-1.5}  # the server says -0.5 of each token
    # The log-probs of θ_0 in the store are those of targets and of responses; responses have three
    # tokens, and no target has.
    [folder] = (tmp_path / "run" / "logprobs").iterdir()
    tables = [read_table(path) for path in folder.glob("*.parquet")]
    ours = {
        bytes(key): logp
        for table in tables
        for key, logp, tokens in zip(table["sequence"], table["logp"], table["tokens"], strict=True)
        if tokens == 3
    }
    found = read_sealed(run.iteration(0).server_drift)
    assert found["responses"] == len(responses)
    assert found["tokens"] == 3 * len(responses)
    assert len(ours) == len(responses)  # no prompt occurs twice
    mean = sum(-1.5 - logp for logp in ours.values()) / found["tokens"]
    assert found["mean"] == pytest.approx(mean, rel=1e-9)
    assert found["mean_abs"] >= abs(found["mean"])
    # The random model knows nothing of -0.5, so this is a large difference.
    assert "Warning: log-probs of the server" in capsys.readouterr().err
    summary = json.loads(run.summary_file.read_text())
    assert summary["players"][1]["server_drift"]["mean"] == found["mean"]


@pytest.mark.process
def test_a_server_serves_its_player_until_it_is_closed_or_another_one_is_opened(servers, tmp_path):
    file = tmp_path / "pids"
    config = by_command(f"--pids {file}")

    def ask(player):
        with servers.open(player, config) as opened:
            [found] = opened.generate([token_ids([7])], SAMPLING, 0, ignore)
            assert found.token_ids.tolist() == [7, 4]

    ask(PLAYER)
    ask(PLAYER)
    [first] = pids(file)
    assert is_alive(first)
    ask(Player(1, "/models/other", "g"))
    assert not is_alive(first)
    _, second = pids(file)
    assert is_alive(second)
    servers.close()
    assert not is_alive(second)
    ask(PLAYER)
    assert len(pids(file)) == 3


@pytest.mark.process
@pytest.mark.parametrize("mode", ["parent", "stubborn"])
def test_whatever_a_server_starts_ends_with_it(servers, tmp_path, monkeypatch, mode):
    monkeypatch.setattr("tpaw.runtime.process_group.GRACE", 0.3)
    file = tmp_path / "pids"
    with servers.open(PLAYER, by_command(f"--pids {file} --mode {mode}")):
        assert len(pids(file)) == 2
        assert all(map(is_alive, pids(file)))
    servers.close()
    assert not any(map(is_alive, pids(file)))


@pytest.mark.process
def test_a_server_that_does_not_get_ready_shows_its_log_and_is_ended(
    servers, tmp_path, monkeypatch
):
    file = tmp_path / "pids"

    def models(self, timeout):
        wait_for(lambda: pids(file))
        raise Unavailable("HTTP 503")

    monkeypatch.setattr(Endpoint, "models", models)
    with (
        refused(
            "θ_0",
            "generate.server.start_timeout",
            "0.5 s",
            "loading /models/theta",
            "still compiling",
            error=ServerError,
            hide=LOG,
        ) as caught,
        servers.open(PLAYER, by_command(f"--pids {file} --mode never", start_timeout=0.5)),
    ):
        pass
    assert not any(map(is_alive, pids(file)))
    log = Path(re.search(LOG["log"], str(caught.value))[0])
    assert "still compiling" in log.read_text()  # it is kept


@pytest.mark.process
def test_a_server_that_ends_shows_its_log(servers):
    with (
        refused("exit code 7", "RuntimeError: CUDA out of memory", error=ServerError, hide=LOG),
        servers.open(PLAYER, by_command("--mode ends")),
    ):
        pass


@pytest.mark.process
def test_a_server_that_dies_at_work_is_named_at_once(servers, tmp_path):
    began = time.monotonic()
    with (
        refused("θ_0", "exit code 9", error=ServerError, hide=LOG),
        servers.open(PLAYER, by_command("--mode dies")) as opened,
    ):
        opened.generate([token_ids([7])] * 3, SAMPLING, 0, ignore)
    assert time.monotonic() - began < 20  # the tries alone would take longer
    with servers.open(PLAYER, by_command()) as opened:  # another one can be started
        assert opened.generate([token_ids([7])], SAMPLING, 0, ignore)


@pytest.mark.process
def test_a_port_that_somebody_takes_is_replaced(servers, monkeypatch):
    monkeypatch.setattr(tpaw.generation.server, "SECONDS_TO_LIST_MODELS", 0.1)
    free = tpaw.generation.server._free_port
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = [taken.getsockname()[1]] * 2
        monkeypatch.setattr(
            tpaw.generation.server, "_free_port", lambda: ports.pop() if ports else free()
        )
        with servers.open(PLAYER, by_command()):
            assert not ports
        servers.close()
        port = taken.getsockname()[1]
        monkeypatch.setattr(tpaw.generation.server, "_free_port", lambda: port)
        with (
            pytest.raises(ServerError, match=f"port {port} was taken by another program"),
            servers.open(PLAYER, by_command()),
        ):
            pass


@pytest.mark.process
def test_a_stop_while_a_server_starts_is_prompt(tmp_path):
    stop = StopSignal()
    file = tmp_path / "pids"
    with contextlib.closing(Servers(stop.check)) as servers:
        threading.Timer(0.3, lambda: setattr(stop, "signal_number", 15)).start()
        began = time.monotonic()
        with (
            pytest.raises(Interrupted),
            servers.open(PLAYER, by_command(f"--pids {file} --mode never")),
        ):
            pass
        assert time.monotonic() - began < 20
    assert not any(map(is_alive, pids(file)))


def test_a_server_and_the_base_of_adapters_are_not_on_a_gpu_together(settings, monkeypatch):
    settings["generate"] |= {"backend": "server", "server": {"command": f"{STUB} {{adapter}}"}}
    settings["model"] |= {"adapter": {"rank": 2}}
    players = LoadedPlayers(RunConfig.load(settings))
    path = settings["model"]["path"]
    player = Player(0, path, "f", Base(path, "f", path))
    bases = []

    @contextlib.contextmanager
    def opened(player, config):
        bases.append(players._base)
        yield None

    monkeypatch.setattr(players.servers, "open", opened)
    for device in ("cpu", "cuda"):
        players.for_training(player, 0)  # keeps the base for the next stage
        assert players._base is not None
        monkeypatch.setattr(players, "device", torch.device(device))
        with players.open_generator(player, players.config.generate):
            pass
    assert bases[0] is not None
    assert bases[1] is None


def test_a_server_and_a_model_are_not_on_a_gpu_together(settings, monkeypatch):
    settings["generate"] |= {"backend": "server", "server": {"command": STUB}}
    players = LoadedPlayers(RunConfig.load(settings))
    events = []
    player = Player(0, settings["model"]["path"], "f")

    @contextlib.contextmanager
    def opened(player, config):
        events.append("serve")
        yield None

    monkeypatch.setattr(players.servers, "open", opened)
    monkeypatch.setattr(players.servers, "close", lambda: events.append("close"))
    model = players.for_scoring(player).model
    for device, expected in (
        ("cpu", ["serve"]),
        ("cuda", ["close", "serve"]),  # nothing is kept any more
    ):
        monkeypatch.setattr(players, "device", torch.device(device))
        with players.open_generator(player, players.config.generate):
            assert events == expected
        assert (players._kept is None) == (device == "cuda")
        events.clear()
    monkeypatch.setattr("tpaw.pipeline.players.load_model", lambda *args, **kwargs: model)
    players._load(player, torch.float32)
    assert events == ["close"]
    events.clear()
    players.for_training(player, 0)
    assert events == ["close"]
    players.device = torch.device("cpu")
    events.clear()
    players.for_training(player, 0)
    assert events == ["close"]


@pytest.fixture
def config(settings, tmp_path):
    """Writes the configuration of a run whose server has a mode."""

    def write(mode):
        settings["generate"] |= {
            "backend": "server",
            "server": {"command": f"{STUB} --pids {tmp_path / 'pids'} --mode {mode}"},
        }
        file = tmp_path / f"{mode}.yaml"
        file.write_text(yaml.safe_dump(settings | {"iterations": 2}))
        return file

    return write


@pytest.mark.process
@pytest.mark.usefixtures("forks")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_server_is_left_of_a_run_that_is_killed_and_the_run_goes_on(config, tmp_path, number):
    out = tmp_path / "out"
    arguments = ("-o", str(tmp_path / "run"))
    killed = Forked(CLI, "run", str(config("hangs")), *arguments, out=out)
    [server] = wait_for(lambda: pids(tmp_path / "pids"))
    log = Path(wait_for(lambda: re.search(LOG["log"], out.read_text()))[0])
    killed.send_signal(number)
    code = killed.wait(timeout=60)
    assert code == (-9 if number == signal.SIGKILL else 128 + number), out.read_text()
    wait_for(lambda: not is_alive(server))
    assert log.exists() == (number == signal.SIGKILL)
    log.unlink(missing_ok=True)
    if number != signal.SIGKILL:
        assert f"to resume, run: tpaw run {tmp_path / 'run'} --trust" in out.read_text()
    if number == signal.SIGKILL:
        again = Forked(CLI, "run", str(config("well")), *arguments, out=out)
        assert again.wait(timeout=300) == 0, out.read_text()
        run = RunDirectory(tmp_path / "run")
        for response in read_responses(run.responses(2)):
            assert response.token_ids[-1] == 4 or response.finish_reason == "length"
        assert not any(map(is_alive, pids(tmp_path / "pids")))
        # One for each of θ_0 (evaluation and D_0), θ_1 and θ_2. And the one that was killed.
        assert len(pids(tmp_path / "pids")) == 4


def test_a_run_of_somebody_else_starts_and_asks_no_server_without_trust(tpaw_, settings, tmp_path):
    executed = tmp_path / "executed"
    server = GenerationServer()
    commands = {
        "command": f"sh -c 'touch {executed}' {{port}} {{model}}",
        "endpoints": [server.url],
    }
    for key, value in commands.items():
        settings["generate"] |= {"backend": "server", "server": {key: value}}
        config = RunConfig.load(settings)
        folder = tmp_path / key
        with open_run(folder, config):
            pass
        for command in (["run", folder], ["run", folder / "config.yaml", "-o", tmp_path / "x"]):
            code, _, err = tpaw_(*command)
            assert code == 2
            complains(err, f"generate.server.{key}", folder / "config.yaml", "--trust")
    assert not executed.exists()
    assert not server.keys
    tpaw_("run", tmp_path / "command", "--trust")
    assert executed.exists()
    server.close()


def test_a_program_that_is_not_there_is_refused_before_anything_is_written(settings, tmp_path):
    settings["generate"] |= {
        "backend": "server",
        "server": {"command": "no-such-vllm serve {model} --port {port}"},
    }
    with refused("generate.server.command", "no-such-vllm"):
        self_play(RunConfig.load(settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()
