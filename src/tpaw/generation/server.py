"""Generation by servers: vLLM, SGLang, or another OpenAI-compatible server with token ids.

`ServerGenerator` spreads the prompts over the endpoints. `Servers` starts a server for a player, or
uses endpoints that are there, and checks that they serve the player.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shlex
import shutil
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np

from tpaw.config.schema import GenerateConfig, ServerConfig
from tpaw.data.token_ids import TokenIds
from tpaw.errors import InputError, ServerError, brief, for_terminal, printable
from tpaw.generation.completion_api import WrongReply, completion_request, read_completion
from tpaw.generation.endpoint import Endpoint, Refused, Unavailable
from tpaw.generation.generator import Completion, Generator, SamplingParams
from tpaw.generation.serving import (
    API_KEY,
    SECONDS_TO_LIST_MODELS,
    Served,
    Wanted,
    explain_a_wrong_key,
    serving,
)
from tpaw.runtime.memory import memory_limited_by
from tpaw.runtime.process_group import ProcessGroup
from tpaw.runtime.progress import OnDone, note
from tpaw.team import Player

# Tries after the first one. They wait 0.5 s, then twice as long each time up to 8 s, with jitter:
# about 25 s in all.
RETRIES = 6
FIRST_WAIT = 0.5
LONGEST_WAIT = 8.0
# A server's own Retry-After is believed up to this.
LONGEST_ASKED_WAIT = 60.0
# How often a caller that waits can stop, in seconds.
SECONDS_BETWEEN_LOOKS = 0.25
# Threads that do not end in this time, because they connect, are left alone.
SECONDS_TO_END = 1.0
# How often a server is started that another program took the port from.
STARTS = 3
LINES_OF_LOG = 30
ERROR = re.compile(r"\b\w*(Error|Exception)\b: ")


@dataclass(eq=False)
class _Row:
    """A prompt that has no response yet.

    Attributes:
        number: its place in the shard.
        failed_at: endpoints that answer other prompts, but not this one; and why.
    """

    number: int
    prompt: TokenIds
    failed_at: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"prompt {self.number} of its shard, {len(self.prompt)} tokens"


class ServerGenerator:
    """A `Generator` that asks servers.

    Each prompt has its own seed, so its response does not depend on the prompts beside it as far as
    the server's arithmetic does not. The same seed need not give the same response twice.

    Args:
        served: the endpoints. They serve the same player.
        config: the section `generate.server` of the configuration.
        check: called a few times a second while nothing is finished. It may raise to stop the work.
    """

    def __init__(
        self,
        served: Sequence[Served],
        config: ServerConfig,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._served = served
        self._config = config
        self._check = check

    def generate(
        self,
        prompts: Sequence[TokenIds],
        params: SamplingParams,
        seed: int,
        on_done: OnDone,
        first: int = 0,
    ) -> list[Completion]:
        """See `Generator.generate`. If `on_done` raises, open requests are ended at once.

        Args:
            prompts, params, seed, on_done: see there. `on_done` is also called with 0.
            first: place of the first prompt, where the prompts are a part of a longer list.

        Raises:
            ServerError: no endpoint answers, an endpoint refuses a prompt, or a reply is wrong.
        """
        for served in self._served:
            if served.failure is not None:
                served.revive()
        asked = _asked(self._served)
        work = _Work(self._served, prompts)

        def ask(row: _Row, at: Served) -> Completion:
            request = completion_request(
                row.prompt,
                params,
                seed=_row_seed(seed, first + row.number),
                model=at.model,
                logprobs=self._config.logprobs,
                ignores_eos=at.ignores_eos,
            )
            return read_completion(
                at.endpoint.complete(request),
                row.prompt,
                params,
                model=at.model,
                logprobs=self._config.logprobs,
            )

        threads = [
            threading.Thread(target=work.serve, args=(served, ask), daemon=True)
            for served in asked
            for _ in range(min(self._config.in_flight, len(prompts)))
        ]
        found: dict[int, Completion] = {}
        try:
            with memory_limited_by("generate.server.in_flight", self._config.in_flight):
                for thread in threads:
                    thread.start()
            while len(found) < len(prompts):
                try:
                    result = work.finished.get(timeout=SECONDS_BETWEEN_LOOKS)
                except Empty:
                    self._check()
                    on_done(0)
                    continue
                if isinstance(result, BaseException):
                    self._check()  # a server that has ended is the better explanation
                    raise result
                number, completion = result
                found[number] = completion
                on_done(1)
        finally:
            work.stop()
            self._end(threads)
        return [found[number] for number in range(len(prompts))]

    def _end(self, threads: Sequence[threading.Thread]) -> None:
        deadline = time.monotonic() + SECONDS_TO_END
        while any(t.is_alive() for t in threads) and time.monotonic() < deadline:
            for served in self._served:
                served.endpoint.abort()  # again, because a thread may have connected meanwhile
            time.sleep(0.01)


class _Work:
    """The prompts of one call of `generate`, shared by the threads that ask the endpoints.

    Attributes:
        finished: for the caller: the number and the response of a prompt, or an error that ends the
            work.
    """

    def __init__(self, served: Sequence[Served], prompts: Sequence[TokenIds]) -> None:
        self.finished: SimpleQueue[tuple[int, Completion] | BaseException] = SimpleQueue()
        self._served = served
        self._waiting = deque(_Row(number, prompt) for number, prompt in enumerate(prompts))
        self._left = len(prompts)
        self._changed = threading.Condition()
        self._stopped = threading.Event()
        self._random = random.Random()

    def stop(self) -> None:
        """Let every thread end after its request."""
        self._stopped.set()
        with self._changed:
            self._changed.notify_all()

    def serve(self, served: Served, ask: Callable[[_Row, Served], Completion]) -> None:
        """Ask one endpoint for one response after the other, until there is nothing left to ask."""
        try:
            while (row := self._take(served)) is not None:
                self._answer(row, served, ask)
        except BaseException as error:
            self.finished.put(error)

    def _take(self, served: Served) -> _Row | None:
        with self._changed:
            while not self._stopped.is_set() and self._left and served.failure is None:
                for row in self._waiting:
                    if served.endpoint.url not in row.failed_at:
                        self._waiting.remove(row)
                        return row
                self._changed.wait()  # another endpoint may give a row back
            return None

    def _answer(self, row: _Row, served: Served, ask: Callable[[_Row, Served], Completion]) -> None:
        began = served.successes
        tries = 0
        while not self._stopped.is_set():
            if served.failure is not None:  # another thread found out
                self._give_back(row)
                return
            try:
                completion = ask(row, served)
            except Unavailable as error:
                if error.is_busy and served.successes > began:
                    began, tries = served.successes, 0  # it works through what it has
                tries += 1
                if tries > RETRIES:
                    self._give_up(row, served, str(error), answers_others=served.successes > began)
                    return
                self._stopped.wait(self._seconds_to_wait(tries, error.wait))
            except (Refused, WrongReply) as error:
                where = "" if isinstance(error, Refused) else f"{served.endpoint.url}: "
                raise ServerError(f"{where}{error} ({row})") from None
            else:
                with self._changed:
                    served.successes += 1
                    self._left -= 1
                    if not self._left:
                        self._changed.notify_all()
                self.finished.put((row.number, completion))
                return

    def _give_up(self, row: _Row, served: Served, why: str, *, answers_others: bool) -> None:
        """An endpoint has not answered a row after all tries: leave the row to the others."""
        if answers_others:
            row.failed_at[served.endpoint.url] = why
        elif served.failure is None:
            served.failure = why
            note(f"{served.endpoint.url} does not answer and is no longer asked: {why}")
        self._give_back(row)

    def _give_back(self, row: _Row) -> None:
        """Let another endpoint take the row.

        Raises:
            ServerError: there is none for this row, or for one that waits.
        """
        with self._changed:
            self._waiting.appendleft(row)
            asked = _asked(self._served)
            for waiting in self._waiting:
                if all(served.endpoint.url in waiting.failed_at for served in asked):
                    why = waiting.failed_at[asked[0].endpoint.url]
                    raise ServerError(f"{why} ({waiting}); other prompts are answered")
            self._changed.notify_all()

    def _seconds_to_wait(self, tries: int, asked: float) -> float:
        wait: float = min(FIRST_WAIT * 2 ** (tries - 1), LONGEST_WAIT)
        # Threads that failed together must not try again together.
        wait *= 0.5 + 0.5 * self._random.random()
        return max(wait, min(asked, LONGEST_ASKED_WAIT))


def _asked(served: Sequence[Served]) -> list[Served]:
    """The endpoints that answer.

    Raises:
        ServerError: there is none.
    """
    asked = [s for s in served if s.failure is None]
    if not asked:
        reasons = "".join(f"\n  {s.failure}" for s in served)
        raise ServerError(f"no generation server answers:{reasons}")
    return asked


def _row_seed(seed: int, number: int) -> int:
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0])


class Servers:
    """Opens generators for players. Its method `open` is an `OpenGenerator`.

    A server that was started for a player runs on after the generator is closed, because the next
    stage often needs the same player. It ends when another player is opened and in `close`. Call
    `close` before this process needs the memory.

    Args:
        check: called a few times a second while a server starts or works. It may raise.
    """

    def __init__(self, check: Callable[[], None] = lambda: None) -> None:
        self._check = check
        self._started: tuple[tuple[str, str], _StartedServer] | None = None
        self._used: list[Served] = []  # endpoints that may have an adapter of ours

    @contextlib.contextmanager
    def open(self, player: Player, config: GenerateConfig) -> Iterator[Generator]:
        """Start a server for the player, or check that the endpoints serve it.

        Raises:
            InputError: a server serves another model, or the command cannot be started.
            ServerError: no endpoint answers, or the server ends or does not get ready.
        """
        server = config.server
        wanted = _wanted(server, player)
        if server.command is None:
            yield ServerGenerator(self._served(server, wanted), server, self._check)
            return
        started = self._start(player, server)
        try:
            yield ServerGenerator([serving(started.endpoint, wanted)], server, started.check)
        except BaseException as error:
            if isinstance(error, ServerError):
                started.keep_log()
            self.close()  # whatever was wrong, the next try starts from nothing
            raise

    def close(self) -> None:
        """End the server that runs, if there is one, and unload what endpoints have loaded."""
        if self._started is not None:
            (_, started), self._started = self._started, None
            started.close()
        self._unload()

    def _unload(self, but: Wanted | None = None) -> None:
        for served in self._used:
            if served.wanted != but:
                served.unload()
        self._used = []

    def _served(self, server: ServerConfig, wanted: Wanted) -> list[Served]:
        self._unload(but=wanted)
        for url in server.endpoints:
            endpoint = Endpoint(url, os.environ.get(API_KEY), server.request_timeout)
            try:
                self._used.append(serving(endpoint, wanted))
            except ServerError as error:
                note(f"{error}; the other endpoints are asked")
                self._used.append(Served(endpoint, wanted, failure=str(error)))
            self._check()
        _asked(self._used)
        return self._used

    def _start(self, player: Player, server: ServerConfig) -> _StartedServer:
        assert server.command is not None
        key = (player.fingerprint, server.command)
        if self._started is not None and self._started[0] == key and self._started[1].is_running:
            return self._started[1]
        self.close()
        for start in range(1, STARTS + 1):
            started = _StartedServer(player, server, self._check)
            try:
                started.wait_until_ready()
            except _PortTaken:
                started.close()
                if start == STARTS:
                    raise
            except BaseException:
                started.close()
                raise
            else:
                self._started = key, started
                break
        assert self._started is not None
        return self._started[1]


class _PortTaken(ServerError):
    """Another program has taken the port before the server could."""


class _StartedServer:
    """A server that runs for one player."""

    def __init__(self, player: Player, server: ServerConfig, check: Callable[[], None]) -> None:
        assert server.command is not None
        self._timeout = server.start_timeout
        self._check_stop = check
        self._name = f"the server of θ_{player.index}"
        self._port = _free_port()
        command = _filled_command(server.command, player, self._port)
        handle, name = tempfile.mkstemp(prefix=f"tpaw-server-{player.index}-", suffix=".log")
        os.close(handle)
        self._log = Path(name)
        url = f"http://127.0.0.1:{self._port}/v1"
        self.endpoint = Endpoint(url, os.environ.get(API_KEY), server.request_timeout)
        self._failed = False
        try:
            self._process = ProcessGroup(command, self._log, "generate.server.command")
        except BaseException:
            self._log.unlink()
            raise
        note(f"{self._name} starts; its log: {self._log}")

    @property
    def is_running(self) -> bool:
        """Whether the process has not ended."""
        return self._process.exit_code is None

    def check(self) -> None:
        """Raise if a stop was asked for, or if the server has ended.

        Raises:
            ServerError: with the end of the server's log.
        """
        self._check_stop()
        code = self._process.exit_code
        if code is not None:
            self._failed = True
            raise ServerError(f"{self._name} ended with exit code {code}.\n{self._end_of_log()}")

    def wait_until_ready(self) -> None:
        """Wait until the server lists its models.

        Raises:
            ServerError: it ended, or was not ready in time; with the end of its log.
            Interrupted: a stop was asked for.
        """
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                self.check()
                self.endpoint.models(min(SECONDS_TO_LIST_MODELS, self._timeout))
                self.check()  # whoever answered, it was not a server that has ended
                return
            except (Unavailable, Refused) as error:
                explain_a_wrong_key(error)
                last = str(error)
            except ServerError as error:
                if _is_taken(self._port):
                    raise _PortTaken(
                        f"port {self._port} was taken by another program: {error}"
                    ) from None
                raise
            if time.monotonic() > deadline:
                self._failed = True
                raise ServerError(
                    f"{self._name} was not ready after {self._timeout:g} s "
                    f"(generate.server.start_timeout): {last}.\n{self._end_of_log()}"
                )
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def keep_log(self) -> None:
        """Keep the log, because the server has failed, and say where it is."""
        if not self._failed:
            self._failed = True
            note(f"{self._name} failed; its log: {self._log}")

    def close(self) -> None:
        """End the server. Its log is kept if it failed."""
        self._process.stop()
        if not self._failed:
            self._log.unlink(missing_ok=True)

    def _end_of_log(self) -> str:
        first_error = ""
        last: deque[str] = deque(maxlen=LINES_OF_LOG)
        with self._log.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                shown = for_terminal(line.rstrip())[:500]
                last.append(f"\n  {shown}")
                # A server ends with many lines about its end; the cause is before them.
                if not first_error and ERROR.search(line):
                    first_error = f"The first error in its log: {shown}\n"
        if not last:
            return f"Its log, {self._log}, is empty"
        return f"{first_error}The end of its log, {self._log}:{''.join(last)}"


def check_command(server: ServerConfig) -> None:
    """Check that the program of the command is there. Nothing is started.

    Raises:
        InputError: it is not.
    """
    if server.command is not None:
        program = shlex.split(server.command)[0]
        if shutil.which(program) is None:
            raise InputError(
                f"generate.server.command: {brief(server.command)}: there is no program "
                f"{printable(program)}; install it, or give its path (docs/how-to/vllm.md)"
            )


def _wanted(server: ServerConfig, player: Player) -> Wanted:
    base = Player(0, player.base_folder, player.fingerprint)
    return Wanted.of(player, _fill(server.model, player), _fill(server.model, base))


def _filled_command(command: str, player: Player, port: int) -> list[str]:
    """The program and its arguments. Those with {adapter} go if the player has no adapter."""
    parts = shlex.split(command)
    adapter = player.adapter_folder
    if adapter is not None and "{adapter}" not in command:
        raise InputError(
            f"generate.server.command: θ_{player.index} is an adapter, and the command has no "
            "{adapter}; add it (docs/how-to/vllm.md), or merge the adapter by `tpaw export --merge`"
        )
    if adapter is None:
        parts = [part for part in parts if "{adapter}" not in part]
    values = {
        "model": str(Path(player.base_folder).resolve()),
        "adapter": None if adapter is None else str(Path(adapter).resolve()),
        "port": port,
    }
    return [_fill(part, player, **values) for part in parts]


def _fill(template: str, player: Player, **more: Any) -> str:
    """Replace the placeholders of a template, such as {model}."""
    values = {"model": str(Path(player.path).resolve()), "index": player.index, **more}
    # In one pass: a folder may have braces in its name.
    return re.sub(r"{(\w+)}", lambda found: str(values.get(found[1], found[0])), template)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0
