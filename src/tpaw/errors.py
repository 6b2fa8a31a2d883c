"""The errors a user can act on. The command line prints their text alone, without a traceback."""

from __future__ import annotations


class TpawError(Exception):
    """Something the user can put right; the message says what and how."""

    exit_code = 1


class InputError(TpawError):
    """A setting, a file or a row that cannot be used; raised before anything expensive starts."""

    exit_code = 2


class ArtifactError(TpawError):
    """A published file that is not what its manifest says. It is never used and never redone."""


class RunLockedError(TpawError):
    """Another process works on the run directory."""


class PolicyMismatchError(TpawError):
    """The policy at the first step of an iteration is not its newest player."""


class DivergenceError(TpawError):
    """Training left the numbers. What came before it is kept."""


class JudgeError(TpawError):
    """The judge's endpoint cannot be reached, or refuses. What it answered before is kept."""

    exit_code = 3


class Interrupted(TpawError):
    """A stop was asked for and a safe point was reached."""

    def __init__(self, signal_number: int) -> None:
        super().__init__("stopped at a safe point")
        self.signal_number = signal_number

    @property
    def exit_code(self) -> int:  # type: ignore[override]
        """128 + the signal's number, as a shell reports it: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.signal_number


def printable(text: str, width: int = 200) -> str:
    """Text that others wrote, safe for a terminal: no control characters, one line, cut."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return shown if len(shown) <= width else shown[: width - 1] + "…"
