"""Send requests to the judge's endpoint with the openai library, which retries temporary errors.

huggingface_hub does not fit: its InferenceClient does not retry, and its http_backoff refuses even
a local server if HF_HUB_OFFLINE is set.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from tpaw.errors import InputError, JudgeError, printable

# Number of retries after the first try. The library waits 0.5 s, then twice as long each time up to
# 8 s, or as long as the server's Retry-After header says. It retries connection errors, timeouts
# and the status codes 408, 409, 429 and 5xx.
RETRIES = 5
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


class RefusedError(JudgeError):
    """The endpoint refused one request. Other requests may succeed."""


class Endpoint:
    """An OpenAI-compatible endpoint. Several threads may use it at the same time.

    Args:
        url: base URL; it begins with http:// or https://. Messages show it without user name,
            password and query, which may hold a key.
        api_key: key of the endpoint; None if it needs none.

    Raises:
        InputError: the openai library is not installed, or the URL is not valid.
    """

    def __init__(self, url: str, api_key: str | None) -> None:
        try:
            import openai
        except ImportError:
            raise InputError(
                "tpaw judge: the openai library is not installed: pip install 'tpaw[judge]'"
            ) from None
        if not url.startswith(("http://", "https://")):
            raise InputError(f"--endpoint {_public(url)}: it must begin with http:// or https://")
        self._openai = openai
        self.url = _public(url)
        self._client = openai.OpenAI(
            base_url=url,
            # Without a key, the library would read OPENAI_API_KEY and send it to this endpoint.
            api_key=api_key or "none",
            timeout=openai.Timeout(SECONDS_PER_TRY, connect=SECONDS_TO_CONNECT),
            max_retries=RETRIES,
        )

    def ask(self, request: Mapping[str, Any]) -> Reply:
        """Send one chat-completions request.

        Args:
            request: the body of the request.

        Raises:
            RefusedError: the endpoint refused this request only.
            JudgeError: the endpoint was not reached after all retries, refuses all requests, or
                sent no valid reply.
        """
        try:
            found = self._client.chat.completions.create(**request)
            choice = found.choices[0]
            text, reason, model = choice.message.content, choice.finish_reason, found.model
        except self._openai.APIStatusError as error:
            kind = RefusedError if error.status_code in _REFUSALS else JudgeError
            raise kind(f"{self.url}: {printable(str(error))}") from None
        except self._openai.APIConnectionError as error:
            raise JudgeError(f"{self.url}: {printable(str(error.__cause__ or error))}") from None
        except (
            self._openai.OpenAIError,
            AttributeError,
            IndexError,
            TypeError,
            ValueError,
        ) as error:
            raise JudgeError(
                f"{self.url}: not a chat-completions reply: {printable(str(error))}"
            ) from None
        return Reply(text or "", str(reason), str(model))


def _public(url: str) -> str:
    """Return a URL without user name, password, query and fragment."""
    scheme, slashes, rest = re.split("[?#]", url, maxsplit=1)[0].rpartition("://")
    return scheme + slashes + rest.rpartition("@")[2]
