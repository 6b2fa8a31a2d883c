"""A person types prompts; the answers grow side by side, or are printed one after another."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Sequence

from rich.live import Live
from rich.table import Table

from tpaw.ask.speaker import Answer, Speaker
from tpaw.errors import InputError, for_terminal
from tpaw.runtime.console import TextConsole

PROMPT = "prompt> "
HOW_TO_LEAVE = "An empty line or Ctrl-D leaves; Ctrl-C ends an answer."
SECONDS_BETWEEN_FRAMES = 0.1


def talk(speakers: Sequence[Speaker], console: TextConsole, read: Callable[[str], str]) -> None:
    """Answer prompts until an empty line, the end of the input or Ctrl-C at the prompt.

    Ctrl-C while an answer is made ends that answer.

    Args:
        speakers: who answers.
        console: the terminal.
        read: shows its argument and returns a line, as `input` does.
    """
    console.print_text(HOW_TO_LEAVE)
    while True:
        try:
            prompt = read(PROMPT)
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if not prompt.strip():
            return
        try:
            _answer_side_by_side([speaker.answer(prompt) for speaker in speakers], console)
        except InputError as error:
            console.print_text(str(error))


def answer_lines(speakers: Sequence[Speaker], prompts: Iterable[str], console: TextConsole) -> bool:
    """Answer prompts and print the answers as plain text, each under its speaker if there are two.

    Args:
        speakers: who answers.
        prompts: lines; empty ones are left out.
        console: where the answers go.

    Returns:
        Whether every prompt could be used. An error on stderr names those that could not.
    """
    is_usable = True
    for prompt in prompts:
        if not prompt.strip():
            continue
        try:
            answers = [speaker.answer(prompt) for speaker in speakers]
        except InputError as error:
            print(for_terminal(f"tpaw: {error}"), file=sys.stderr)
            is_usable = False
            continue
        for answer in answers:
            while answer.advance():
                pass
            heading = f"{answer.speaker.name}: " if len(answers) > 1 else ""
            console.print_text(heading + answer.text)
    return is_usable


def _answer_side_by_side(answers: Sequence[Answer], console: TextConsole) -> None:
    """Let the answers take turns, one token each."""
    shown = 0.0
    unfinished = list(answers)
    with Live(console=console, auto_refresh=False) as live:
        with contextlib.suppress(KeyboardInterrupt):
            while unfinished:
                unfinished = [answer for answer in unfinished if answer.advance()]
                if time.monotonic() - shown > SECONDS_BETWEEN_FRAMES:
                    live.update(_columns(answers, unfinished), refresh=True)
                    shown = time.monotonic()
        live.update(_columns(answers, unfinished, "stopped"), refresh=True)


def _columns(answers: Sequence[Answer], unfinished: Sequence[Answer], state: str = "…") -> Table:
    table = Table(expand=True)
    for answer in answers:
        end = f" ({state})" if answer in unfinished else ""
        table.add_column(f"{answer.speaker.name}{end}", ratio=1, overflow="fold")
    # A character of several tokens is � until the last of them is there.
    texts = (a.text.rstrip("\ufffd") if a in unfinished else a.text for a in answers)
    table.add_row(*texts)
    return table
