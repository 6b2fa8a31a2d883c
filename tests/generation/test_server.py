"""Generation by a server: right requests, checked replies, and servers that misbehave."""

from __future__ import annotations

import contextlib
import http.client
import threading
import time

import numpy as np
import pytest
from builders import SAMPLING, ignore
from generation_server import GenerationServer
from messages import by_first, refused

import tpaw.generation.endpoint
import tpaw.generation.server
import tpaw.generation.serving
from tpaw.config.schema import GenerateConfig, ServerConfig
from tpaw.data.token_ids import token_ids
from tpaw.errors import MemoryShortageError, ServerError
from tpaw.generation.generator import FakeGenerator
from tpaw.generation.server import Servers
from tpaw.team import Base, Player

PLAYER = Player(3, "/models/theta", "f")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """The waits between tries are short."""
    monkeypatch.setattr(tpaw.generation.server, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(tpaw.generation.serving, "SECONDS_BETWEEN_TRIES", 0.001)
    monkeypatch.setattr(tpaw.generation.server, "LONGEST_WAIT", 0.004)
    monkeypatch.setattr(tpaw.generation.server, "SECONDS_BETWEEN_LOOKS", 0.02)


@pytest.fixture
def serve():
    """Start servers; they end with the test."""
    with contextlib.ExitStack() as stack:

        def start(*args, **kwargs):
            server = GenerationServer(*args, **kwargs)
            stack.callback(server.close)
            return server

        yield start


@contextlib.contextmanager
def generator(*servers, **settings):
    """A generator over these servers or urls."""
    urls = tuple(getattr(server, "url", server) for server in servers)
    config = ServerConfig(**({"endpoints": urls, "model": "m"} | settings))
    with Servers().open(PLAYER, GenerateConfig(backend="server", server=config)) as opened:
        yield opened


def answers(*servers, prompts=((5, 6),), params=SAMPLING, seed=0, on_done=ignore, **settings):
    with generator(*servers, **settings) as opened:
        return opened.generate([token_ids(p) for p in prompts], params, seed, on_done)


def ids(completions):
    return [completion.token_ids.tolist() for completion in completions]


def closed_port():
    """The url of a port that nobody listens on."""
    server = GenerationServer()
    server.close()
    return server.url


def patient(seconds=20.0):
    """An `on_done` that ends a test that would hang."""
    deadline = time.monotonic() + seconds

    def on_done(count):
        assert time.monotonic() < deadline, "it hangs"

    return on_done


def change(**fields):
    """Replies with other fields in their choice."""
    return lambda body, reply: reply | {"choices": [reply["choices"][0] | fields]}


def test_ragged_prompts_are_answered_as_by_any_generator(serve):
    rng = np.random.default_rng(0)
    prompts = [token_ids(rng.integers(5, 300, rng.integers(1, 63))) for _ in range(60)]

    def emit(prompt, seed):
        own = np.random.default_rng([int(token) for token in prompt])
        return own.integers(2, 30, 100).tolist()  # token 4 is a stop token

    done = []
    with generator(serve(emit), serve(emit), in_flight=5) as opened:
        found = opened.generate(prompts, SAMPLING, 7, done.append)
    expected = FakeGenerator(emit).generate(prompts, SAMPLING, 7, ignore)
    assert ids(found) == ids(expected)
    assert [c.finish_reason for c in found] == [c.finish_reason for c in expected]
    assert {c.finish_reason for c in found} == {"stop", "length"}
    assert sum(done) == 60
    assert [c.server_logp for c in found] == [-0.5 * len(c.token_ids) for c in found]


def test_a_request_gives_every_sampling_setting(serve):
    server = serve()
    answers(server, prompts=[(7, 8, 9)], params=SAMPLING._replace(top_p=0.9, top_k=20))
    [request] = server.requests
    assert request.pop("seed") >= 0
    assert request == {
        "model": "m",
        "prompt": [7, 8, 9],
        "max_tokens": 12,
        "min_tokens": 0,
        "n": 1,
        "temperature": 1.0,
        "top_p": 0.9,
        "top_k": 20,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop": [],
        "stop_token_ids": [4],
        "ignore_eos": True,
        "skip_special_tokens": False,
        "return_token_ids": True,
        "logprobs": 0,
        "echo": False,
        "stream": False,
    }


def test_what_a_request_says_where_something_is_off(serve):
    server = serve(owned_by="sglang")
    answers(server, prompts=[[5] * 60], params=SAMPLING.greedy(), logprobs=False)
    [request] = server.requests
    assert request["max_tokens"] == 4  # max_length is 64
    assert (request["temperature"], request["top_k"], request["logprobs"]) == (0.0, -1, None)
    # SGLang would ignore the stop tokens too.
    assert request["ignore_eos"] is False


def test_every_prompt_has_its_own_seed_which_its_place_and_the_shards_seed_decide(serve):
    server = serve()
    prompts = [(5,)] * 6

    def seeds(seed, count, first=0):
        server.requests.clear()
        with generator(server, in_flight=1) as opened:
            opened.generate([token_ids(p) for p in prompts[:count]], SAMPLING, seed, ignore, first)
        return [request["seed"] for request in server.requests]

    whole = seeds(1, 6)
    assert len(set(whole)) == 6
    assert seeds(1, 6) == whole
    assert seeds(1, 2, first=4) == whole[4:]
    assert not set(seeds(2, 6)) & set(whole)


def test_no_more_requests_than_allowed_wait_at_a_time(serve):
    def slowly(body, reply):
        time.sleep(0.01)
        return reply

    servers = serve(misbehave=slowly), serve(misbehave=slowly)
    answers(*servers, prompts=[(i + 5,) for i in range(24)], in_flight=3)
    assert [server.most_at_once for server in servers] == [3, 3]


def test_the_key_comes_from_the_environment(serve, monkeypatch):
    server = serve()
    answers(server)
    monkeypatch.setenv("TPAW_SERVER_API_KEY", "secret")
    answers(server)
    assert server.keys == [None, None, "Bearer secret", "Bearer secret"]


@by_first(
    ("name", "reply"),
    [
        ("too_many", (429, {"error": {"message": "slow down"}}, [("Retry-After", "0.01")])),
        ("unavailable", (503, {"detail": "loading"})),
        ("server_error", (500, {"error": {"message": "engine died"}})),
        ("reset", None),
        ("no_json", (200, b"<html>gateway</html>")),
        ("gave_up", change(finish_reason="abort")),
        ("gave_up_2", change(finish_reason=None)),
    ],
)
def test_what_may_pass_is_tried_again(serve, name, reply):
    count = 0

    def misbehave(body, right):
        nonlocal count
        count += 1
        if count > 2:
            return right
        return reply(body, right) if callable(reply) else reply

    server = serve(misbehave=misbehave)
    assert ids(answers(server)) == [[5, 6, 4]]
    assert count == 3


def test_tries_are_bounded(serve):
    server = serve(misbehave=lambda body, reply: (500, {"error": {"message": "engine died"}}))
    with refused("no generation server answers", "HTTP 500", "engine died", error=ServerError):
        answers(server)
    assert len(server.requests) == 7


def test_a_prompt_that_one_server_cannot_answer_goes_to_the_other(serve):
    def misbehave(body, reply):
        time.sleep(0.001)
        return (500, {"error": {"message": "kernel"}}) if body["prompt"] == [9] else reply

    prompts = [(9,), *((i + 10,) for i in range(300))]
    bad, good = serve(misbehave=misbehave), serve()
    assert ids(answers(bad, good, prompts=prompts, in_flight=2))[0] == [9, 4]
    with refused("HTTP 500", "kernel", "prompt 0", "1 tokens", "are answered", error=ServerError):
        answers(bad, prompts=prompts, in_flight=2)


def test_a_prompt_that_nobody_is_left_for_ends_the_work(serve):
    """One server cannot answer it, and the other one dies while it is there or waits for it."""
    bad_is_asked = threading.Event()

    def misbehave(body, reply):
        if body["prompt"] == [9]:
            bad_is_asked.set()
            return 500, {"error": {"message": "kernel"}}
        time.sleep(0.002)
        return reply

    def die(body, reply):
        if not bad_is_asked.wait(0.001):
            return reply
        other.server.server_close()
        return None

    bad, other = serve(misbehave=misbehave), serve(misbehave=die)
    prompts = [(9,), *((i + 10,) for i in range(60))]
    with pytest.raises(ServerError, match="prompt 0 of its shard"):
        answers(bad, other, prompts=prompts, in_flight=2, on_done=patient())


def test_a_prompt_that_waits_for_a_server_that_dies_ends_the_work(serve):
    """It was given back by the only server that is left, which cannot answer it."""
    has_failed, is_given_back = threading.Event(), threading.Event()

    def fail_one(body, reply):
        if body["prompt"] == [9]:
            has_failed.set()
            return 500, {"error": {"message": "kernel"}}
        if has_failed.is_set():  # the only thread has another prompt now
            is_given_back.set()
        # Other prompts are answered meanwhile, so the server is not taken for dead.
        return reply

    def die(body, reply):
        is_given_back.wait(10)
        other.server.server_close()
        return None

    bad, other = serve(misbehave=fail_one), serve(misbehave=die)
    prompts = [(9,), *((i + 10,) for i in range(8))]
    with generator(bad, other, in_flight=1) as opened:
        # The server answers something between the tries of its only thread.
        bad_served, _ = opened._served
        original = bad_served.endpoint.complete

        def complete(request):
            try:
                return original(request)
            finally:
                bad_served.successes += 1

        bad_served.endpoint.complete = complete
        with pytest.raises(ServerError, match="kernel.*prompt 0 of its shard"):
            opened.generate([token_ids(p) for p in prompts], SAMPLING, 0, patient())


def test_a_server_that_has_nothing_left_to_do_waits_for_the_prompts_of_one_that_dies(serve):
    others_are_done = threading.Event()
    count = 0

    def answer(body, reply):
        nonlocal count
        count += 1
        if count == 9:
            others_are_done.set()
        return reply

    def die(body, reply):
        others_are_done.wait(10)
        time.sleep(0.05)  # the other server's reply arrives first
        dying.server.server_close()
        return None

    dying, other = serve(misbehave=die), serve(misbehave=answer)
    prompts = [(i + 10,) for i in range(10)]
    found = answers(dying, other, prompts=prompts, in_flight=1, on_done=patient())
    assert len(found) == 10


def test_a_generator_whose_servers_are_gone_says_so_each_time(serve):
    server = serve()
    with generator(server) as opened:
        server.close()
        for _ in range(2):
            with pytest.raises(ServerError, match="no generation server answers"):
                opened.generate([token_ids([5])], SAMPLING, 0, ignore)


def test_a_busy_server_is_waited_for_as_long_as_it_answers_something(serve):
    answered = threading.Semaphore(0)
    others = iter(range(40))

    def misbehave(body, reply):
        if body["prompt"] != [9]:
            answered.release()
            return reply
        # Each further try sees that another prompt has been answered.
        return reply if next(others) > 20 else (answered.acquire(), (503, {}))[1]

    prompts = [(9,), *((i + 10,) for i in range(60))]
    assert len(answers(serve(misbehave=misbehave), prompts=prompts, in_flight=2)) == 61


@by_first(
    ("status", "body"),
    [
        (400, {"error": {"message": "Token id 600 is out of vocabulary", "code": 400}}),
        (401, {"error": "Unauthorized"}),
        (404, {"object": "error", "message": "The model `m` does not exist."}),
        (422, {"detail": [{"msg": "field required"}]}),
    ],
)
def test_a_refused_prompt_ends_the_work_at_once(serve, status, body):
    server = serve(misbehave=lambda request, reply: (status, body))
    with refused(f"HTTP {status}", "prompt 0", "2 tokens", error=ServerError):
        answers(server)
    assert len(server.requests) == 1


@by_first(
    ("name", "misbehave", "parts"),
    [
        ("model", lambda b, r: r | {"model": "other"}, ["'other'", "'m'"]),
        ("none", lambda b, r: r | {"choices": []}, ["0 responses"]),
        ("two", lambda b, r: r | {"choices": r["choices"] * 2}, ["2 responses"]),
        ("no_choices", lambda b, r: {"model": "m"}, ["no responses"]),
        ("list", lambda b, r: [r], ["not a completion"]),
        ("text_only", change(token_ids=None), ["text only", "return_token_ids"]),
        ("ids", change(token_ids=["5", 6]), ["token_ids"]),
        ("true", change(token_ids=[True, 4]), ["token_ids"]),
        ("negative", change(token_ids=[-1, 4]), ["token_ids"]),
        ("prompt", change(prompt_token_ids=[1, 5, 6]), ["[1, 5, 6]", "[5, 6]"]),
        ("reason", change(finish_reason="content_filter"), ["'content_filter'"]),
        ("string", change(matched_stop="NaN happened"), ["'NaN happened'"]),
        ("no_stop", change(token_ids=[5, 2]), ["token 2", "[4]", "model.eos_token"]),
        ("empty", change(token_ids=[]), ["token none"]),
        ("goes_on", change(token_ids=[5, 4, 6, 4]), ["after the stop token 4"]),
        ("too_long", change(token_ids=[5] * 13, finish_reason="length"), ["13", "12"]),
        ("cut", change(token_ids=[5] * 3, finish_reason="length"), ["3 tokens", "max-model-len"]),
        ("no_logprobs", change(logprobs=None), ["generate.server.logprobs"]),
        ("few_logprobs", change(logprobs={"token_logprobs": [-1.0]}), ["log-prob for each"]),
        ("nan", change(logprobs={"token_logprobs": [-1.0, None, -1.0]}), ["NaN"]),
    ],
)
def test_a_wrong_reply_is_never_used(serve, name, misbehave, parts):
    server = serve(misbehave=misbehave)
    with refused(server.url, "prompt 0", *parts, error=ServerError):
        answers(server)
    assert len(server.requests) == 1


def test_a_server_that_does_not_echo_the_prompt_must_count_its_tokens(serve):
    hidden = change(prompt_token_ids=None)
    assert ids(answers(serve(misbehave=hidden))) == [[5, 6, 4]]

    def with_bos(body, reply):
        return hidden(body, reply) | {"usage": {"prompt_tokens": 3}}

    with refused("counts 3 prompt tokens", "2 were sent", error=ServerError):
        answers(serve(misbehave=with_bos))


def test_a_stop_token_at_the_limit_ends_a_response_whatever_the_server_calls_it(serve):
    server = serve(misbehave=change(finish_reason="length"))
    [found] = answers(server)
    assert (found.token_ids.tolist(), found.finish_reason) == ([5, 6, 4], "stop")


def test_log_probs_may_be_left_out(serve):
    [found] = answers(serve(misbehave=change(logprobs=None)), logprobs=False)
    assert found.server_logp is None


def test_another_model_is_refused_before_a_prompt_is_sent(serve):
    server = serve(model="/models/other")
    with refused("generate.server", "/models/other", "/models/theta"):
        answers(server, model="{model}")
    server.models = []
    with refused("no model", "theta-3"):
        answers(server, model="theta-{index}")
    assert not server.requests


def test_a_url_without_v1_says_so(serve):
    with refused("HTTP 404", "/v1", error=ServerError):
        answers(serve().url.removesuffix("/v1"))


def test_the_prompts_of_an_endpoint_that_dies_go_to_the_others(serve, capsys):
    dying, other = serve(), serve()
    begun = threading.Event()

    def die(body, reply):
        if begun.is_set():
            return None
        begun.set()
        dying.server.server_close()
        return reply

    dying.misbehave = die
    prompts = [(i + 5,) for i in range(50)]
    assert ids(answers(dying, other, prompts=prompts, in_flight=4)) == [[p, 4] for (p,) in prompts]
    assert 0 < len(other.requests) <= 50
    said = [line for line in capsys.readouterr().err.splitlines() if "no longer" in line]
    assert len(said) == 1
    assert dying.url in said[0]


def test_an_endpoint_that_is_not_there_is_left_out_and_asked_again_later(serve, capsys):
    other = serve()
    gone = closed_port()
    with generator(gone, other) as opened:
        assert ids(opened.generate([token_ids([5])], SAMPLING, 0, ignore)) == [[5, 4]]
        assert gone in capsys.readouterr().err
        back = GenerationServer(port=int(gone.rpartition(":")[2].removesuffix("/v1")))
        try:
            prompts = [token_ids([i + 5]) for i in range(40)]
            opened.generate(prompts, SAMPLING, 0, ignore)
            assert back.requests
        finally:
            back.close()
        assert "answers again" in capsys.readouterr().err


def test_no_endpoint_is_there():
    gone = closed_port(), closed_port()
    with refused(*gone, error=ServerError):
        answers(*gone)


def test_a_slow_server_has_time_until_the_timeout(serve):
    def slowly(body, reply):
        time.sleep(0.05)
        return reply

    assert ids(answers(serve(misbehave=slowly))) == [[5, 6, 4]]
    with refused("timed out", error=ServerError):
        answers(serve(misbehave=slowly), request_timeout=0.02)


def test_a_reply_that_comes_drop_by_drop_is_not_waited_for_forever(serve, monkeypatch):
    monkeypatch.setattr(tpaw.generation.server, "RETRIES", 0)
    server = serve(misbehave=lambda body, reply: time.sleep(600))
    drops = threading.Event()

    class Dripping(server.server.RequestHandlerClass):
        def do_POST(self):
            self.send_response(200)
            self.end_headers()
            while not drops.wait(0.01):
                self.wfile.write(b" ")

    server.server.RequestHandlerClass = Dripping
    began = time.monotonic()
    with refused("timed out", error=ServerError):
        answers(server, request_timeout=0.1)
    drops.set()
    assert time.monotonic() - began < 5


def test_a_stop_ends_open_requests_at_once(serve):
    released = threading.Event()

    def wait(body, reply):
        released.wait(30)
        return reply

    server = serve(misbehave=wait)
    calls = []

    def stop(count):
        calls.append(count)
        if len(server.requests) == 8:
            raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        answers(server, prompts=[(i + 5,) for i in range(20)], in_flight=8, on_done=stop)
    assert time.monotonic() - began < 5
    assert set(calls) == {0}  # nothing was finished; it was asked all the same
    released.set()
    while server.at_once or server.cut_off < 8:
        time.sleep(0.01)
        assert time.monotonic() - began < 20
    assert len(server.requests) == 8


def test_the_work_can_go_on_with_the_same_generator_after_a_stop(serve):
    server = serve()

    def stop(count):
        raise KeyboardInterrupt

    with generator(server) as opened:
        with pytest.raises(KeyboardInterrupt):
            opened.generate([token_ids([5])], SAMPLING, 0, stop)
        assert ids(opened.generate([token_ids([5])], SAMPLING, 0, ignore)) == [[5, 4]]


def test_threads_that_run_out_name_the_setting(serve, monkeypatch):
    def start(self):
        raise RuntimeError("can't start new thread")

    server = serve()
    with generator(server, in_flight=9) as opened:
        monkeypatch.setattr(threading.Thread, "start", start)
        with pytest.raises(MemoryShortageError, match="generate.server.in_flight: 9"):
            opened.generate([token_ids([5])], SAMPLING, 0, ignore)


def test_a_template_is_filled_once():
    player = Player(2, "/runs/{port} {index}/x", "f")
    fill = tpaw.generation.server._fill
    assert fill("{model}|{index}|{port}|{other}", player, port=7) == (
        "/runs/{port} {index}/x|2|7|{other}"
    )


def test_an_adapter_is_served_beside_its_base_and_the_base_alone_without_it(tmp_path):
    command = "serve {model} --port {port} --enable-lora --lora-modules={adapter}={adapter}"
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    below = Base(str(base), "f", "my-org/base")
    filled = tpaw.generation.server._filled_command
    assert filled(command, Player(1, str(adapter), "g", below), 80) == [
        *("serve", str(base), "--port", "80", "--enable-lora"),
        f"--lora-modules={adapter}={adapter}",
    ]
    alone = ["serve", str(base), "--port", "80", "--enable-lora"]
    assert filled(command, Player(0, str(base), "f", below), 80) == alone
    assert filled(command, Player(0, str(base), "f"), 80) == alone


def test_a_command_without_a_place_for_the_adapter_does_not_serve_the_base(tmp_path):
    player = Player(3, str(tmp_path / "a"), "g", Base(str(tmp_path / "b"), "f", "my-org/base"))
    with refused("generate.server.command", "θ_3", "{adapter}"):
        tpaw.generation.server._filled_command("serve {model} --port {port}", player, 80)


@pytest.mark.parametrize("status", [401, 403])
def test_a_wrong_key_is_named_at_once(serve, status):
    server = serve()
    server.models_status = status
    with refused("TPAW_SERVER_API_KEY", f"HTTP {status}", error=ServerError):
        answers(server)


THETA_0 = Player(0, "/models/base", "base")
BASE = Base("/models/base", "base", "my-org/base")
THETA_1, THETA_2, AGAIN = (
    Player(t, f"/runs/r/iterations/{t}/checkpoint", f"{c * 12}-more", BASE)
    for t, c in ((1, "a"), (2, "b"), (2, "c"))
)


def over_base(serve, players=(THETA_1, THETA_2), model="/models/base", **options):
    """A server of the base that may load the adapters of players."""
    folders = dict.fromkeys((player.path for player in players), 4)
    return serve(model=model, adapters={"folders": folders} | options)


def ask(servers, server, player, **settings):
    """Let a server answer a prompt as a player; the name of the model that it was asked for."""
    config = ServerConfig(endpoints=(server.url,), **settings)
    with servers.open(player, GenerateConfig(backend="server", server=config)) as opened:
        opened.generate([token_ids([5])], SAMPLING, 0, ignore)
    return server.requests[-1]["model"]


def test_an_endpoint_loads_the_adapter_of_each_player_and_unloads_the_one_before(serve):
    server = over_base(serve)
    with contextlib.closing(Servers()) as servers:
        assert ask(servers, server, THETA_0) == "/models/base"
        assert server.adapters.updates == []
        for player in (THETA_1, THETA_1, THETA_2):  # the same player twice in a row
            name = ask(servers, server, player)
            assert name == f"{player.path}@{player.fingerprint[:12]}"
            assert [card["id"] for card in server.models] == ["/models/base", name]
            assert server.models[1]["root"] == player.path
        assert [what for what, _ in server.adapters.updates] == ["load", "unload", "load"]
    assert [card["id"] for card in server.models] == ["/models/base"]


def test_an_adapter_that_was_trained_again_is_another_one(serve):
    """The run was killed, so its adapter is still there, and the iteration was trained again."""
    server = over_base(serve)
    first, again = ask(Servers(), server, THETA_2), ask(Servers(), server, AGAIN)
    assert first != again
    with contextlib.closing(Servers()) as servers:
        assert ask(servers, server, AGAIN) == again  # it is there, and need not be loaded
    assert server.adapters.updates == [("load", first), ("load", again), ("unload", again)]


def test_an_adapter_that_the_user_serves_is_not_loaded(serve):
    server = over_base(serve)
    server.models.append({"id": "theta-2", "owned_by": "vllm"})
    with contextlib.closing(Servers()) as servers:
        assert ask(servers, server, THETA_2, model="theta-{index}") == "theta-2"
    assert server.adapters.updates == []


@by_first(
    ("name", "model"),
    [("folder", "/models/base"), ("hub", "my-org/base"), ("named", "theta-0")],
)
def test_the_base_is_known_by_its_folder_its_name_or_the_name_of_theta_0(serve, name, model):
    server = over_base(serve, model=model)
    with contextlib.closing(Servers()) as servers:
        assert ask(servers, server, THETA_1, model="theta-{index}") == "theta-1@aaaaaaaaaaaa"


def test_the_base_is_not_taken_for_an_adapter_where_all_have_one_name(serve):
    server = over_base(serve, model="my-org/base")
    with contextlib.closing(Servers()) as servers:
        names = [ask(servers, server, p, model="my-org/base") for p in (THETA_0, THETA_1)]
    assert names == ["my-org/base", "my-org/base@aaaaaaaaaaaa"]
    server.models[0] = {"id": "m"}
    server.models.append({"id": "m-now", "parent": "m"})
    assert ask(Servers(), server, THETA_1, model="m-now") == "m-now"


def test_two_processes_that_load_an_adapter_at_once_both_use_it(serve, monkeypatch):
    server = over_base(serve)
    load = tpaw.generation.serving.Endpoint.load_adapter

    def load_twice(endpoint, *args):
        load(endpoint, *args)
        load(endpoint, *args)

    monkeypatch.setattr(tpaw.generation.serving.Endpoint, "load_adapter", load_twice)
    with contextlib.closing(Servers()) as servers:
        assert ask(servers, server, THETA_1).endswith("@aaaaaaaaaaaa")


def test_an_endpoint_that_came_back_loads_the_adapter_again(serve, capsys):
    folders = {"folders": {THETA_1.path: 4}}
    other, gone = over_base(serve), over_base(serve)
    gone.close()
    endpoints = ServerConfig(endpoints=(gone.url, other.url))
    with (
        contextlib.closing(Servers()) as servers,
        servers.open(THETA_1, GenerateConfig(backend="server", server=endpoints)) as opened,
    ):
        back = GenerationServer(port=gone.port, model="/models/base", adapters=folders)
        try:
            prompts = [token_ids([i + 5]) for i in range(40)]
            assert len(opened.generate(prompts, SAMPLING, 0, ignore)) == 40
            assert back.requests
        finally:
            servers.close()
            back.close()
    assert [what for what, _ in back.adapters.updates] == ["load", "unload"]


@by_first(
    ("name", "options", "parts"),
    [
        ("forbidden", {"allowed": False}, ["VLLM_ALLOW_RUNTIME_LORA_UPDATING", "--lora-modules"]),
        ("rank", {"largest_rank": 2}, ["HTTP 500", "LoRA rank 4", "--max-lora-rank"]),
        ("folder", {"folders": {}}, ["No adapter found", THETA_1.path, "must see this folder"]),
    ],
)
def test_an_adapter_that_a_server_does_not_load_is_named(serve, name, options, parts):
    server = over_base(serve, **options)
    with refused("generate.server", server.url, *parts):
        ask(Servers(), server, THETA_1)
    assert not server.requests


def test_an_adapter_is_not_loaded_over_another_base(serve):
    server = over_base(serve, model="/models/other")
    with refused("generate.server", "/models/other", THETA_1.path, "my-org/base"):
        ask(Servers(), server, THETA_1)
    assert server.adapters.updates == []


def test_an_error_in_a_thread_reaches_the_caller(serve, monkeypatch):
    def broken(*args, **kwargs):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(tpaw.generation.server, "completion_request", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        answers(serve())


def test_a_reply_whose_last_part_closes_the_connection(serve, monkeypatch):
    """As http.client does since Python 3.11.8 and 3.12.2, on every Python."""
    read1 = http.client.HTTPResponse.read1

    def closing(self, n=-1):
        part = read1(self, n)
        if not self.length and not self.isclosed():
            self._close_conn()
        return part

    monkeypatch.setattr(http.client.HTTPResponse, "read1", closing)
    answers(serve(), prompts=[(7, 8, 9)])
