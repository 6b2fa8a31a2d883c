"""A judge on this machine: a real HTTP server with /v1/chat/completions."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from builders import write_jsonl

ANSWERS = re.compile(
    r"----- request (\w+) -----\n(?P<request>.*)\n"
    r"----- answer A \1 -----\n(?P<a>.*)\n----- answer B \1 -----\n(?P<b>.*)\n----- end \1 -----",
    re.DOTALL,
)


def longer(question):
    """Prefers the longer answer, wherever it stands."""
    found = ANSWERS.search(question)
    a, b = len(found["a"]), len(found["b"])
    return f"I counted.\n[[{'A' if a > b else 'B' if b > a else 'C'}]]"


class JudgeServer:
    """Serves `reply(question)`: text, a pair of status and body, or a whole completion.

    A body that is a generator is sent part by part.

    Attributes:
        requests: bodies, in the order they came.
        headers: of each.
        most_at_once: the most requests that were being answered together.
    """

    def __init__(self, reply):
        self.reply = reply
        self.requests, self.headers = [], []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, answer = outer.answer(self.path, body, self.headers)
                in_parts = isinstance(answer, Iterator)
                if not in_parts:
                    answer = [answer if isinstance(answer, bytes) else json.dumps(answer).encode()]
                with contextlib.suppress(OSError):  # a client that was killed
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    if not in_parts:
                        self.send_header("Content-Length", str(len(answer[0])))
                    self.end_headers()
                    for part in answer:
                        self.wfile.write(part)
                    self.close_connection = in_parts

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, path, body, headers):
        if path != "/v1/chat/completions":
            return 404, {"error": {"message": "no such path"}}
        with self.lock:
            self.requests.append(body)
            self.headers.append({name.lower(): value for name, value in headers.items()})
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            found = self.reply(body["messages"][-1]["content"])
        finally:
            with self.lock:
                self.at_once -= 1
        if isinstance(found, tuple):
            return found
        return 200, completion(found) if isinstance(found, str) else found

    def close(self):
        self.server.shutdown()
        self.server.server_close()


def completion(text, finish_reason="stop"):
    message = {"role": "assistant", "content": text}
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "judge-2026-01-01",
        "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    }


def answers(path, *texts, name=None, instructions=None):
    """A file of answers."""
    rows = [
        {"instruction": instruction, "output": text, "generator": name or path.stem}
        for instruction, text in zip(instructions or "pqrstuvw", texts, strict=False)
    ]
    return write_jsonl(path, rows)


def ask(tpaw_, server, a, b, *more):
    """Run `tpaw judge`; gives the exit code, stdout and stderr."""
    url = server if isinstance(server, str) else server.url
    return tpaw_("judge", a, b, "--endpoint", url, "--model", "j", *more)


def results(tmp_path, folder="judgements/a-vs-b"):
    """What results.json holds."""
    return json.loads((tmp_path / folder / "results.json").read_text())
