"""The table of `tpaw compare`."""

from __future__ import annotations

from rich.table import Table

from tpaw.evaluation.compare import Comparison, ComparisonRow

HEADINGS = ("measure", "system", "items", "value", "difference", "lost : won", "p", "Holm p")


def comparison_table(comparison: Comparison) -> Table:
    """Build a table with one line for each measure and system."""
    table = Table(caption=caption_of(comparison), caption_style="", caption_justify="left")
    measure, system, *numbers = HEADINGS
    table.add_column(measure)
    table.add_column(system, overflow="fold")
    for heading in numbers:
        table.add_column(heading, justify="right")
    last = None
    for row in comparison.rows:
        if last is not None and row.measure != last:
            table.add_section()
        first, *cells = cells_of(row)
        table.add_row("" if row.measure == last else first, *cells)
        last = row.measure
    return table


def caption_of(comparison: Comparison) -> str:
    """What the columns mean."""
    over = comparison.suite or "each run's held-out records"
    tests = f"{comparison.tests} test" + ("" if comparison.tests == 1 else "s")
    return (
        f"The baseline is {comparison.systems[0]}.\n"
        f"value = mean over the items of {over}, with its 95 % interval.\n"
        "lost : won = items that only the baseline / only this system solved.\n"
        f"Holm p = p-value corrected for {tests}."
    )


def cells_of(row: ComparisonRow) -> list[str]:
    """A line of the table, under `HEADINGS`."""
    value, difference = f"{row.value:.3f}", "–"
    if row.interval_95 is not None:
        value += f" [{row.interval_95.low:.3f}, {row.interval_95.high:.3f}]"
    if row.difference is not None:
        difference = f"{row.difference:+.3f}"
    if row.difference_interval_95 is not None:
        low, high = row.difference_interval_95
        difference += f" [{low:+.3f}, {high:+.3f}]"
    counts = "–" if row.only_baseline is None else f"{row.only_baseline} : {row.only_system}"
    return [
        row.measure,
        row.system,
        "–" if row.items is None else f"{row.items:,}",
        value,
        difference,
        counts,
        "–" if row.p_value is None else f"{row.p_value:.2g}",
        "–" if row.holm_p_value is None else f"{row.holm_p_value:.2g}",
    ]
