"""A match of two systems: the judge compares each pair of responses in both orders."""

from __future__ import annotations

import contextlib
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from queue import SimpleQueue
from threading import Thread
from typing import Any, Literal, NamedTuple

from tpaw.evaluation.judge.endpoint import Endpoint, Reply, RequestError
from tpaw.evaluation.judge.outputs import Pair
from tpaw.evaluation.judge.prompt import JudgePrompt, Verdict, parse_verdict
from tpaw.evaluation.judge.replies import Replies, request_key
from tpaw.runtime.progress import OnDone

Outcome = Literal["win", "loss", "tie", "invalid"]

# Sent with every request. Greedy decoding, and a fixed seed for servers that sample anyway.
SAMPLING = {"temperature": 0, "seed": 0}
# After this many failures without any valid reply, the cause is the endpoint and not one request.
FAILURES_THAT_TELL = 8


class Judge(NamedTuple):
    """Everything that decides the content of a request.

    Attributes:
        model: name of the judge model at the endpoint.
        prompt: the judge prompt.
        max_tokens: longest reply in tokens.
    """

    model: str
    prompt: JudgePrompt
    max_tokens: int = 1024

    @property
    def measure(self) -> str:
        """The full name of the measure. Always quote a win rate with it."""
        return f"pairwise win rate, judge = {self.model}, prompt = {self.prompt.sha256[:12]}"

    def request(self, instruction: str, first: str, second: str) -> dict[str, Any]:
        """Build the body of a chat-completions request.

        Args:
            instruction: the instruction.
            first, second: the two responses, in the order in which the judge sees them.
        """
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": self.prompt.fill(instruction, first, second)}],
            "max_tokens": self.max_tokens,
            **SAMPLING,
        }


class Seen(NamedTuple):
    """The judge's verdict on one order of a pair.

    Attributes:
        reply: key of the reply.
        verdict: which system the judge prefers ("first" or "second" system, not position), or
            "neither". None if the reply is invalid.
        invalid: why the reply is invalid: "refused", "malformed", "truncated" or "unparsable";
            None if it is valid.
    """

    reply: str
    verdict: Verdict | None
    invalid: str | None


class Judged(NamedTuple):
    """The outcome of a pair.

    Attributes:
        outcome: from the view of the first system.
        orders: the verdicts with the first system's response in the first position, and in the
            second position. None if the responses are identical: that is a tie, and the judge is
            not asked.
    """

    outcome: Outcome
    orders: tuple[Seen, Seen] | None


class Match:
    """The requests for all pairs, and the replies so far.

    Args:
        pairs: the responses of two systems.
        judge: decides the content of the requests.
        replies: the cache of replies.

    Attributes:
        missing: requests without a cached reply, by key.
        failed: why a request has no reply, by key: "refused" or "malformed". It is not stored, so a
            later match sends the request again.
    """

    def __init__(self, pairs: Sequence[Pair], judge: Judge, replies: Replies) -> None:
        self.pairs = pairs
        self.judge = judge
        self.replies = replies
        self.failed: dict[str, str] = {}
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
        """Send the missing requests. Store every reply as soon as it arrives.

        Args:
            endpoint: the judge's endpoint.
            parallel: number of requests at a time.
            on_done: called with 1 after each request. It may raise to stop the work; running
                requests are then finished first.

        Raises:
            JudgeError: see `Endpoint.ask`.
        """
        waiting = deque(self.missing)
        finished: SimpleQueue[tuple[str, Reply | Exception]] = SimpleQueue()

        def work() -> None:
            with contextlib.suppress(IndexError):
                while True:
                    key = waiting.popleft()
                    try:
                        reply = endpoint.ask(self.missing[key])
                        self.replies.put(key, reply)
                        finished.put((key, reply))
                    except Exception as error:  # `_take` raises it in the main thread
                        finished.put((key, error))

        # Daemon threads, so that the process does not wait for them after a second Ctrl-C.
        workers = [Thread(target=work, daemon=True) for _ in range(min(parallel, len(waiting)))]
        for worker in workers:
            worker.start()
        try:
            for _ in self.missing:
                self._take(*finished.get())
                on_done(1)
        except BaseException as reason:
            waiting.clear()
            for worker in workers if isinstance(reason, Exception) else ():
                worker.join()
            raise

    def judged(self) -> list[Judged]:
        """Return the outcome of every pair, in the order of the pairs. Call `ask` first."""
        return [self._judged(pair) for pair in self.pairs]

    def models(self) -> dict[str, int]:
        """Count the replies by the model name in them."""
        return dict(Counter(reply.model for reply in self._found.values()))

    def _take(self, key: str, reply: Reply | Exception) -> None:
        if isinstance(reply, Reply):
            self._found[key] = reply
            return
        if not isinstance(reply, RequestError):
            raise reply
        self.failed[key] = reply.reason
        enough = min(FAILURES_THAT_TELL, len(self.missing))
        if not self._found and len(self.failed) >= enough:
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
        if key in self.failed:
            return Seen(key, None, self.failed[key])
        reply = self._found[key]
        if reply.finish_reason == "length":
            return Seen(key, None, "truncated")
        verdict = parse_verdict(reply.text)
        return Seen(key, verdict, None if verdict else "unparsable")
