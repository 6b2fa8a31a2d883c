"""The table of the probe."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from tpaw.probe.measure import Probe
    from tpaw.probe.verdict import Answers


def probe_table(found: Probe) -> Table:
    """Build a table with one line for each measurement."""
    step, answers, critic, margins = found
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    lines = [
        ("SFT's gradient: share that is signal", f"{step.sft.share:.3f}"),
        ("  p that it is noise", f"{step.sft.p_value:.2g}"),
        ("responses' gradient: share that is signal", f"{step.responses.share:.3f}"),
        ("  p that it is noise", f"{step.responses.p_value:.2g}"),
        ("expected first step: cosine with SFT's", _number(step.cosine)),
        ("  norm ÷ norm of η times SFT's", _number(step.norm_ratio)),
        ("of a batch: cosine with SFT's", f"{step.cosine_of_batches:.3f}"),
        ("  norm of responses ÷ η times targets", _number(step.norm_ratio_of_batches)),
        ("responses that equal the target", f"{answers.identical_share:.1%}"),
        ("  that were truncated", f"{answers.truncated_share:.1%}"),
        (f"different ones of {answers.samples}", f"{answers.different_share:.1%}"),
        *_right_shares(answers),
        (f"  the likeliest of {answers.samples}", _share(answers.likeliest_right_share)),
        (
            "tokens, median of targets and responses",
            f"{answers.target_tokens:g}, {answers.response_tokens:g}",
        ),
        (
            f"  end with {answers.ending.character!r}",
            f"{answers.ending.of_targets:.1%}, {answers.ending.of_responses:.1%}",
        ),
        (f"margin λ(Δ − Γ) after {margins.steps} steps, median", f"{margins.median:.2g}"),
        ("  95 %", f"{margins.high:.2g}"),
        (
            "  95 % of |λΔ| and |λΓ|",
            f"{margins.high_of_targets:.2g}, {margins.high_of_responses:.2g}",
        ),
    ]
    if critic is not None:
        lines += [
            ("small critic: AUC", _number(critic.auc.value)),
            ("  of like length", _number(critic.auc_of_like_length.value)),
            ("  of length alone", _number(critic.auc_of_length_alone.value)),
            (f"  right: of a response, of its best of {critic.samples}",
             f"{_share(critic.right_share)}, {_share(critic.best_right_share)}"),
        ]  # fmt: skip
    for line in lines:
        table.add_row(*line)
    return table


def _right_shares(answers: Answers) -> list[tuple[str, str]]:
    """One line for each temperature, the responses' own first."""
    if not answers.right_shares:
        return [("right responses", "–")]
    names = {t: f"  at T = {t:g}" if t else "  greedy" for t in answers.right_shares}
    names[answers.temperature] = f"right responses at T = {answers.temperature:g}"
    return [(names[t], f"{share:.1%}") for t, share in answers.right_shares.items()]


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
