"""Two systems before a judge: every pair of answers is shown in both orders."""

from __future__ import annotations

import contextlib
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from queue import SimpleQueue
from threading import Thread
from typing import Any, Literal, NamedTuple

from tpaw.evaluation.judge.endpoint import Endpoint, RefusedError, Reply
from tpaw.evaluation.judge.outputs import Pair
from tpaw.evaluation.judge.prompt import JudgePrompt, Verdict, parse_verdict
from tpaw.evaluation.judge.replies import Replies, request_key
from tpaw.runtime.progress import OnDone

Outcome = Literal["win", "loss", "tie", "invalid"]

# Sent with every request: greedy, and where a server samples all the same, the same each time.
SAMPLING = {"temperature": 0, "seed": 0}
# So many refusals and not one reply: it is not about the one request.
REFUSALS_THAT_TELL = 8


class Judge(NamedTuple):
    """Everything that decides what a judge is asked.

    Attributes:
        model: its name at the endpoint.
        max_tokens: longest reply.
    """

    model: str
    prompt: JudgePrompt
    max_tokens: int

    @property
    def measure(self) -> str:
        """What the number is called, always."""
        return f"pairwise win rate, judge = {self.model}, prompt = {self.prompt.sha256[:12]}"

    def request(self, instruction: str, first: str, second: str) -> dict[str, Any]:
        """The body of a request to chat completions."""
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": self.prompt.fill(instruction, first, second)}],
            "max_tokens": self.max_tokens,
            **SAMPLING,
        }


class Seen(NamedTuple):
    """What became of one order of a pair.

    Attributes:
        reply: the key of the reply.
        verdict: for the first or the second system, wherever it stood; None is invalid.
        invalid: why it is: "refused", "truncated" or "unparsable".
    """

    reply: str
    verdict: Verdict | None
    invalid: str | None


class Judged(NamedTuple):
    """What became of a pair.

    Attributes:
        outcome: for the first system.
        orders: with the first system's answer first, then with it second; None where the answers
            are identical, a tie that nobody was asked about.
    """

    outcome: Outcome
    orders: tuple[Seen, Seen] | None


class Match:
    """The questions about all pairs, and the replies so far."""

    def __init__(self, pairs: Sequence[Pair], judge: Judge, replies: Replies) -> None:
        self.pairs = pairs
        self.judge = judge
        self.replies = replies
        self.refused: set[str] = set()
        self._found: dict[str, Reply] = {}
        self.missing: dict[str, dict[str, Any]] = {}
        for pair in pairs:
            if pair.first == pair.second:
                continue
            for request in self._requests(pair):
                key = request_key(request)
                reply = replies.get(key)
                if reply is None:
                    self.missing[key] = request
                else:
                    self._found[key] = reply

    def ask(self, endpoint: Endpoint, parallel: int, on_done: OnDone) -> None:
        """Ask what is missing; every reply is kept the moment it comes.

        Args:
            parallel: requests at a time.
            on_done: called with 1 a request. It may raise to stop; requests under way are awaited.

        Raises:
            JudgeError: see `Endpoint.ask`.
        """
        waiting = deque(self.missing)
        answered: SimpleQueue[tuple[str, Reply | Exception]] = SimpleQueue()

        def work() -> None:
            with contextlib.suppress(IndexError):
                while True:
                    key = waiting.popleft()
                    try:
                        reply = endpoint.ask(self.missing[key])
                        self.replies.put(key, reply)
                        answered.put((key, reply))
                    except Exception as error:  # raised where it is taken
                        answered.put((key, error))

        # Daemons, so that nothing awaits them where a second Ctrl-C asks for a stop at once.
        workers = [Thread(target=work, daemon=True) for _ in range(min(parallel, len(waiting)))]
        for worker in workers:
            worker.start()
        try:
            for _ in self.missing:
                self._take(*answered.get())
                on_done(1)
        except BaseException as reason:
            waiting.clear()
            for worker in workers if isinstance(reason, Exception) else ():
                worker.join()
            raise

    def judged(self) -> list[Judged]:
        """What became of every pair, in their order; everything must have been asked."""
        return [self._judged(pair) for pair in self.pairs]

    def models(self) -> dict[str, int]:
        """How many replies the judge gave under which name of its own."""
        return dict(Counter(reply.model for reply in self._found.values()))

    def _take(self, key: str, reply: Reply | Exception) -> None:
        if isinstance(reply, Reply):
            self._found[key] = reply
            return
        if not isinstance(reply, RefusedError):
            raise reply
        self.refused.add(key)
        enough = min(REFUSALS_THAT_TELL, len(self.missing))
        if not self._found and len(self.refused) >= enough:
            raise reply

    def _requests(self, pair: Pair) -> Iterator[dict[str, Any]]:
        yield self.judge.request(pair.instruction, pair.first, pair.second)
        yield self.judge.request(pair.instruction, pair.second, pair.first)

    def _judged(self, pair: Pair) -> Judged:
        if pair.first == pair.second:
            return Judged("tie", None)
        straight, swapped = (self._seen(request_key(r)) for r in self._requests(pair))
        if swapped.verdict in ("first", "second"):
            other: Verdict = "second" if swapped.verdict == "first" else "first"
            swapped = swapped._replace(verdict=other)
        orders = straight, swapped
        if straight.invalid or swapped.invalid:
            return Judged("invalid", orders)
        if straight.verdict != swapped.verdict or straight.verdict == "neither":
            return Judged("tie", orders)
        return Judged("win" if straight.verdict == "first" else "loss", orders)

    def _seen(self, key: str) -> Seen:
        if key in self.refused:
            return Seen(key, None, "refused")
        reply = self._found[key]
        if reply.finish_reason == "length":
            return Seen(key, None, "truncated")
        verdict = parse_verdict(reply.text)
        return Seen(key, verdict, None if verdict else "unparsable")
