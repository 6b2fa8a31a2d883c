"""What method critic shows beside the usual table, and the alarm when its critic is exploited."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from rich.table import Table

# A policy that exploits its critic pleases the critic of iteration 1 more and more, by this many
# standard deviations of its scores, …
HIGHER_SCORE = 0.1
# … while targets get less likely, by this share of their log-prob, …
LOWER_LOGP = 0.05
# … and its responses to a prompt become alike, by this share of the different ones.
FEWER_DIFFERENT = 0.1
# Or fewer of its responses are right, by this many standard errors of the difference.
FEWER_RIGHT = 2.0
ADVICE = (
    "Use an earlier checkpoint, fewer iterations or a critic that starts anew in each iteration "
    "(critic.each_iteration: fresh)."
)


def critic_tables(summary: Mapping[str, Any]) -> list[Table]:
    """Build a table with one line for each iteration; none if no critic was fitted.

    Args:
        summary: the content of summary.json.
    """
    entries = [entry for entry in summary["players"] if "critic" in entry]
    if not entries:
        return []
    caption = (
        "AUC: share of pairs in which the critic likes the target better than a response, on "
        "prompts that had no part in the fit; 0.5 is chance. Right: share of right responses, and "
        "of the critic's best ones, on those prompts. Different: share of different responses. "
        "Log-prob: of held-out targets, after the iteration."
    )
    table = Table(caption=caption, caption_style="", caption_justify="left")
    headings = ("iteration", "AUC", "of like length", "of length alone", "right", "best right")
    for heading in (*headings, "different", "log-prob"):
        table.add_column(heading, justify="right")
    for entry in entries:
        critic = entry["critic"]
        low, high = critic["auc"]["interval_95"]
        interval = f" [{low:.3f}, {high:.3f}]" if low is not None else ""
        logps = entry.get("evaluation", {}).get("logps")
        table.add_row(
            str(entry["iteration"]),
            _number(critic["auc"]["value"]) + interval,
            _number(critic["auc_of_like_length"]["value"]),
            _number(critic["auc_of_length_alone"]["value"]),
            _number(critic.get("right_share_heldout")),
            _number(critic.get("best_right_share_heldout")),
            _number(critic["different_share"]),
            f"{logps['target_logp']:.2f}" if logps else "–",
        )
    return [table]


def exploited(players: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say in which iteration the policy began to exploit its critic, if it did.

    Args:
        players: the entries `players` of summary.json.
    """
    start = players[0].get("evaluation", {}).get("logps")
    judged = [entry for entry in players if "critic" in entry]
    if not judged:
        return []
    first = judged[0]["critic"]
    for before, entry in pairwise(judged):
        # The responses of an iteration come from the checkpoint that the one before trained.
        critic = entry["critic"]
        rise = critic["score_by_first_critic"] - first["score_by_first_critic"]
        if rise <= HIGHER_SCORE * first["spread_of_scores"]:
            continue
        liked = (
            f"θ_{before['iteration']} may exploit its critic: the critic of iteration 1 likes its "
            f"responses better (by {rise / first['spread_of_scores']:.2f} standard deviations), but"
        )
        if (right := _fewer_right(first, critic)) is not None:
            return [f"{liked} fewer of them are right: {right}. {ADVICE}"]
        logps = before.get("evaluation", {}).get("logps")
        if start is None or logps is None:
            continue
        fall = start["target_logp"] - logps["target_logp"]
        loss = 1 - critic["different_share"] / first["different_share"]
        if fall > LOWER_LOGP * abs(start["target_logp"]) and loss > FEWER_DIFFERENT:
            return [
                f"{liked} held-out targets lost {fall:.2f} nats, and {loss:.0%} fewer responses to "
                f"a prompt differ. {ADVICE}"
            ]
    return []


def _fewer_right(first: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Both shares of right responses, if the second one is lower by more than chance."""
    before, after = first.get("right_share"), now.get("right_share")
    if before is None or after is None:
        return None
    # As if each prompt had one response: those to the same prompt are not independent.
    variance = (before * (1 - before) + after * (1 - after)) / now["prompts"]
    if before - after <= FEWER_RIGHT * variance**0.5:
        return None
    return f"{after:.1%}, of θ_0's {before:.1%}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
