"""The table of `tpaw compare`."""

from __future__ import annotations

from rich.table import Table

from tpaw.evaluation.compare import Comparison, ComparisonRow


def comparison_table(comparison: Comparison) -> Table:
    """Build a table with one line for each measure and system."""
    over = comparison.suite or "each run's held-out records"
    tests = f"{comparison.tests} test" + ("" if comparison.tests == 1 else "s")
    caption = (
        f"The baseline is {comparison.systems[0]}.\n"
        f"value = mean over the items of {over}, with its 95 % interval.\n"
        "lost : won = items that only the baseline / only this system solved.\n"
        f"Holm p = p-value corrected for {tests}."
    )
    table = Table(caption=caption, caption_style="", caption_justify="left")
    table.add_column("measure")
    table.add_column("system", overflow="fold")
    for heading in ("items", "value", "difference", "lost : won", "p", "Holm p"):
        table.add_column(heading, justify="right")
    last = None
    for row in comparison.rows:
        if last is not None and row.measure != last:
            table.add_section()
        table.add_row(*_cells(row, repeated=row.measure == last))
        last = row.measure
    return table


def _cells(row: ComparisonRow, *, repeated: bool) -> list[str]:
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
        "" if repeated else row.measure,
        row.system,
        "–" if row.items is None else f"{row.items:,}",
        value,
        difference,
        counts,
        "–" if row.p_value is None else f"{row.p_value:.2g}",
        "–" if row.holm_p_value is None else f"{row.holm_p_value:.2g}",
    ]
