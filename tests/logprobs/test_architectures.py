"""Some architectures of the table in docs/reference/models.md; `checks/` has all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from architectures import ARCHITECTURES, Examined, cells, examined

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "models.md"
# One of each kind, fast: head, layout, window, sinks, experts, refused, who answers.
SOME = [
    "bart",
    "bert",
    "cohere2",
    "falcon",
    "gemma2",
    "gpt2",
    "gpt_oss",
    "llama-dynamic",
    "llama4_text",
    "minimax",
    "nemotron",
    "qwen3_moe",
    "recurrent_gemma",
    "reformer",
]


def table():
    """Name -> the other cells of the row, and the text below the table."""
    rows, _, below = PAGE.read_text(encoding="utf-8").partition("| --- |")[2].partition("\n\n")
    lines = [line.split("|")[1:-1] for line in rows.splitlines()[1:]]
    return {name.strip(): [cell.strip() for cell in rest] for name, *rest in lines}, below


def test_every_architecture_has_a_row_and_none_is_wrong():
    rows, below = table()
    assert list(rows) == list(ARCHITECTURES)
    assert len(rows) > 150
    assert "WRONG" not in PAGE.read_text(encoding="utf-8")
    assert f"{len(rows)} models" in below


@pytest.mark.parametrize("name", SOME)
def test_an_architecture_is_right_and_as_the_table_says(name):
    found = examined(name)
    assert found.failures == ()
    rows, below = table()
    if f"transformers {transformers.__version__}:" in below:
        assert [" ".join(cell.split()) for cell in cells(found)] == rows[name]


def test_the_table_shows_what_is_wrong():
    found = Examined("packed", "fused", "", (), ("greedy answers: 1 of 5",), {})
    assert cells(found) == ("packed", "fused", "", "WRONG: greedy answers: 1 of 5")
