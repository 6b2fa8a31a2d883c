"""What the measurements of the probe mean, in a few sentences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from tpaw.critic.comparisons import only_counts_tokens
from tpaw.probe.gradients import FirstStep
from tpaw.statistics.auc import Auc

# Below it, a p-value says that there is something.
SIGNIFICANT = 0.05
# A logistic loss is nearly linear up to this margin: its slope is still 0.38 of 0.5.
LINEAR_TO = 0.5
# From this margin on its slope is below a tenth of that at 0.
SATURATED_FROM = 3.0
# With 256 rows a critic learned nothing from any model that was tried.
ROWS_FOR_CRITIC = 1000
# From these shares on, they decide what self-play can do.
MANY_IDENTICAL = 0.5
MANY_TRUNCATED = 0.1


class Answers(NamedTuple):
    """What the model answers to the probe's prompts.

    Attributes:
        prompts, samples: how many, and how many responses to each.
        temperature: of the responses.
        is_plain: whether they are samples of the model: temperature 1, no top_p, no top_k.
        identical_share, truncated_share: of all responses.
        right_share: of sampled responses; None if it cannot be told.
        greedy_right_share: of greedy responses; None if it cannot be told.
        different_share: of the responses to a prompt.
        target_tokens, response_tokens: medians.
    """

    prompts: int
    samples: int
    temperature: float
    is_plain: bool
    identical_share: float
    truncated_share: float
    right_share: float | None
    greedy_right_share: float | None
    different_share: float
    target_tokens: float
    response_tokens: float


class CriticFound(NamedTuple):
    """What a critic learns from the probe's rows.

    Attributes:
        auc, auc_of_like_length, auc_of_length_alone: on prompts that had no part in the fit.
        right_share, best_right_share: of the responses to these prompts, and of the critic's best
            ones; None if it cannot be told.
        samples: responses to a prompt.
        rows, rows_of_data: what the probe used, and all that a run would use.
    """

    auc: Auc
    auc_of_like_length: Auc
    auc_of_length_alone: Auc
    right_share: float | None
    best_right_share: float | None
    samples: int
    rows: int
    rows_of_data: int


class Margins(NamedTuple):
    """Margins λ(Δ − Γ) after a few steps, and at the end of an iteration if they grew as before.

    Attributes:
        steps, steps_of_iteration: the steps that were made, and those of an iteration.
        median, high: median and 95th percentile of |λ(Δ − Γ)| after `steps`.
    """

    steps: int
    steps_of_iteration: int
    median: float
    high: float

    @property
    def high_at_the_end(self) -> float:
        """An upper bound: growth slows down."""
        return self.high * max(self.steps_of_iteration / self.steps, 1)


def verdict(
    step: FirstStep, answers: Answers, critic: CriticFound | None, margins: Margins | None
) -> list[str]:
    """Sentences for a person who is about to pay for a run."""
    return [
        *_about_sft(step),
        *_about_responses(step, answers),
        *(_about_no_critic(answers) if critic is None else _about_critic(critic)),
        *(_about_margins(margins) if margins is not None else ()),
    ]


def _about_sft(step: FirstStep) -> Iterator[str]:
    p = f"p = {step.sft.p_value:.2g}, {step.sft.batches} batches"
    if step.sft.p_value > SIGNIFICANT:
        yield (
            "SFT has converged, as far as these rows can show: its gradient cannot be told from "
            f"noise ({p}). More SFT has nothing to gain in likelihood, and self-play against "
            "samples at temperature 1 neither: its expected first step is SFT's."
        )
        return
    yield (
        f"SFT has not converged on these rows: {step.sft.share:.0%} of a batch's squared gradient "
        f"is signal ({p}). What self-play gains first is what more SFT gains: compare with SFT of "
        "as many steps (recipe sft_continue)."
    )


def _about_responses(step: FirstStep, answers: Answers) -> Iterator[str]:
    if answers.truncated_share > MANY_TRUNCATED:
        yield (
            f"{answers.truncated_share:.0%} of the responses reach the length limit. Self-play "
            "would teach the model to end: raise generate.max_new_tokens if that is not what you "
            "want."
        )
    if answers.identical_share > MANY_IDENTICAL:
        yield (
            f"{answers.identical_share:.0%} of the responses equal their target. Such pairs teach "
            "nothing, so self-play has few rows to learn from."
        )
    if not answers.is_plain:
        told = "can" if step.responses.p_value <= SIGNIFICANT else "cannot"
        yield (
            "The responses are not samples at temperature 1, so self-play can move where SFT does "
            f"not. Their gradient {told} be told from noise (p = {step.responses.p_value:.2g})."
        )
    greedy, sampled = answers.greedy_right_share, answers.right_share
    if greedy is None or sampled is None:
        return
    # Two standard errors of a share.
    error = 2 * (sampled * (1 - sampled) / (answers.prompts * answers.samples)) ** 0.5
    error += 2 * (greedy * (1 - greedy) / answers.prompts) ** 0.5
    if greedy < sampled - error:
        yield (
            f"Greedy responses are right less often ({greedy:.1%}) than sampled ones "
            f"({sampled:.1%}): the likeliest first tokens lead away from the right answers. A "
            "lower temperature makes this worse. Opponents at a higher temperature "
            "(generate.temperature 1.5 to 2) or a choice among several responses can help."
        )
    elif greedy > sampled + error:
        yield (
            f"Greedy decoding alone raises the share of right responses from {sampled:.1%} to "
            f"{greedy:.1%}. It costs nothing; a method must beat it."
        )


def _about_no_critic(answers: Answers) -> Iterator[str]:
    if answers.prompts < ROWS_FOR_CRITIC:
        yield (
            f"Method critic was not tried: a critic needs {ROWS_FOR_CRITIC:,} rows or more. Ask "
            f"with --rows {ROWS_FOR_CRITIC} or more; this takes longer."
        )


def _about_critic(critic: CriticFound) -> Iterator[str]:
    low, high = critic.auc.interval_95
    shown = f"AUC {critic.auc.value:.3f} [{low:.3f}, {high:.3f}], {critic.auc.prompts} prompts"
    if not low > 0.5:
        more = ""
        if critic.rows < critic.rows_of_data:
            more = (
                f" A critic needs many rows: try the {critic.rows_of_data} of the data with --rows."
            )
        yield (
            f"A small critic cannot tell targets from responses ({shown}). With {critic.rows} "
            f"rows, method critic has nothing to gain.{more}"
        )
        return
    length, alike = critic.auc_of_length_alone.value, critic.auc_of_like_length
    if only_counts_tokens(alike, critic.auc_of_length_alone):
        yield (
            f"A small critic tells targets from responses ({shown}), but by their length (AUC of "
            f"length alone {length:.3f}; of like length {alike.value:.3f}). What it chooses would "
            f"be {'long' if length > 0.5 else 'short'}, not good."
        )
        return
    gain = ""
    if critic.right_share is not None and critic.best_right_share is not None:
        gain = (
            f" Its best of {critic.samples} responses is right in {critic.best_right_share:.1%}, a "
            f"response in {critic.right_share:.1%}."
        )
    yield (
        f"A small critic tells targets from responses ({shown}). Method critic may gain what SFT "
        f"cannot.{gain} Compare it with SFT of as many steps: where it was tried so far, it did "
        "not gain."
    )


def _about_margins(margins: Margins) -> Iterator[str]:
    if margins.high >= SATURATED_FROM:
        state = "saturated for many pairs, which then teach nothing more: lower objective.lambda"
    elif margins.high_at_the_end <= LINEAR_TO:
        state = "linear for nearly all pairs: objective.lambda then only scales the gradient"
    else:
        state = "between linear and saturated"
    at_the_end = ""
    if margins.steps < margins.steps_of_iteration:
        at_the_end = (
            f"; at the end of an iteration of {margins.steps_of_iteration} steps at most "
            f"{margins.high_at_the_end:.2g}"
        )
    yield (
        f"After {margins.steps} steps the margins λ(Δ − Γ) are {margins.median:.2g} (median) and "
        f"{margins.high:.2g} (95 %){at_the_end}. The logistic is {state}."
    )
