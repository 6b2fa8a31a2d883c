"""What the judge is asked, and what counts as its verdict.

A prompt is a text with {{instruction}}, {{answer_a}} and {{answer_b}}, each once or more, and where
it likes {{mark}}: a few characters that depend on what stands between the delimiters, so that an
answer cannot hold the line that would end it. The prompt that comes with the package, prompt.txt,
was written for it.

A verdict is the last line of a reply that is not empty, and must be [[A]], [[B]] or [[C]] (neither
is better) and nothing else. Marks elsewhere, as in an answer that the judge quotes, do not count.
"""

from __future__ import annotations

import hashlib
import re
from importlib.resources import files
from pathlib import Path
from typing import Literal, NamedTuple

from tpaw.errors import InputError

Verdict = Literal["first", "second", "neither"]

_VERDICTS: dict[str, Verdict] = {"[[A]]": "first", "[[B]]": "second", "[[C]]": "neither"}
_PLACE = re.compile(r"\{\{(\w+)\}\}")
_NEEDED = ("instruction", "answer_a", "answer_b")


class JudgePrompt(NamedTuple):
    """The text with its places still open."""

    text: str

    @property
    def sha256(self) -> str:
        """Names the prompt."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def fill(self, instruction: str, first: str, second: str) -> str:
        """The question about two answers, in this order."""
        texts = {"instruction": instruction, "answer_a": first, "answer_b": second}
        lengths = "".join(f"{len(text)}:{text}" for text in texts.values())
        texts["mark"] = hashlib.sha256(lengths.encode()).hexdigest()[:16]
        # In one pass: an answer that holds {{answer_b}} stays as it is.
        return _PLACE.sub(lambda place: texts[place[1]], self.text)


def load_prompt(path: Path | None) -> JudgePrompt:
    """Read a prompt; None is the one that comes with the package.

    Raises:
        InputError: nothing there, a place is missing, or there is one of another name.
    """
    if path is None:
        return JudgePrompt(
            (files("tpaw.evaluation.judge") / "prompt.txt").read_text(encoding="utf-8")
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompt {path}: cannot be read as text: {error}") from None
    places = set(_PLACE.findall(text))
    missing = [name for name in _NEEDED if name not in places]
    foreign = sorted(places.difference(_NEEDED, ["mark"]))
    if missing or foreign:
        wrong = [f"lacks {{{{{name}}}}}" for name in missing]
        wrong += [f"has {{{{{name}}}}}, which nothing fills" for name in foreign]
        raise InputError(f"--prompt {path}: {'; '.join(wrong)}")
    return JudgePrompt(text)


def parse_verdict(reply: str) -> Verdict | None:
    """The verdict of a reply; None where it gives none in the form asked for."""
    lines = [line.strip() for line in reply.splitlines() if line.strip()]
    return _VERDICTS.get(lines[-1]) if lines else None
