"""One OpenAI-compatible server, over HTTP with the standard library.

The client is small because little is needed: one request per connection, no streaming. A thread
waits for each reply, and another thread can end all waiting at once (`abort`).
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from tpaw.errors import printable, public_url

SECONDS_TO_CONNECT = 10.0
BYTES_READ_AT_ONCE = 1 << 16
# A reply of 100,000 tokens with their log-probs has about 10 MB.
LARGEST_REPLY = 1 << 28
# Status codes that a later try may not get: a timeout, too early, too many requests.
_TEMPORARY = (408, 425, 429)
# The server works, but has too much to do.
_BUSY = (429, 503)


class Unavailable(Exception):
    """There is no reply now; a later try may succeed.

    Attributes:
        status: HTTP status code; None if there was no reply.
        wait: seconds to wait, if the server said so, else 0.
    """

    def __init__(self, message: str, status: int | None = None, wait: float = 0.0) -> None:
        super().__init__(message)
        self.status = status
        self.wait = wait

    @property
    def is_busy(self) -> bool:
        """Whether the server answered that it has too much to do."""
        return self.status in _BUSY


class Refused(Exception):
    """The server refuses the request. Another try would be refused too.

    Attributes:
        status: HTTP status code.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Endpoint:
    """An OpenAI-compatible server. Several threads may use it at the same time.

    Args:
        url: base URL, with /v1.
        api_key: sent as a bearer token; None if the server needs none.
        timeout: seconds until a reply must be complete.

    Attributes:
        url: for messages.
    """

    def __init__(self, url: str, api_key: str | None, timeout: float) -> None:
        self.url = public_url(url)
        self._parts = urlsplit(url)
        self._headers = {"Content-Type": "application/json", "Connection": "close"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._timeout = timeout
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()

    def models(self, timeout: float) -> list[Mapping[str, Any]]:
        """Ask which models the server serves.

        Args:
            timeout: seconds until the reply must be complete.

        Returns:
            One mapping for each model, with its name as `id`.

        Raises:
            Unavailable, Refused: there is no valid reply.
        """
        reply = _decoded(self.url, self._ask("GET", "/models", None, timeout))
        models = reply.get("data") if isinstance(reply, dict) else None
        if not isinstance(models, list) or not all(isinstance(m, dict) for m in models):
            raise Refused(f"{self.url}/models: not a list of models", 200)
        return models

    def complete(self, request: Mapping[str, Any]) -> Any:
        """Send one request to `/completions`.

        Args:
            request: the body.

        Returns:
            The body of the reply, decoded.

        Raises:
            Unavailable, Refused: there is no valid reply.
        """
        return _decoded(self.url, self._post("/completions", request, self._timeout))

    def load_adapter(self, name: str, folder: str, timeout: float) -> None:
        """Let vLLM load a LoRA adapter from a folder that it sees.

        Args:
            name: name of the adapter as a model.
            folder: absolute path.
            timeout: seconds until the adapter must be loaded.

        Raises:
            Unavailable, Refused: it was not loaded.
        """
        self._post("/load_lora_adapter", {"lora_name": name, "lora_path": folder}, timeout)

    def unload_adapter(self, name: str, timeout: float) -> None:
        """Let vLLM forget a LoRA adapter that was loaded under a name.

        Raises:
            Unavailable, Refused: it was not unloaded.
        """
        self._post("/unload_lora_adapter", {"lora_name": name}, timeout)

    def abort(self) -> None:
        """End every request that waits for its reply. The server sees that the client is gone."""
        with self._lock:
            for connected in self._open:
                with contextlib.suppress(OSError):
                    connected.shutdown(socket.SHUT_RDWR)

    def _post(self, path: str, body: Mapping[str, Any], timeout: float) -> bytes:
        return self._ask("POST", path, json.dumps(body).encode(), timeout)

    def _ask(self, method: str, path: str, body: bytes | None, timeout: float) -> bytes:
        try:
            response, content = self._exchange(method, path, body, timeout)
        except (OSError, http.client.HTTPException) as error:
            what = printable(str(error)) or type(error).__name__
            raise Unavailable(f"{self.url}: {what}") from None
        status = response.status
        if status in _TEMPORARY or status >= 500:
            raise Unavailable(
                f"{self.url}: HTTP {status}: {_said(content)}",
                status,
                _seconds(response.headers.get("Retry-After")),
            )
        if status != 200:
            raise Refused(f"{self.url}{path}: HTTP {status}: {_said(content)}", status)
        return content

    def _exchange(
        self, method: str, path: str, body: bytes | None, timeout: float
    ) -> tuple[http.client.HTTPResponse, bytes]:
        deadline = time.monotonic() + timeout
        is_https = self._parts.scheme == "https"
        kind = http.client.HTTPSConnection if is_https else http.client.HTTPConnection
        connection = kind(
            self._parts.hostname or "", self._parts.port, timeout=min(SECONDS_TO_CONNECT, timeout)
        )
        with contextlib.closing(connection):
            connection.connect()
            with self._registered(connection.sock) as connected:
                connected.settimeout(timeout)
                connection.request(method, self._parts.path.rstrip("/") + path, body, self._headers)
                response = connection.getresponse()
                with response:
                    return response, _read(response, connected, deadline)

    @contextlib.contextmanager
    def _registered(self, connected: socket.socket) -> Iterator[socket.socket]:
        with self._lock:
            self._open.add(connected)
        try:
            yield connected
        finally:
            with self._lock:
                self._open.discard(connected)


def _read(response: http.client.HTTPResponse, connected: socket.socket, deadline: float) -> bytes:
    """Read a reply to its end. The timeout of a socket would only limit each part."""
    parts, size = [], 0
    # Since Python 3.11.8 and 3.12.2 the last part closes the socket, and a timeout cannot be set.
    while not response.isclosed():
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        connected.settimeout(left)
        part = response.read1(BYTES_READ_AT_ONCE)
        if not part:
            break
        parts.append(part)
        size += len(part)
        if size > LARGEST_REPLY:
            raise http.client.HTTPException(f"the reply has more than {LARGEST_REPLY:,} bytes")
    return b"".join(parts)  # of a reply that is cut short, no JSON is left


def _decoded(url: str, content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise Unavailable(f"{url}: the reply is not JSON: {_said(content)}") from None


def _said(content: bytes) -> str:
    """What a server says about an error: the message in its JSON, or its text."""
    text = content[:10_000].decode(errors="replace").strip()
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(text)
        for key in ("error", "message", "detail"):
            while isinstance(found, dict) and key in found:
                found = found[key]
        text = found if isinstance(found, str) else json.dumps(found)
    return printable(text, 500) or "without a message"


def _seconds(header: str | None) -> float:
    try:
        return max(0.0, float(header or 0))
    except ValueError:  # a date
        return 0.0
