"""Processes that begin with every import done: a server forks them, so each starts at once.

    python fork_server.py SOCKET

The server only imports. It computes nothing, so no thread pool is lost in a fork. It ends, and its
children with it, when its standard input is closed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

PRELOADED = (
    "transformers.trainer",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.llama.modeling_llama",
    "trl",
    "trl.trainer.sft_trainer",
    "tpaw.cli.main",
    "tpaw.evaluation.heldout",
    "tpaw.pipeline.stages",
    "tpaw.selfplay",
    "tpaw.study.runner",
    "tpaw.training.trainer",
)
# What the command line sets before its own imports.
QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
}
CLI = "tpaw.cli.main:main"


class Forked:
    """A process that calls a function of a module; its methods are those of subprocess.Popen.

    Attributes:
        out: the file of what it prints.
        err: the same file, or one of its own.
    """

    def __init__(self, call, *arguments, out, err=None, env=None):
        self.out, self.err = Path(out), Path(err or out)
        self.returncode = None
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(os.environ["FORK_SERVER"])
        request = {
            "call": call,
            "argv": [call, *map(str, arguments)],
            "files": [str(self.out.absolute()), str(self.err.absolute())],
            "env": os.environ | (env or {}),
            "cwd": os.getcwd(),
        }
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        self._lines = self._socket.makefile()
        self.pid = int(self._lines.readline())

    def poll(self):
        """The exit code; None while the process runs."""
        if self.returncode is None and select.select([self._socket], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self, timeout=None):
        """The exit code, once there is one."""
        if self.returncode is None:
            if not select.select([self._socket], [], [], timeout)[0]:
                raise TimeoutError(f"{self.pid} runs for more than {timeout} seconds")
            self.returncode = int(self._lines.readline())
            self._lines.close()
            self._socket.close()
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


@contextlib.contextmanager
def fork_server():
    """Start a server; gives its socket and its process id."""
    with tempfile.TemporaryDirectory(prefix="forks-") as folder:
        path = f"{folder}/socket"
        server = subprocess.Popen(
            [sys.executable, __file__, path],
            stdin=subprocess.PIPE,
            env=os.environ | QUIET | {"PYTHONPATH": os.pathsep.join(sys.path)},
            start_new_session=True,
        )
        while not os.path.exists(path):
            assert server.poll() is None
            time.sleep(0.01)
        yield path, server.pid
        server.stdin.close()
        server.wait()


def run_child(call, out, err):
    """Call a function in this forked process, and append what it prints to files; never returns."""
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, file in enumerate((out, err), start=1):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        # The encodings of the parent process depend on where it was started.
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(  # noqa: SIM115
            2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False
        )
        call()
        code = 0
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def called(request):
    """What a client of the server asked for."""
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv = request["argv"]
    module, _, name = request["call"].partition(":")
    getattr(importlib.import_module(module), name)()


def serve(path):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path + ".new")
    listener.listen()
    os.rename(path + ".new", path)
    clients = {}  # process id -> the connection that waits for its end
    while True:
        ready = select.select([listener, sys.stdin], [], [], 0.01)[0]
        if sys.stdin in ready:  # the tests have ended
            break
        if listener in ready:
            client, _ = listener.accept()
            request = json.loads(client.makefile().readline())
            pid = os.fork()
            if pid == 0:
                for other in (listener, client, *clients.values()):
                    other.close()
                run_child(functools.partial(called, request), *request["files"])
            clients[pid] = client
            client.sendall(b"%d\n" % pid)
        while clients:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            with clients.pop(pid) as client, contextlib.suppress(OSError):  # one that was killed
                client.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
    for pid in clients:
        os.kill(pid, signal.SIGKILL)
    os._exit(0)  # there is nothing to tidy up, and doing so takes a second


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # as QUIET
    for name in PRELOADED:  # one that is not there is imported by whoever needs it
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    serve(sys.argv[1])
