"""The judge prompt, and the rule that finds the verdict in a reply.

A prompt is a text with the placeholders {{instruction}}, {{answer_a}} and {{answer_b}}, each at
least once. It may also contain {{mark}}, for delimiters. The mark is a hash of the three texts. So
a response cannot contain the delimiter that ends it. prompt.txt is the prompt of the package.

The verdict is the last line of a reply that is not empty. It must be exactly [[A]], [[B]] or [[C]]
(neither is better). Other lines do not count, because the judge may quote a response.
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
    """A judge prompt.

    Attributes:
        text: with placeholders.
    """

    text: str

    @property
    def sha256(self) -> str:
        """Hash of the text. It identifies the prompt in results."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def fill(self, instruction: str, first: str, second: str) -> str:
        """Replace the placeholders.

        Args:
            instruction: the instruction.
            first, second: the two responses, in the order in which the judge sees them.
        """
        texts = {"instruction": instruction, "answer_a": first, "answer_b": second}
        lengths = "".join(f"{len(text)}:{text}" for text in texts.values())
        texts["mark"] = hashlib.sha256(lengths.encode()).hexdigest()[:16]
        # Replace all placeholders in one pass, so that a response that contains {{answer_b}} is not
        # changed.
        return _PLACE.sub(lambda place: texts[place[1]], self.text)


def load_prompt(path: Path | None) -> JudgePrompt:
    """Read a judge prompt.

    Args:
        path: a text file; None means the prompt of the package.

    Raises:
        InputError: the file cannot be read, a placeholder is missing, or a placeholder is unknown.
    """
    if path is None:
        return JudgePrompt(
            (files("tpaw.evaluation.judge") / "prompt.txt").read_text(encoding="utf-8")
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompt {path}: cannot be read as UTF-8 text: {error}") from None
    places = set(_PLACE.findall(text))
    missing = [name for name in _NEEDED if name not in places]
    foreign = sorted(places.difference(_NEEDED, ["mark"]))
    if missing or foreign:
        wrong = [f"lacks {{{{{name}}}}}" for name in missing]
        wrong += [f"has {{{{{name}}}}}, which is not a known placeholder" for name in foreign]
        allowed = ", ".join(f"{{{{{name}}}}}" for name in (*_NEEDED, "mark"))
        raise InputError(f"--prompt {path}: {'; '.join(wrong)}; placeholders are {allowed}")
    return JudgePrompt(text)


def parse_verdict(reply: str) -> Verdict | None:
    """Return the verdict of a reply, or None if its last line is not a verdict."""
    lines = [line.strip() for line in reply.splitlines() if line.strip()]
    return _VERDICTS.get(lines[-1]) if lines else None
