"""Exact match for problems whose solution ends in `#### answer`, as GSM8K's do.

The pattern is GSM8K's own (openai/grade-school-math `dataset.py`), and so is that of lm-eval's
strict-match, whose verdicts on GSM8K these are: `####`, one space, a number. The first such place
in an answer counts; thousands separators and a final full stop do not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tpaw.data.examples import Example

_ANSWER = re.compile(r"#### (-?[0-9.,]+)")


def extract_answer(text: str) -> str | None:
    """The normalised answer of a solution, or None where there is none."""
    found = _ANSWER.search(text)
    if found is None:
        return None
    return found.group(1).replace(",", "").removesuffix(".") or None


def is_correct(completion: str, target: str) -> bool:
    """Whether a completion gives the target's answer."""
    expected = extract_answer(target)
    return expected is not None and extract_answer(completion) == expected


def has_answers(examples: Sequence[Example]) -> bool:
    """Whether every target ends in a checkable answer, and there is one."""
    return bool(examples) and all(extract_answer(example.target_text) for example in examples)
