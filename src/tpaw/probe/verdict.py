"""What the measurements of the probe mean, in a few sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from tpaw.critic.comparisons import only_counts_tokens
from tpaw.objectives.base import SATURATED
from tpaw.probe.gradients import FirstStep
from tpaw.statistics.auc import Auc

# Below it, a p-value says that there is something.
SIGNIFICANT = 0.05
# A logistic loss is nearly linear up to this margin: its slope is still 0.38 of 0.5.
LINEAR_TO = 0.5
# With 256 records a critic learned nothing from any model that was tried.
RECORDS_FOR_CRITIC = 1000
# From these shares on, they decide what self-play can do.
MANY_IDENTICAL = 0.5
MANY_TRUNCATED = 0.1


class Ending(NamedTuple):
    """How responses end, beside their targets.

    Attributes:
        character: the most frequent last character of the targets, without spaces at their ends.
        of_targets, of_responses: the share that ends with it.
    """

    character: str
    of_targets: float
    of_responses: float


class Answers(NamedTuple):
    """What the model answers to the probe's prompts.

    Attributes:
        prompts, samples: how many, and how many responses to each.
        temperature: of the responses.
        is_plain: whether they are samples of the model: temperature 1, no top_p, no top_k.
        is_covered: whether docs/concepts/why.md covers the loss: with plain samples its expected
            first step is SFT's.
        identical_share, truncated_share: of all responses.
        right_shares: the share of right responses by temperature: of the responses themselves, and
            of one response to each prompt at lower temperatures, of which 0 is greedy. Empty if it
            cannot be told.
        likeliest_right_share: share of prompts whose likeliest whole response is right; None if it
            cannot be told, or there is one response to each.
        different_share: of the responses to a prompt.
        ending: how targets and responses end.
        target_tokens, response_tokens: medians.
        records_of_data: all that a run would use. Records that are not among the first ones were
            counted and not looked at; a run may skip some of them.
    """

    prompts: int
    samples: int
    temperature: float
    is_plain: bool
    is_covered: bool
    identical_share: float
    truncated_share: float
    right_shares: Mapping[float, float]
    likeliest_right_share: float | None
    different_share: float
    ending: Ending
    target_tokens: float
    response_tokens: float
    records_of_data: int

    def difference(self, temperature: float) -> int:
        """Compare the right responses at a temperature with the sampled ones.

        Returns:
            1 if more of them are right, by more than two standard errors of each share; -1 if fewer
            are, by as much; 0 if it cannot be told.
        """
        if not self.right_shares:
            return 0
        sampled, other = self.right_shares[self.temperature], self.right_shares[temperature]
        error = _two_errors(sampled, self.prompts * self.samples)
        error += _two_errors(other, self.prompts)
        return int(other > sampled + error) - int(other < sampled - error)

    @property
    def best_temperature(self) -> float:
        """Where most responses are right; that of the responses if no lower one is better."""
        better = [t for t in self.right_shares if self.difference(t) > 0]
        return max(better, key=self.right_shares.__getitem__, default=self.temperature)


class CriticFound(NamedTuple):
    """What a critic learns from the probe's records.

    Attributes:
        auc, auc_of_like_length, auc_of_length_alone: on prompts that had no part in the fit.
        right_share, best_right_share: of the responses to these prompts, and of the critic's best
            ones; None if it cannot be told.
        samples: responses to a prompt.
    """

    auc: Auc
    auc_of_like_length: Auc
    auc_of_length_alone: Auc
    right_share: float | None
    best_right_share: float | None
    samples: int


class Margins(NamedTuple):
    """Rewards and margins after a few steps, and at the end of an iteration if they grew as before.

    Attributes:
        steps, steps_of_iteration: the steps that were made, and those of an iteration.
        median, high: median and 95th percentile of |λ(Δ − Γ)| after `steps`.
        high_of_targets, high_of_responses: 95th percentile of |λΔ| and of |λΓ|.
    """

    steps: int
    steps_of_iteration: int
    median: float
    high: float
    high_of_targets: float
    high_of_responses: float

    @property
    def high_at_the_end(self) -> float:
        """An upper bound: growth slows down."""
        return self.high * max(self.steps_of_iteration / self.steps, 1)


def conclusion(step: FirstStep, answers: Answers, critic: CriticFound | None) -> str:
    """What self-play can be expected to add to SFT here, and what would have to change."""
    if answers.truncated_share > MANY_TRUNCATED:
        return (
            f"{answers.truncated_share:.0%} of the responses are cut at the length limit, so "
            "self-play would first of all teach the model to end. Raise generate.max_new_tokens, "
            "then probe again."
        )
    if not (answers.is_plain and answers.is_covered):
        return _conclusion_elsewhere(step, answers)
    if not _has_converged(step):
        return (
            "SFT has not converged on these records, and the expected first step of self-play is "
            "SFT's: expect what more SFT would give. Train with more SFT first (recipe "
            "sft_continue), or compare with as many steps of it."
        )
    nothing = (
        f"SFT has converged, {_as_far_as(answers)}, and the expected first step of self-play is "
        "SFT's: do not expect a gain in likelihood of either."
    )
    return f"{nothing} {_what_would_have_to_change(answers, critic)}"


def _as_far_as(answers: Answers) -> str:
    """How sure it is that SFT has converged: a small gradient needs many records to be seen."""
    return f"as far as {answers.prompts:,} of {answers.records_of_data:,} records can show"


def _conclusion_elsewhere(step: FirstStep, answers: Answers) -> str:
    """Where the first step need not be SFT's."""
    sft = "has not converged on these records"
    if _has_converged(step):
        sft = f"has converged, {_as_far_as(answers)}"
    reason = (
        "the argument does not cover this loss"
        if answers.is_plain
        else "its responses are not samples at temperature 1"
    )
    return (
        f"SFT {sft}. The first step of self-play need not be SFT's here, because {reason}: only a "
        "run tells whether it gains. Compare it with SFT of as many steps (recipe sft_continue)."
    )


def _what_would_have_to_change(answers: Answers, critic: CriticFound | None) -> str:
    """Of a model on which SFT has converged. What costs nothing comes first."""
    likeliest = _about_the_likeliest(answers) if _likeliest_wins(answers) else ""
    if _greedy_misleads(answers):
        decoding = (
            "What can change the share of right responses is decoding: greedy responses are right "
            f"less often ({answers.right_shares[0]:.1%}) than sampled ones "
            f"({answers.right_shares[answers.temperature]:.1%}), so sample at temperature "
            f"{answers.best_temperature:g}."
        )
        return f"{decoding} {likeliest}".strip()
    decoding = ""
    if (best := answers.best_temperature) != answers.temperature:
        decoding = (
            f"Decode at {_named(best)} first, which costs nothing: "
            f"{answers.right_shares[best]:.1%} of the responses are right there, "
            f"{answers.right_shares[answers.temperature]:.1%} at T = {answers.temperature:g}. "
        )
    return decoding + (likeliest or _what_else(answers, critic))


def _what_else(answers: Answers, critic: CriticFound | None) -> str:
    if answers.identical_share > MANY_IDENTICAL:
        return (
            f"{answers.identical_share:.0%} of the responses equal their target already, so these "
            "records have little left to teach: other records would have to come."
        )
    outside = "other records, or a checker of right responses (recipe self_training)"
    if critic is None:
        return f"Something else would have to come: {outside}."
    if not _tells(critic):
        return (
            "A small critic finds nothing either in which targets and responses differ. Something "
            f"else would have to come: {outside}."
        )
    if _counts_tokens(critic):
        return (
            "A small critic tells targets from responses, but it may know nothing but their "
            f"length. Something else would have to come: {outside}."
        )
    return (
        "A small critic tells targets from responses, so another reward than the likelihood "
        "has something to go by: method critic may use it. Where it was tried with several seeds, "
        "it was no better than SFT whose learning rate was tuned for the same decoding."
    )


def _about_the_likeliest(answers: Answers) -> str:
    best = answers.best_temperature
    return (
        f"The likeliest of {answers.samples} sampled responses is right more often "
        f"({answers.likeliest_right_share:.1%}) than a single one at any temperature "
        f"({answers.right_shares[best]:.1%} at {_named(best)}). Recipe sharpening trains on it. "
        "Compare the result with this model and with SFT of as many steps, each at its best "
        "temperature."
    )


def _named(temperature: float) -> str:
    return f"T = {temperature:g}" if temperature else "T = 0 (greedy decoding)"


def verdict(
    step: FirstStep, answers: Answers, critic: CriticFound | None, margins: Margins | None
) -> list[str]:
    """The evidence in sentences, for a person who is about to pay for a run."""
    return [
        _about_sft(step, answers),
        *_about_responses(step, answers),
        *(_about_no_critic(answers) if critic is None else _about_critic(critic, answers)),
        *(_about_margins(margins) if margins is not None else ()),
    ]


def _has_converged(step: FirstStep) -> bool:
    """Whether SFT's gradient cannot be told from noise."""
    return step.sft.p_value > SIGNIFICANT


def _two_errors(share: float, count: int) -> float:
    """Two standard errors of a share."""
    return 2 * math.sqrt(share * (1 - share) / count)


def _greedy_misleads(answers: Answers) -> bool:
    """Whether greedy responses are right less often than sampled ones."""
    return answers.difference(0.0) < 0


def _likeliest_wins(answers: Answers) -> bool:
    """Whether the likeliest of several responses is right more often than other decoding gives."""
    likeliest = answers.likeliest_right_share
    if likeliest is None:
        return False
    best = max(answers.right_shares.values())
    errors = _two_errors(likeliest, answers.prompts) + _two_errors(best, answers.prompts)
    return likeliest > best + errors


def _tells(critic: CriticFound) -> bool:
    return critic.auc.interval_95[0] > 0.5


def _counts_tokens(critic: CriticFound) -> bool:
    return only_counts_tokens(critic.auc_of_like_length, critic.auc_of_length_alone)


def _about_sft(step: FirstStep, answers: Answers) -> str:
    p = f"p = {step.sft.p_value:.2g}, {step.sft.batches} batches"
    if _has_converged(step):
        more = ""
        if answers.prompts < answers.records_of_data:
            more = " More records may tell it: ask with --rows."
        return (
            f"SFT's gradient cannot be told from noise ({p}): more SFT has nothing to gain in "
            f"likelihood that these records could show.{more}"
        )
    return f"{step.sft.share:.0%} of a batch's squared SFT gradient is signal ({p})."


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
            "nothing, so self-play has few records to learn from."
        )
    if not answers.is_plain:
        told = "can" if step.responses.p_value <= SIGNIFICANT else "cannot"
        yield (
            "The responses are not samples at temperature 1, so self-play can move where SFT does "
            f"not. Their gradient {told} be told from noise (p = {step.responses.p_value:.2g})."
        )
    yield from _about_decoding(answers)


def _about_decoding(answers: Answers) -> Iterator[str]:
    best, shares = answers.best_temperature, answers.right_shares
    if _greedy_misleads(answers):
        lower = "No lower temperature makes this better."
        if best != answers.temperature:
            lower = f"At T = {best:g} {shares[best]:.1%} are right."
        yield (
            f"Greedy responses are right less often ({shares[0]:.1%}) than sampled ones "
            f"({shares[answers.temperature]:.1%}): the likeliest first tokens lead away from the "
            f"right answers. {lower} Of the methods that were tried so far, sharpening alone "
            "changed it; opponents at a higher temperature did not."
        )
    elif best != answers.temperature:
        yield (
            f"A lower temperature alone raises the share of right responses from "
            f"{shares[answers.temperature]:.1%} at T = {answers.temperature:g} to "
            f"{shares[best]:.1%} at {_named(best)}. It costs nothing; a method must beat it."
        )


def _about_no_critic(answers: Answers) -> Iterator[str]:
    if answers.prompts >= RECORDS_FOR_CRITIC:
        return
    needs = f"Method critic was not tried: a critic needs {RECORDS_FOR_CRITIC:,} records or more"
    if answers.records_of_data < RECORDS_FOR_CRITIC:
        yield f"{needs}, and a run would use {answers.records_of_data:,}."
        return
    yield f"{needs}. Ask with --rows {RECORDS_FOR_CRITIC} or more; this takes longer."


def _about_critic(critic: CriticFound, answers: Answers) -> Iterator[str]:
    low, high = critic.auc.interval_95
    shown = f"AUC {critic.auc.value:.3f} [{low:.3f}, {high:.3f}], {critic.auc.prompts} prompts"
    if not _tells(critic):
        more = ""
        if answers.prompts < answers.records_of_data:
            more = (
                " A critic needs many records: try the "
                f"{answers.records_of_data} of the data with --rows."
            )
        yield (
            f"A small critic cannot tell targets from responses ({shown}). With {answers.prompts} "
            f"records, method critic has nothing to gain.{more}"
        )
        return
    length, alike = critic.auc_of_length_alone.value, critic.auc_of_like_length
    if _counts_tokens(critic):
        known = f"{alike.value:.3f}, {alike.pairs} pairs" if alike.pairs else "no pairs"
        yield (
            f"A small critic tells targets from responses ({shown}), but it may know nothing but "
            f"their length (AUC of length alone {length:.3f}; of like length: {known}). What "
            f"it chooses may be only {'long' if length > 0.5 else 'short'}, not good."
        )
        return
    gain = ""
    if critic.right_share is not None and critic.best_right_share is not None:
        gain = (
            f" Its best of {critic.samples} responses is right in {critic.best_right_share:.1%}, a "
            f"response in {critic.right_share:.1%}."
        )
    yield (
        f"A small critic tells targets from responses ({shown}), so method critic has something "
        f"to go by.{gain} Compare it with SFT of as many steps, tuned for the same decoding."
    )


def _about_margins(margins: Margins) -> Iterator[str]:
    if margins.high >= SATURATED:
        state = (
            "saturated for one pair in twenty or more, which then teaches nothing more: lower "
            "objective.lambda"
        )
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
