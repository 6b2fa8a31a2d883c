"""Whether a checkpoint is better than θ_0, as sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

NOT_COMPARED = (
    "Whether as many steps of SFT on the same records would do as well is not part of a run: run "
    "the recipe sft_continue and use `tpaw compare`."
)


def verdict(summary: Mapping[str, Any]) -> list[str]:
    """One or two sentences: where the run is, and whether it is better than θ_0."""
    done, total = summary["iterations_done"], summary["iterations"]
    state = (
        f"All {total} iterations are done."
        if done == total
        else f"{done} of {total} iterations are done."
    )
    found = against_start(summary["players"])
    if found is None:
        return [state]
    return [f"{state} {found}", *([] if summary["method"] == "sft" else [NOT_COMPARED])]


def against_start(players: Sequence[Mapping[str, Any]]) -> str | None:
    """A sentence: the accuracy of the newest checkpoint, and the test against that of θ_0.

    Args:
        players: entries `players` of summary.json, from θ_0 on.

    Returns:
        The sentence; None if no checkpoint but θ_0 has a held-out accuracy.
    """
    evaluated = [p for p in players if "exact_match" in p.get("evaluation", {})]
    if len(evaluated) < 2:
        return None
    last, start = evaluated[-1], evaluated[0]["evaluation"]["exact_match"]
    found = last["evaluation"]["exact_match"]
    low, high = found["interval_95"]
    p = found["versus_start"]["p_value"]
    difference = found["accuracy"] - start["accuracy"]
    than = "the same as" if difference == 0 else "better than" if difference > 0 else "worse than"
    sure = "" if p < 0.05 or difference == 0 else ", which may be chance"
    return (
        f"θ_{last['iteration']} answers {found['accuracy']:.1%} [{low:.1%}, {high:.1%}] of "
        f"{found['items']:,} held-out problems right, θ_0 {start['accuracy']:.1%}: {than} θ_0"
        f"{sure} (exact McNemar test, p = {p:.1g})."
    )
