"""Send requests to the judge's endpoint with the openai library, which retries temporary errors.

huggingface_hub does not fit: its InferenceClient does not retry, and its http_backoff refuses even
a local server if HF_HUB_OFFLINE is set.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from tpaw.errors import InputError, JudgeError, printable, public_url

# Number of retries after the first try. The library waits 0.5 s, then twice as long each time up to
# 8 s, or as long as the server's Retry-After header says. It retries connection errors, timeouts
# and the status codes 408, 409, 429 and 5xx.
RETRIES = 5
# The library does not retry a reply with status 200 that is not a chat completion.
MALFORMED_RETRIES = 2
SECONDS_PER_TRY = 300.0
SECONDS_TO_CONNECT = 10.0
# Status codes that concern one request only: it is too long for the judge, or it was filtered.
_REFUSALS = (400, 413, 422)


class Reply(NamedTuple):
    """A reply of the judge.

    Attributes:
        text: may be empty.
        finish_reason: the endpoint's own: "stop", or "length" if the reply was truncated.
        model: the name of the model in the reply.
    """

    text: str
    finish_reason: str
    model: str


class RequestError(JudgeError):
    """One request has no valid reply. Other requests may succeed.

    Args:
        message: the text of the error.
        reason: the endpoint "refused" the request, or its reply is "malformed".
    """

    def __init__(self, message: str, reason: Literal["refused", "malformed"]) -> None:
        super().__init__(message)
        self.reason = reason


class Endpoint:
    """An OpenAI-compatible endpoint. Several threads may use it at the same time.

    Args:
        url: base URL; it begins with http:// or https://. Messages show it without user name,
            password and query, which may hold a key.
        api_key: key of the endpoint; None if it needs none.
        option: the option that gave the URL, for messages.

    Raises:
        InputError: the openai library is not installed, or the URL is not valid.
    """

    def __init__(self, url: str, api_key: str | None, option: str = "--endpoint") -> None:
        try:
            import openai
        except ImportError:
            raise InputError(
                "a judge needs the openai library, which is missing: pip install 'tpaw[judge]'"
            ) from None
        if not url.startswith(("http://", "https://")):
            raise InputError(f"{option} {public_url(url)}: it must begin with http:// or https://")
        self._openai = openai
        # The library's own HTTP library: httpx, or its successor.
        bases = [base.__module__.partition(".")[0] for base in openai.DefaultHttpxClient.__mro__]
        self._http = sys.modules[next(name for name in bases if name != "openai")]
        self.url = public_url(url)
        self._headers = {} if api_key else {"Authorization": openai.Omit()}
        self._client = openai.OpenAI(
            base_url=url,
            # Without a key, the library would read OPENAI_API_KEY and send it to this endpoint.
            api_key=api_key or "none",
            timeout=openai.Timeout(SECONDS_PER_TRY, connect=SECONDS_TO_CONNECT),
            max_retries=RETRIES,
            http_client=openai.DefaultHttpxClient(
                event_hooks={"request": [_note_start], "response": [self._limit_time]}
            ),
        )

    def ask(self, request: Mapping[str, Any]) -> Reply:
        """Send one chat-completions request.

        Args:
            request: the body of the request.

        Raises:
            RequestError: the endpoint refused this request only, or sent a malformed reply at each
                try.
            JudgeError: the endpoint was not reached after all retries, or refuses all requests.
        """
        for retry in range(MALFORMED_RETRIES):
            try:
                return self._ask_once(request)
            except RequestError as error:
                if error.reason != "malformed":
                    raise
                time.sleep(0.5 * 2**retry)
        return self._ask_once(request)

    def _ask_once(self, request: Mapping[str, Any]) -> Reply:
        try:
            found = self._client.chat.completions.create(**request, extra_headers=self._headers)
            choice = found.choices[0]
            text, reason, model = choice.message.content, choice.finish_reason, found.model
            if not isinstance(text, str | None):
                raise TypeError(f"the content is {type(text).__name__}, not text")
        except self._openai.APIStatusError as error:
            message = f"{self.url}: {printable(str(error))}"
            if error.status_code in _REFUSALS:
                raise RequestError(message, "refused") from None
            raise JudgeError(message) from None
        except self._openai.APIConnectionError as error:
            raise JudgeError(f"{self.url}: {printable(str(error.__cause__ or error))}") from None
        except (
            self._openai.OpenAIError,
            AttributeError,
            IndexError,
            TypeError,
            ValueError,
        ) as error:
            raise RequestError(
                f"{self.url}: not a chat-completions reply: {printable(str(error))}", "malformed"
            ) from None
        return Reply(text or "", str(reason), str(model))

    def _limit_time(self, response: Any) -> None:
        """Let a reply take `SECONDS_PER_TRY` in total. The library limits each read only."""
        stream, http = response.stream, self._http
        deadline = response.request.extensions[_STARTED] + SECONDS_PER_TRY

        class Limited(http.SyncByteStream):  # type: ignore[misc, name-defined]
            def __iter__(self) -> Iterator[bytes]:
                for part in stream:
                    if time.monotonic() > deadline:
                        raise http.ReadTimeout(f"no complete reply in {SECONDS_PER_TRY:g} s")
                    yield part

            def close(self) -> None:
                stream.close()

        response.stream = Limited()


_STARTED = "tpaw_started"


def _note_start(request: Any) -> None:
    request.extensions[_STARTED] = time.monotonic()
