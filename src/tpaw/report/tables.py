"""Tables for the terminal. Text that a model generated never gets here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from tpaw.plan import IterationPlan


def summary_table(summary: dict[str, Any]) -> Table:
    """A row a checkpoint: is it better, and what did its training look like."""
    title = (
        "θ_0 is the SFT model; accuracy with its 95 % interval; rewards over the last half of steps"
    )
    table = Table(title=title, title_style="")
    for heading in ("iteration", "accuracy", "p vs θ_0", "held-out margin", "target reward"):
        table.add_column(heading, justify="right")
    for heading in ("margin", "identical", "truncated", "seconds"):
        table.add_column(heading, justify="right")
    for entry in summary["players"]:
        if entry["iteration"] > 0 and "checkpoint" not in entry:
            continue
        table.add_row(*_summary_row(entry))
    return table


def plan_table(plans: Sequence[IterationPlan]) -> Table:
    """A row an iteration: lineage and cost."""
    table = Table(title="θ_0 is the SFT model; players newest first", title_style="")
    for heading in ("makes", "starts from", "opponents", "main players"):
        table.add_column(heading)
    for heading in ("triples", "steps", "learning rate", "λ", "epochs", "generate", "score ≤"):
        table.add_column(heading, justify="right")
    for plan in plans:
        table.add_row(
            f"θ_{plan.iteration}",
            f"θ_{plan.starts_from}",
            " ".join(f"θ_{j}" for j in plan.opponents),
            " ".join(f"θ_{j}" for j in plan.main_players),
            f"{plan.triples:,}",
            f"{plan.optimizer_steps:,}",
            f"{plan.learning_rate:g}",
            f"{plan.lambda_:g}" if plan.main_players else "–",
            str(plan.epochs),
            f"{plan.to_generate:,}",
            f"{plan.to_score:,}",
        )
    return table


def _summary_row(entry: dict[str, Any]) -> list[str]:
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
        _signed(training, "rewards/target", "rewards/chosen"),  # as TRL says
        _signed(training, "rewards/margins"),
        f"{responses['identical_share']:.1%}" if responses else "–",
        f"{responses['truncated_share']:.1%}" if responses else "–",
        f"{sum(entry['seconds'].values()):.1f}",
    ]


def _signed(means: dict[str, float], *names: str) -> str:
    return next((f"{means[name]:+.3f}" for name in names if name in means), "–")
