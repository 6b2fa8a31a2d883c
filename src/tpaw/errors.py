"""Errors that a user can fix. The command line prints their message without a traceback.

An error about a setting reads `<key>: <value>: <what is wrong>; <what to do>`.
"""

from __future__ import annotations

import re
import reprlib
from typing import Any


class TpawError(Exception):
    """Base class of all errors that a user can fix. `exit_code` is that of the command line."""

    exit_code = 1


class InputError(TpawError):
    """A setting, a file or a record is invalid. It is raised before any expensive work starts."""

    exit_code = 2


class ArtifactError(TpawError):
    """A published file differs from its manifest. TPAW neither uses nor overwrites such a file."""


class StorageError(TpawError):
    """The file system failed: it is full, read-only, too slow or gone. Published files are kept."""

    exit_code = 4


class RunLockedError(TpawError):
    """Another process holds the lock of the run directory."""


class PolicyMismatchError(TpawError):
    """At the first step of an iteration, the policy's log-probs differ from its newest player's."""


class NonFiniteError(TpawError):
    """A player's logits or log-probs are NaN or infinite, so it can neither answer nor score."""


class MemoryShortageError(TpawError):
    """Memory has run out. Finished work is kept; the message names the setting to lower."""


class DivergenceError(TpawError):
    """Training diverged: a log-prob of the policy is NaN or infinite. Earlier work is kept."""


class WorkerError(TpawError):
    """A worker of a cluster died or failed. Published files are kept."""


class JudgeError(TpawError):
    """The judge's endpoint cannot be reached or refuses requests. Earlier replies are kept."""

    exit_code = 3


class ServerError(TpawError):
    """No generation server answers, or a reply is wrong. Published responses are kept."""

    exit_code = 3


class HubError(TpawError):
    """The Hugging Face Hub cannot be reached, or refuses something. The run is unchanged."""

    exit_code = 3


class Interrupted(TpawError):
    """The work stopped at a safe point because the user asked for it."""

    def __init__(self, signal_number: int) -> None:
        super().__init__("stopped at a safe point")
        self.signal_number = signal_number

    @property
    def exit_code(self) -> int:  # type: ignore[override]
        """128 plus the signal's number, as in a shell: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.signal_number


def for_terminal(text: str) -> str:
    """Replace every control character except the line break by its escape, such as `\\x1b`.

    A terminal obeys control characters: they move the cursor, change colours and the window title,
    and turn the direction of text. Lone surrogates cannot be encoded.

    Args:
        text: any text.
    """
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def printable(text: str, width: int = 200) -> str:
    """Make text from outside safe for a terminal.

    Args:
        text: any text.
        width: longest result, in characters. Longer text is cut and ends with `…`.

    Returns:
        One line without control characters.
    """
    shown = for_terminal(text).replace("\n", "\\n")
    return shown if len(shown) <= width else shown[: width - 1] + "…"


def public_url(url: str) -> str:
    """Return a URL without user name, password, query and fragment, which may hold a key."""
    scheme, slashes, rest = re.split("[?#]", url, maxsplit=1)[0].rpartition("://")
    return scheme + slashes + rest.rpartition("@")[2]


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type if it has none."""
    return str(error).partition("\n")[0] or type(error).__name__


_REPR = reprlib.Repr()
_REPR.maxlevel = 3
_REPR.maxdict = _REPR.maxlist = _REPR.maxtuple = _REPR.maxset = _REPR.maxfrozenset = 100
_REPR.maxstring = _REPR.maxother = 200


def brief(value: Any) -> str:
    """Show a value of any size in one line of at most 1000 characters, in bounded time.

    Args:
        value: any value. A long one is cut: `[1, 2, ...]`.
    """
    return printable(_REPR.repr(value), 1000)
