"""Exact match for problems whose solution ends with `#### answer`, as in GSM8K.

The pattern is `####`, one space and a number, as in GSM8K's own code (openai/grade-school-math,
`dataset.py`). lm-eval's strict-match uses the same pattern and gives the same verdicts on GSM8K.
Only the first match in a text counts. Thousands separators and a final full stop are ignored.

In this file, an answer is the number after `####`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tpaw.data.examples import Example

_ANSWER = re.compile(r"#### (-?[0-9.,]+)")


def extract_answer(text: str) -> str | None:
    """Return the normalised answer of a solution, or None if it has no answer."""
    found = _ANSWER.search(text)
    if found is None:
        return None
    return found.group(1).replace(",", "").removesuffix(".") or None


def is_correct(completion: str, target: str) -> bool:
    """Whether a completion has the same answer as the target.

    Args:
        completion: text of a response.
        target: text of the target.

    Returns:
        False if the target has no answer.
    """
    expected = extract_answer(target)
    return expected is not None and extract_answer(completion) == expected


def has_answers(examples: Sequence[Example]) -> bool:
    """Whether there are examples and every target has an answer."""
    return bool(examples) and all(extract_answer(example.target_text) for example in examples)
