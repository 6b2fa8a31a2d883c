from __future__ import annotations

import io
import re
import unicodedata

import pytest
from rich.table import Table

from tpaw.errors import for_terminal, printable
from tpaw.runtime.console import TextConsole
from tpaw.runtime.progress import progress

HOSTILE = "a\x1b[31mb\x07c\x9bd\x7fe\u202ef\ud800[red]g[/red]:smile:[/nothing]"
SHOWN = r"a\x1b[31mb\x07c\x9bd\x7fe\u202ef\ud800[red]g[/red]:smile:[/nothing]"
BIDI = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


@pytest.fixture
def console():
    return TextConsole(file=io.StringIO(), width=400)


def printed(console):
    return console.file.getvalue()


def test_no_character_that_a_terminal_obeys_is_left():
    everything = "".join(map(chr, range(0x30000)))
    shown = for_terminal(everything)
    shown.encode()
    kinds = {c: unicodedata.category(c) for c in set(shown) - {"\n"}}
    assert not [c for c, kind in kinds.items() if kind in {"Cc", "Cf", "Cs", "Zl", "Zp"}]
    assert not set(shown) & set(BIDI)
    assert for_terminal(HOSTILE) == SHOWN


def test_letters_of_every_language_and_line_breaks_stay():
    text = "θ_0 → 提示\nναι ü “x” …"
    assert for_terminal(text) == text
    assert printable(text) == text.replace("\n", r"\n")


def test_lines_and_tables_show_text_as_it_is(console):
    table = Table(title=HOSTILE, caption=HOSTILE)
    table.add_column(HOSTILE)
    table.add_row(HOSTILE)
    console.print(table)
    console.print_text(HOSTILE)
    assert printed(console).count(SHOWN) == 5
    assert not set(printed(console)) & set("\x1b\x07\x9b\x7f\u202e\ud800")


def test_a_line_is_not_broken_where_the_terminal_ends():
    console = TextConsole(file=io.StringIO(), width=10)
    text = " ".join(["word"] * 20)
    console.print_text(text)
    assert printed(console) == f"{text}\n"


def test_progress_shows_text_as_it_is(console):
    with progress(HOSTILE, 1, "rows", console) as advance:
        advance(1, HOSTILE)
    assert SHOWN in printed(console)
    assert "\x1b" not in printed(console)


def test_a_bar_shows_text_as_it_is():
    console = TextConsole(file=io.StringIO(), width=400, force_terminal=True)
    with progress(HOSTILE, 1, "rows", console) as advance:
        advance(1, HOSTILE)
    assert printed(console).count(SHOWN) >= 2
    assert not set(printed(console)) & set("\x07\x9b\x7f\u202e\ud800")


@pytest.mark.parametrize("is_terminal", [True, False])
def test_bytes_are_shown_in_units_of_their_size(is_terminal):
    console = TextConsole(file=io.StringIO(), width=400, force_terminal=is_terminal)
    with progress("verify", 3_000_000, "bytes", console) as advance:
        advance(1_500_000)
        advance(1_500_000)
    shown = printed(console)
    assert "3.0 MB" in shown
    assert "3000000" not in shown
    assert not re.search(r"\d\d bytes", shown)
