"""Tables for the terminal. They never contain text that a model generated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from tpaw.config.plan import IterationPlan
from tpaw.errors import printable
from tpaw.storage.failures import readable_size

SUMMARY_HEADINGS = (
    "iteration", "accuracy", "p vs θ_0", "held-out margin", "target reward", "margin", "identical",
    "truncated", "seconds",
)  # fmt: skip


WIDTH_OF_SUMMARY = 126
"""Columns of a terminal that hold the whole table; a narrower one gets `_NARROW` alone."""
_NARROW = ("iteration", "accuracy", "p vs θ_0", "target reward")


def summary_table(summary: dict[str, Any], width: int = WIDTH_OF_SUMMARY) -> Table:
    """Build a table with one line for each checkpoint: evaluation and training metrics.

    Args:
        summary: the content of summary.json.
        width: columns of the terminal.
    """
    caption = (
        "θ_0 is the SFT model. Accuracy has a 95 % interval; p compares it with θ_0. Rewards are "
        "means over the last half of the steps."
    )
    is_narrow = width < WIDTH_OF_SUMMARY
    caption += (
        f" A terminal of {WIDTH_OF_SUMMARY} columns shows more."
        if is_narrow
        else " Identical, truncated: of the responses of the checkpoint before."
    )
    table = Table(caption=caption, caption_style="", caption_justify="left")
    kept = [k for k, h in enumerate(SUMMARY_HEADINGS) if not is_narrow or h in _NARROW]
    for k in kept:
        table.add_column(SUMMARY_HEADINGS[k], justify="right")
    for entry in summary["players"]:
        if (cells := summary_cells(entry)) is not None:
            table.add_row(*(cells[k] for k in kept))
    return table


def summary_cells(entry: dict[str, Any]) -> list[str] | None:
    """The line of a checkpoint under `SUMMARY_HEADINGS`, None if it does not exist yet.

    Args:
        entry: one of the entries `players` of summary.json.
    """
    if entry["iteration"] > 0 and "checkpoint" not in entry:
        return None
    evaluation = entry.get("evaluation", {})
    accuracy, p_value = "–", "–"
    if "exact_match" in evaluation:
        found = evaluation["exact_match"]
        low, high = found["interval_95"]
        accuracy = f"{found['accuracy']:.3f} [{low:.3f}, {high:.3f}]"
        if entry["iteration"] > 0:
            p_value = f"{found['versus_start']['p_value']:.1g}"
    margin = f"{evaluation['logps']['margin']:+.2f}" if "logps" in evaluation else "–"
    training, responses = entry.get("training", {}), entry.get("responses", {})
    return [
        f"θ_{entry['iteration']}",
        accuracy,
        p_value,
        margin,
        _signed(training, "rewards/target"),
        _signed(training, "rewards/margins"),
        f"{responses['identical_share']:.1%}" if responses else "–",
        f"{responses['truncated_share']:.1%}" if responses else "–",
        f"{sum(entry['seconds'].values()):.1f}",
    ]


def suite_table(results: Sequence[dict[str, Any]]) -> Table:
    """Build a table with one line for each checkpoint and one column for each benchmark.

    Args:
        results: the content of each checkpoint's results.json, for one suite.
    """
    first = results[0]
    shots = {task["benchmark"]: task["num_fewshot"] for task in first["tasks"].values()}
    caption = (
        f"Scores of {first['suite']} in percent, by lm-eval {first['versions']['lm_eval']}. "
        "[…] is a 95 % interval, ± a standard error."
    )
    table = Table(caption=caption, caption_style="", caption_justify="left")
    table.add_column("checkpoint")
    for name in first["benchmarks"]:
        table.add_column(f"{name} ({shots[name]}-shot)", justify="right")
    table.add_column("score", justify="right")
    for found in results:
        cells = [_score_cell(part) for part in (*found["benchmarks"].values(), found)]
        table.add_row(found["name"], *cells)
    return table


def suites_of_run(summary: dict[str, Any]) -> list[Table]:
    """Build a table for each suite of a run: one line for each checkpoint, as in `suite_table`.

    Args:
        summary: the content of summary.json.
    """
    tables = []
    for name in dict.fromkeys(n for entry in summary["players"] for n in entry.get("suites", ())):
        entries = [entry for entry in summary["players"] if name in entry.get("suites", ())]
        caption = f"Scores of {name} in percent. ± is a standard error."
        table = Table(caption=caption, caption_style="", caption_justify="left")
        for heading in ("iteration", *entries[0]["suites"][name]["benchmarks"], "score"):
            table.add_column(heading, justify="right")
        for entry in entries:
            found = entry["suites"][name]
            cells = [_score_cell(part) for part in (*found["benchmarks"].values(), found)]
            table.add_row(f"θ_{entry['iteration']}", *cells)
        tables.append(table)
    return tables


def plan_table(plans: Sequence[IterationPlan]) -> Table:
    """Build a table with one line for each iteration: its players and its cost."""
    caption = "θ_0 is the SFT model. Players are listed newest first."
    table = Table(caption=caption, caption_style="", caption_justify="left")
    for heading in ("trains", "starts from", "opponents", "main players"):
        table.add_column(heading)
    for heading in ("triples", "steps", "learning rate", "λ", "epochs", "generate", "score (max)"):
        table.add_column(heading, justify="right")
    for plan in plans:
        table.add_row(
            f"θ_{plan.iteration}",
            f"θ_{plan.starts_from}",
            " ".join(f"θ_{j}" for j in plan.opponents),
            " ".join(f"θ_{j}" for j in plan.main_players) or "–",
            f"{'≤ ' if plan.is_at_most else ''}{plan.triples:,}",
            f"{'≤ ' if plan.is_at_most else ''}{plan.optimizer_steps:,}",
            f"{plan.learning_rate:g}",
            f"{plan.lambda_:g}" if plan.main_players and plan.lambda_ is not None else "–",
            str(plan.epochs),
            f"{plan.to_generate:,}",
            f"{plan.to_score:,}",
        )
    return table


def space_table(spaces: Sequence[Mapping[str, Any]]) -> Table:
    """Build a table with one line for each iteration: what it occupies on disk at most.

    Args:
        spaces: the fields of each `pipeline.space.IterationSpace`.
    """
    caption = (
        "Largest sizes on disk. Other weights: checkpoints of the run that have weights while θ_i "
        "trains. Peak and end: of the run directory, with everything before."
    )
    table = Table(caption=caption, caption_style="", caption_justify="left")
    table.add_column("trains")
    table.add_column("other weights")
    for heading in ("responses", "log-probs", "evaluation", "peak", "end"):
        table.add_column(heading, justify="right")
    for space in spaces:
        sizes = ("responses", "logprobs", "evaluation", "peak", "after")
        table.add_row(
            f"θ_{space['iteration']}",
            " ".join(f"θ_{j}" for j in reversed(space["kept"])) or "–",
            *(readable_size(space[key]) if space[key] else "–" for key in sizes),
        )
    return table


def win_rate_table(results: dict[str, Any]) -> Table:
    """Build a table with one line: the result of a comparison by a judge.

    Args:
        results: the content of results.json.
    """
    table = Table(title=printable(results["measure"]), title_style="")
    headings = ("A", "B", "win rate of A", "wins", "losses", "ties", "identical", "invalid")
    for heading in (*headings, "pairs", "prompts"):
        table.add_column(heading, justify="left" if heading in "AB" else "right")
    rate = "–"
    if results["win_rate"] is not None:
        low, high = results["interval_95"]
        rate = f"{results['win_rate']:.3f} [{low:.3f}, {high:.3f}]"
    ties = results["ties"]
    counts = [results["wins"], results["losses"], sum(ties.values()), ties["identical"]]
    counts += [results[key] for key in ("invalid", "pairs", "prompts")]
    names = (printable(results[side]["name"], 40) for side in "ab")
    table.add_row(*names, rate, *(f"{count:,}" for count in counts))
    return table


def _score_cell(part: dict[str, Any]) -> str:
    if "interval_95" in part:
        low, high = part["interval_95"]
        return f"{part['score']:.1f} [{low:.1f}, {high:.1f}]"
    error = "" if part["stderr"] is None else f" ± {part['stderr']:.1f}"
    return f"{part['score']:.1f}{error}"


def _signed(means: dict[str, float], name: str) -> str:
    return f"{means[name]:+.3f}" if name in means else "–"
