"""A generation server on this machine: /v1/models and /v1/completions, as vLLM answers them.

    python generation_server.py --port 8000 --model NAME [--mode MODE]

As a program it answers every prompt with `echo` and may misbehave as a whole (see MODES). In a test
its class misbehaves reply by reply. It imports the standard library alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MODES = ("well", "never", "ends", "hangs", "stubborn", "parent", "dies")


def echo(prompt, seed):
    """The prompt once more, then token 4."""
    return [*prompt, 4]


def completion(body, emitted):
    """A right reply: the ids are cut after the first stop token or at max_tokens."""
    kept, reason = [], "length"
    for token in emitted[: body["max_tokens"]]:
        kept.append(token)
        if token in body["stop_token_ids"]:
            reason = "stop"
            break
    choice = {
        "index": 0,
        "text": " ".join(map(str, kept)),
        "logprobs": None,
        "finish_reason": reason,
        "stop_reason": kept[-1] if reason == "stop" else None,
        "token_ids": kept,
        "prompt_token_ids": body["prompt"],
    }
    if body["logprobs"] is not None:
        choice["logprobs"] = {"token_logprobs": [-0.5] * len(kept)}
    usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": len(kept)}
    return {"model": body["model"], "choices": [choice], "usage": usage}


class Adapters:
    """vLLM's adapters: what it answers to requests to load and to unload them.

    Args:
        models: the cards of /v1/models.
        folders: adapters that can be loaded.
        largest_rank: the ranks of others are larger.
        allowed: whether adapters may be loaded while the server runs.
    """

    def __init__(self, models, folders=(), largest_rank=16, allowed=True):
        self.models, self.folders, self.largest_rank = models, dict(folders), largest_rank
        self.allowed = allowed
        self.updates = []

    def update(self, path, body):
        """Status and body of the reply; None for another path."""
        what = path.removeprefix("/v1/").removesuffix("_lora_adapter")
        if what not in ("load", "unload"):
            return None
        if not self.allowed:
            return 404, {"detail": "Not Found"}
        name, names = body["lora_name"], [card["id"] for card in self.models]
        self.updates.append((what, name))
        if what == "unload":
            if name not in names:
                return self.error(404, f"The lora adapter '{name}' cannot be found.")
            self.models[:] = [card for card in self.models if card["id"] != name]
            return 200, f"Success: LoRA adapter '{name}' removed successfully.".encode()
        folder = body["lora_path"]
        if name in names:
            return self.error(400, f"The lora adapter '{name}' has already been loaded.")
        if folder not in self.folders:
            return self.error(404, f"Loading lora {name} failed: No adapter found for {folder}")
        if (rank := self.folders[folder]) > self.largest_rank:
            return self.error(
                500, f"LoRA rank {rank} is greater than max_lora_rank {self.largest_rank}."
            )
        card = {"id": name, "owned_by": "vllm", "root": folder, "parent": names[0]}
        self.models.append(card)
        return 200, f"Success: LoRA adapter '{name}' added successfully.".encode()

    @staticmethod
    def error(status, message):
        return status, {"error": {"message": message, "code": status}}


class GenerationServer:
    """Serves `answer(prompt, seed)`, which returns the ids that the model emits.

    Args:
        answer: gives more ids than fit.
        misbehave: called with the body and a right reply. It gives what is sent instead: a mapping,
            or a status, a body and headers, or None to close the connection in the middle of the
            reply. It may wait.
        model: name of the model that is served.
        adapters: options of `Adapters`; by default none can be loaded.

    Attributes:
        requests: bodies, in the order they came.
        keys: the Authorization header of each request.
        cut_off: how many clients were gone when their reply was ready.
        most_at_once: the most requests that were being answered together.
    """

    def __init__(
        self, answer=echo, misbehave=None, model="m", owned_by="vllm", port=0, adapters=None
    ):
        self.answer = answer
        self.misbehave = misbehave or (lambda body, reply: reply)
        self.models_status = 200
        self.models = [{"id": model, "owned_by": owned_by}]
        self.adapters = Adapters(
            self.models, **({"allowed": False} if adapters is None else adapters)
        )
        self.requests, self.keys = [], []
        self.at_once = self.most_at_once = self.cut_off = 0
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.keys.append(self.headers.get("Authorization"))
                if self.path == "/v1/models":
                    self.send(outer.models_status, {"object": "list", "data": outer.models})
                else:
                    self.send(404, {"detail": "Not Found"})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.keys.append(self.headers.get("Authorization"))
                with outer.lock:
                    updated = outer.adapters.update(self.path, body)
                if updated is not None:
                    self.send(*updated)
                    return
                with outer.lock:
                    outer.requests.append(body)
                    outer.at_once += 1
                    outer.most_at_once = max(outer.most_at_once, outer.at_once)
                try:
                    right = completion(body, outer.answer(body["prompt"], body["seed"]))
                    sent = outer.misbehave(body, right)
                finally:
                    with outer.lock:
                        outer.at_once -= 1
                if sent is None:
                    self.reset()
                elif isinstance(sent, tuple):
                    self.send(*sent)
                else:
                    self.send(200, sent)

            def send(self, status, body, headers=()):
                content = body if isinstance(body, bytes) else json.dumps(body).encode()
                try:
                    if is_gone(self.connection):
                        raise ConnectionError
                    self.send_response(status)
                    for name, value in headers:
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                except OSError:
                    outer.cut_off += 1

            def reset(self):
                """Send a part of the reply, then a reset."""
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b'{"model": ')
                self.wfile.flush()
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.connection.close()

            def finish(self):
                with contextlib.suppress(OSError, ValueError):
                    super().finish()

            def log_message(self, *args):
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 256  # otherwise a client waits a second for its connection

        self.server = Server(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


def is_gone(connection):
    """Whether the client has closed its end."""
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--mode", choices=MODES, default="well")
    parser.add_argument("--pids", help="File that gets the process ids, one a line.")
    args = parser.parse_args()
    pids = [os.getpid()]
    if args.mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if args.mode in ("stubborn", "parent"):
        pids.append(subprocess.Popen(["sleep", "600"]).pid)
    print(f"loading {args.model}", flush=True)
    if args.mode == "never":
        print("still compiling", file=sys.stderr, flush=True)
    if args.pids:
        with open(args.pids, "a") as file:
            file.write("".join(f"{pid}\n" for pid in pids))
    if args.mode == "never":
        pass
    elif args.mode == "ends":
        print("RuntimeError: CUDA out of memory", *["\nbye"] * 40, file=sys.stderr, flush=True)
        sys.exit(7)
    else:
        server = GenerationServer(port=args.port, model=args.model)
        if args.mode == "dies":
            server.misbehave = lambda body, reply: os._exit(9)
        if args.mode == "hangs":
            server.misbehave = lambda body, reply: time.sleep(600)
    while True:
        time.sleep(60)


if __name__ == "__main__":
    main()
