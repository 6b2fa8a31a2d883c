"""What tells whether a response is right: its `#### number`, or a function of the user's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from tpaw.config.methods import imported
from tpaw.config.schema import EXACT_MATCH
from tpaw.data.examples import Example
from tpaw.errors import InputError, first_line, printable
from tpaw.evaluation.exact_match import extract_answer, has_answers, is_correct


class Checker(Protocol):
    """Tells right responses from wrong ones."""

    def can_check(self, examples: Sequence[Example]) -> bool:
        """Whether there are examples and it can tell of every one of them."""
        ...

    def is_right(self, example: Example, response: str) -> bool:
        """Whether a response to the prompt of an example is right."""
        ...

    def details(self, example: Example, response: str) -> dict[str, Any]:
        """What else an item of the evaluation says of a response."""
        ...


class ByNumber:
    """Right is a response with the `#### number` of its target; see `exact_match.py`."""

    def can_check(self, examples: Sequence[Example]) -> bool:
        """See `Checker`."""
        return has_answers(examples)

    def is_right(self, example: Example, response: str) -> bool:
        """See `Checker`."""
        return is_correct(response, example.target_text)

    def details(self, example: Example, response: str) -> dict[str, Any]:
        """See `Checker`."""
        return {
            "answer": extract_answer(response),
            "expected": extract_answer(example.target_text),
        }


class ByFunction:
    """Right is what a function of the user's calls so.

    Args:
        name: the module, for error messages.
        function: takes the texts of prompt, target and response.
    """

    def __init__(self, name: str, function: Callable[[str, str, str], bool]) -> None:
        self._name = name
        self._function = function

    def can_check(self, examples: Sequence[Example]) -> bool:
        """See `Checker`."""
        return bool(examples)

    def is_right(self, example: Example, response: str) -> bool:
        """See `Checker`.

        Raises:
            InputError: the function failed, or did not return True or False.
        """
        try:
            found = self._function(example.prompt_text, example.target_text, response)
        except Exception as error:
            reason = f"{type(error).__name__}: {printable(first_line(error))}"
            raise InputError(
                f"checker: {self._name}: is_right failed on example {example.id} ({reason})"
            ) from error
        if not isinstance(found, bool):
            raise InputError(
                f"checker: {self._name}: is_right returned {printable(repr(found), 40)} for "
                f"example {example.id}; it must return True or False"
            )
        return found

    def details(self, example: Example, response: str) -> dict[str, Any]:
        """See `Checker`."""
        return {}


def checker_of(name: str) -> Checker:
    """The checker that a configuration names.

    Raises:
        InputError: the module cannot be imported.
    """
    if name == EXACT_MATCH:
        return ByNumber()
    try:
        return ByFunction(name, imported(name).is_right)
    except (ValueError, AttributeError) as error:
        raise InputError(f"checker: {name}: {error}") from None
