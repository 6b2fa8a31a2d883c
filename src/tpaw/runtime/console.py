"""The consoles that notes, progress and tables are printed on."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from tpaw.errors import for_terminal


class TextConsole(Console):
    """Shows text as it is: `[red]` and `:smile:` stay text, and control characters are escaped.

    It covers everything that rich gets as `str`: cells, headings, titles and captions of a table,
    and printed lines. Do not wrap text from outside in `rich.text.Text`.

    Args:
        options: options of `rich.console.Console`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Make a `Text` without control characters; see `rich.console.Console.render_str`."""
        return super().render_str(for_terminal(text), **options)

    def print_text(self, text: str) -> None:
        """Print a text that is not broken where the terminal ends."""
        self.print(text, soft_wrap=True)
