"""Asking a judge, by the openai library, which retries with back-off what may pass.

huggingface_hub's InferenceClient does not retry, and its http_backoff refuses a server on this very
machine where HF_HUB_OFFLINE is set, as it is on machines that have no network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from tpaw.errors import InputError, JudgeError, printable

# After the first try. The library waits 0.5 s, then twice as long each time up to 8 s, or as long
# as the server's Retry-After says; it retries no connection, no answer in time, 408, 409, 429, 5xx.
RETRIES = 5
SECONDS_PER_TRY = 300.0
SECONDS_TO_CONNECT = 10.0
# What an endpoint says of one request: too long for the judge, or filtered.
_REFUSALS = (400, 413, 422)


class Reply(NamedTuple):
    """What a judge replied.

    Attributes:
        text: may be empty.
        finish_reason: as the endpoint gives it: "stop", or "length" for a truncated one.
        model: the judge, as it names itself.
    """

    text: str
    finish_reason: str
    model: str


class RefusedError(JudgeError):
    """The endpoint refuses this one request."""


class Endpoint:
    """An OpenAI-compatible endpoint; threads may share it."""

    def __init__(self, url: str, api_key: str | None) -> None:
        try:
            import openai
        except ImportError:
            raise InputError(
                "tpaw judge: needs the openai library: pip install 'tpaw[judge]'"
            ) from None
        if not url.startswith(("http://", "https://")):
            raise InputError(f"--endpoint {url}: it must begin with http:// or https://")
        self._openai = openai
        self.url = url
        self._client = openai.OpenAI(
            base_url=url,
            # The library sends some key always; without one of ours it would look for OpenAI's.
            api_key=api_key or "none",
            timeout=openai.Timeout(SECONDS_PER_TRY, connect=SECONDS_TO_CONNECT),
            max_retries=RETRIES,
        )

    def ask(self, request: Mapping[str, Any]) -> Reply:
        """Send one request of chat.completions.

        Raises:
            RefusedError: for this request alone.
            JudgeError: the endpoint is not reached after all retries, or refuses them all.
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
                f"{self.url}: no reply of chat completions: {printable(str(error))}"
            ) from None
        return Reply(text or "", str(reason), str(model))
