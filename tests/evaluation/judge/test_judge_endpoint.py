"""`tpaw judge` and an endpoint that fails, refuses, is slow, or is gone."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time

import pytest
from fork_server import CLI, Forked
from judge_server import JudgeServer, ask, completion, longer, results
from messages import complains, says


def test_what_may_pass_is_tried_again(tpaw_, serve, six, tmp_path, monkeypatch):
    monkeypatch.setattr("tpaw.evaluation.judge.endpoint.RETRIES", 2)
    failures = [(503, {"error": "busy"}), (429, {"error": "slow down"})]
    server = serve(lambda question: failures.pop() if failures else longer(question))
    assert ask(tpaw_, server, *six, "--parallel", 1)[0] == 0
    assert len(server.requests) == 12
    assert results(tmp_path)["wins"] == 3


def test_a_judge_that_fails_midway_is_asked_the_rest_later(tpaw_, serve, six, tmp_path):
    count = iter(range(100))
    flaky = serve(lambda question: longer(question) if next(count) < 4 else (500, {}))
    code, _, err = ask(tpaw_, flaky, *six, "--parallel", 1)
    assert code == 3
    complains(err, flaky.url, 500)
    assert len(flaky.requests) in (5, 6)  # one may be under way
    assert not (tmp_path / "judgements/a-vs-b/results.json").exists()
    well = serve(longer)
    assert ask(tpaw_, well, *six)[0] == 0
    assert len(well.requests) == 6
    assert results(tmp_path)["wins"] == 3


def test_nobody_there(tpaw_, serve, six, monkeypatch):
    monkeypatch.setattr("tpaw.evaluation.judge.endpoint.RETRIES", 1)
    gone = JudgeServer(longer)
    gone.close()
    code, _, err = ask(tpaw_, gone.url, *six)
    assert code == 3
    complains(err, gone.url, hide={"number": re.compile(r"(?<=Errno )\d+")})


@pytest.mark.parametrize(
    "url",
    ["http://me:SESAME@{host}/v1", "http://{host}/v1?key=SESAME", "me:SESAME@{host}/v1"],
)
def test_a_key_in_the_url_is_not_shown(tpaw_, serve, six, url, monkeypatch):
    monkeypatch.setattr("tpaw.evaluation.judge.endpoint.RETRIES", 0)
    server = serve(lambda question: (401, {"error": {"message": "wrong key"}}))
    host = server.url.removeprefix("http://").removesuffix("/v1")
    code, out, err = ask(tpaw_, url.format(host=host), *six)
    assert code in (2, 3)
    assert host in err
    assert "SESAME" not in out + err


@pytest.mark.parametrize(
    ("reply", "part"),
    [
        ((401, {"error": {"message": "bad \x1b[31mkey"}}), r"bad \x1b[31mkey"),
        ((404, {"error": {"message": "no such model"}}), "no such model"),
        ((400, {"error": {"message": "no such parameter"}}), "no such parameter"),
        ((200, b"<html>hello</html>"), ""),
        ({"object": "list", "data": []}, ""),
        (completion(None) | {"choices": []}, ""),
    ],
    ids=["key", "model", "request", "html", "other-json", "no-choice"],
)
def test_an_endpoint_that_refuses_everything(tpaw_, serve, six, reply, part):
    server = serve(lambda question: reply)
    code, _, err = ask(tpaw_, server, *six, "--parallel", 1)
    assert code == 3
    complains(err, server.url, part, hide={"reason": re.compile("(?<=reply: ).*")})
    assert len(server.requests) <= 9  # one may be under way


def test_a_question_that_is_refused_alone_is_invalid(tpaw_, serve, six, tmp_path):
    def reply(question):
        return (400, {"error": "too long"}) if "aaaaa" in question else longer(question)

    server = serve(reply)
    assert ask(tpaw_, server, *six)[0] == 0
    found = results(tmp_path)
    assert found["invalid"] == 1
    assert found["invalid_replies"] == {"refused": 2}
    assert found["win_rate"] == pytest.approx(3 / 5)
    assert ask(tpaw_, server, *six)[0] == 0
    assert len(server.requests) == 12  # asked again: another endpoint may take it


def test_a_malformed_reply_is_asked_again_and_then_invalid(
    tpaw_, serve, six, tmp_path, monkeypatch
):
    monkeypatch.setattr("tpaw.evaluation.judge.endpoint.MALFORMED_RETRIES", 2)
    monkeypatch.setattr("tpaw.evaluation.judge.endpoint.time.sleep", lambda seconds: None)
    once = [completion(None) | {"choices": []}, (200, b"<html>")]

    def reply(question):
        if "aaaaa" in question:  # every time
            return completion(["[[A]]"])
        return once.pop() if once else longer(question)

    server = serve(reply)
    code, _, err = ask(tpaw_, server, *six, "--parallel", 1)
    assert code == 0, err
    assert len(server.requests) == 10 + 2 + 2 * 2
    found = results(tmp_path)
    assert found["invalid_replies"] == {"malformed": 2}
    assert (found["wins"], found["losses"], found["invalid"]) == (2, 1, 1)
    well = serve(longer)
    assert ask(tpaw_, well, *six)[0] == 0
    assert len(well.requests) == 2  # not kept
    assert results(tmp_path)["invalid"] == 0


def test_a_reply_that_trickles_has_a_limit(tpaw_, serve, six, monkeypatch):
    monkeypatch.setattr("tpaw.evaluation.judge.endpoint.SECONDS_PER_TRY", 0.3)
    sent, ended = [], threading.Event()

    def trickle():
        for _ in range(1000):
            sent.append(1)
            yield b" "
            if ended.wait(0.02):
                return

    server = serve(lambda question: (200, trickle()))
    started = time.monotonic()
    code, _, err = ask(tpaw_, server, *six, "--parallel", 1)
    took = time.monotonic() - started
    ended.set()
    assert code == 3
    complains(err, server.url, 0.3)
    assert 0.3 < took < 10
    assert len(sent) < 900


def test_the_replies_may_be_shared(tmp_path):
    """Several write the same keys at the same time; nobody sees half a file."""
    from tpaw.evaluation.judge.endpoint import Reply
    from tpaw.evaluation.judge.replies import Replies

    start, errors = threading.Barrier(4), []

    def work():
        replies = Replies(tmp_path / "replies")
        start.wait()
        try:
            for i in range(60):
                replies.put(f"{i:064}", Reply(str(i), "stop", "j"))
                assert replies.get(f"{i:064}") == Reply(str(i), "stop", "j")
        except Exception as error:
            errors.append(error)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert errors == []
    assert not list(tmp_path.rglob(".tmp-*"))


def test_as_many_at_once_as_asked_for(tpaw_, serve, six):
    barrier = threading.Barrier(2)

    def reply(question):
        barrier.wait(timeout=20)
        return longer(question)

    server = serve(reply)
    assert ask(tpaw_, server, *six, "--parallel", 2)[0] == 0
    assert server.most_at_once == 2


def test_stopped_by_a_signal(tpaw_, serve, six):
    count = iter(range(100))

    def reply(question):
        if next(count) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return longer(question)

    server = serve(reply)
    code, _, err = ask(tpaw_, server, *six, "--parallel", 1)
    assert code == 143
    says(err.splitlines()[-1])
    asked = len(server.requests)
    assert 3 <= asked < 10
    assert ask(tpaw_, server, *six)[0] == 0
    assert len(server.requests) == 10


def test_asked_twice_to_stop_awaits_nobody(tpaw_, serve, six):
    ended = threading.Event()

    def reply(question):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
        ended.wait(60)
        return longer(question)

    started = time.monotonic()
    server = serve(reply)
    code, _, err = ask(tpaw_, server, *six, "--parallel", 1)
    ended.set()
    assert code == 130
    says(err, "SIGINT")
    assert len(server.requests) == 1
    assert time.monotonic() - started < 30


@pytest.mark.process
@pytest.mark.usefixtures("forks")
def test_a_kill_costs_the_requests_under_way(tpaw_, serve, six, tmp_path):
    hangs, count = threading.Event(), iter(range(100))

    def reply(question):
        if next(count) >= 3:
            hangs.set()
            threading.Event().wait(30)
        return longer(question)

    stuck = serve(reply)
    arguments = [*six, "--endpoint", stuck.url, "--model", "j", "--parallel", "1"]
    process = Forked(CLI, "judge", *arguments, out=tmp_path / "killed.txt")
    assert hangs.wait(60)
    process.kill()
    process.wait()
    server = serve(longer)
    assert ask(tpaw_, server, *six)[0] == 0
    assert len(server.requests) == 7


def test_a_key_is_sent_only_where_one_is_named(tpaw_, serve, six, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    server = serve(longer)
    ask(tpaw_, server, *six)
    assert all("secret" not in json.dumps(headers) for headers in server.headers)
    assert all("authorization" not in headers for headers in server.headers)
    monkeypatch.setenv("MY_KEY", "my-secret")
    ask(tpaw_, server, *six, "--key-env", "MY_KEY", "--max-tokens", 7, "-o", "again")
    assert server.headers[-1]["authorization"] == "Bearer my-secret"
    assert "secret" not in "".join(
        p.read_text() for p in (six[0].parent).rglob("*.json*") if p.is_file()
    )
