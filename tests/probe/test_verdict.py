"""The probe's sentences: each says what its numbers mean, and only then."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from tpaw.probe.gradients import FirstStep
from tpaw.probe.verdict import Answers, CriticFound, Ending, Margins, conclusion, verdict
from tpaw.statistics.auc import Auc
from tpaw.statistics.gradients import Signal

CONVERGED = Signal(squared_norm=0.0, share=0.001, p_value=0.6, batches=16)
LEARNING = Signal(squared_norm=1.0, share=0.4, p_value=0.0005, batches=16)
STEP = FirstStep(CONVERGED, CONVERGED, float("nan"), float("nan"), 0.98, 0.2)
ANSWERS = Answers(
    prompts=256, samples=4, temperature=1.0, is_plain=True, is_covered=True, identical_share=0.01,
    truncated_share=0.0, right_shares={}, likeliest_right_share=None, different_share=0.9,
    ending=Ending(".", 0.9, 0.8), target_tokens=12, response_tokens=12, records_of_data=256,
)  # fmt: skip
CHANCE = Auc(0.51, (0.47, 0.55), 900, 64)
TELLS = Auc(0.7, (0.66, 0.74), 900, 64)
CRITIC = CriticFound(CHANCE, CHANCE, CHANCE, None, None, samples=4)
MARGINS = Margins(10, 20, median=0.01, high=0.05, high_of_targets=0.04, high_of_responses=0.03)


def said(step=STEP, answers=ANSWERS, critic=CRITIC, margins=MARGINS):
    return " ".join(verdict(step, answers, critic, margins))


def test_a_converged_model_has_nothing_to_gain():
    text = said()
    assert "SFT's gradient cannot be told from noise (p = 0.6, 16 batches)" in text
    assert "method critic has nothing to gain" in text
    assert "linear for nearly all pairs" in text
    for other in ("is signal", "Greedy", "length limit", "at temperature 1, so", "--rows"):
        assert other not in text


def test_where_sft_still_learns_it_is_what_to_compare_with():
    text = said(STEP._replace(sft=LEARNING, cosine=1.0))
    assert "40% of a batch's squared SFT gradient is signal (p = 0.0005, 16 batches)" in text
    assert "cannot be told from noise" not in text


def right(sampled, half, fifth, greedy):
    return ANSWERS._replace(right_shares={1.0: sampled, 0.5: half, 0.2: fifth, 0.0: greedy})


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (
            right(0.4, 0.2, 0.1, 0.0),
            "Greedy responses are right less often (0.0%) than sampled ones (40.0%): the likeliest "
            "first tokens lead away from the right answers. No lower temperature makes this better",
        ),
        (right(0.4, 0.7, 0.6, 0.0), "right answers. At T = 0.5 70.0% are right."),
        (
            right(0.5, 0.6, 0.7, 0.9),
            "raises the share of right responses from 50.0% at T = 1 to 90.0% at T = 0 (greedy "
            "decoding). It costs nothing",
        ),
        (right(0.5, 0.6, 0.8, 0.7), "from 50.0% at T = 1 to 80.0% at T = 0.2. It costs nothing"),
    ],
)
def test_lower_temperatures_against_sampling(answers, expected):
    text = said(answers=answers)
    assert expected in text
    assert ("Greedy responses" in text) != ("A lower temperature alone" in text)


def test_a_difference_within_the_error_is_not_told():
    # The standard errors are √(.5·.5/1024) = .0156 and √(.5·.5/256) = .031: twice both, .094.
    # That of .59 and .60 over 256 is .0307, that of .41 the same.
    for alike in (right(0.5, 0.5, 0.59, 0.5), right(0.5, 0.5, 0.5, 0.41)):
        assert alike.best_temperature == 1
        text = said(answers=alike)
        assert "Greedy" not in text
        assert "A lower temperature" not in text
    assert "at T = 0.2" in said(answers=right(0.5, 0.5, 0.6, 0.5))
    assert "Greedy responses are right less often" in said(answers=right(0.5, 0.5, 0.5, 0.4))


def test_lower_is_compared_with_the_temperature_of_the_responses():
    hot = ANSWERS._replace(temperature=1.5, right_shares={1.5: 0.3, 1.0: 0.6, 0.5: 0.5, 0.0: 0.3})
    assert "from 30.0% at T = 1.5 to 60.0% at T = 1." in said(answers=hot)


def test_responses_that_cannot_teach():
    assert "reach the length limit" in said(answers=ANSWERS._replace(truncated_share=0.3))
    assert "equal their target" in said(answers=ANSWERS._replace(identical_share=0.8))


@pytest.mark.parametrize(("signal", "word"), [(LEARNING, "can"), (CONVERGED, "cannot")])
def test_responses_that_are_no_samples_of_the_model(signal, word):
    text = said(STEP._replace(responses=signal), ANSWERS._replace(is_plain=False))
    assert "self-play can move where SFT does not" in text
    assert f"Their gradient {word} be told from noise" in text


def test_a_critic_that_tells_targets_from_responses():
    found = CRITIC._replace(auc=TELLS, auc_of_like_length=TELLS)
    text = said(critic=found)
    assert "method critic has something to go by." in text
    assert "Its best" not in text
    checked = found._replace(right_share=0.5, best_right_share=0.7)
    assert "Its best of 4 responses is right in 70.0%, a response in 50.0%." in said(critic=checked)


def test_a_critic_that_only_counts_tokens_is_caught():
    long = Auc(0.9, (0.85, 0.95), 900, 64)
    text = said(critic=CRITIC._replace(auc=TELLS, auc_of_length_alone=long))
    assert "may know nothing but their length" in text
    assert "may be only long, not good" in text
    pairs = CRITIC.auc_of_like_length.pairs
    assert f"of like length: {CRITIC.auc_of_like_length.value:.3f}, {pairs} pairs)" in text
    nothing = Auc(math.nan, (math.nan, math.nan), 0, 0)
    none = CRITIC._replace(auc=TELLS, auc_of_length_alone=long, auc_of_like_length=nothing)
    assert "of like length: no pairs)" in said(critic=none)
    assert "something to go by" not in text
    # One that also tells targets from responses of like length knows more than the length.
    both = CRITIC._replace(auc=TELLS, auc_of_length_alone=long, auc_of_like_length=TELLS)
    assert "something to go by" in said(critic=both)


def test_more_rows_may_make_a_critic():
    more = ANSWERS._replace(records_of_data=4000)
    assert "try the 4000 of the data with --rows" in said(answers=more)


def test_how_many_records_say_that_sft_has_converged():
    more = ANSWERS._replace(records_of_data=4000)
    assert "as far as 256 of 4,000 records can show" in conclusion(STEP, more, CRITIC)
    assert "More records may tell it: ask with --rows" in said(answers=more)
    assert "as far as 256 of 256 records can show" in conclusion(STEP, ANSWERS, CRITIC)
    assert "More records" not in said()


def test_responses_that_all_equal_their_targets_leave_no_critic():
    assert "critic" not in said(answers=ANSWERS._replace(prompts=1000), critic=None)


def test_few_records_make_no_critic():
    few = ANSWERS._replace(prompts=999, records_of_data=1000)
    assert "Ask with --rows 1000 or more" in said(answers=few, critic=None)
    text = said(answers=few._replace(records_of_data=999), critic=None)
    assert "a critic needs 1,000 records or more, and a run would use 999." in text
    assert "--rows" not in text


@pytest.mark.parametrize(
    ("high", "expected"),
    [
        (5.0, "saturated for one pair in twenty"),
        (4.9, "between linear"),
        (1.0, "between linear"),
        (0.2, "linear for nearly all"),
    ],
)
def test_margins(high, expected):
    found = said(margins=MARGINS._replace(high=high))
    assert expected in found
    assert f"at the end of an iteration of 20 steps at most {2 * high:.2g}" in found
    assert "at the end" not in said(margins=MARGINS._replace(high=high, steps=20))


def four():
    """The measurements in the table of docs/how-to/probe.md, by model, and what it concludes."""
    page = (Path(__file__).parents[2] / "docs/how-to/probe.md").read_text(encoding="utf-8")
    table = page.split("| model and records |")[1].split("\n\n")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines()[2:]]
    found = {}
    for (model, p_value, shares, likeliest, identical, _), name in zip(
        rows, ("starter", "starter, converged", "walks", "fork"), strict=True
    ):
        assert name.split(",")[0] in model
        sampled, half, fifth, greedy = (float(x) / 100 for x in shares.strip(" %").split(","))
        share, samples = re.search(r"([\d.]+) % \(of (\d)\)", likeliest).groups()
        found[name] = (
            CONVERGED._replace(p_value=float(p_value)),
            right(sampled, half, fifth, greedy)._replace(
                prompts=4000 if "4000" in model else 256,
                samples=int(samples),
                likeliest_right_share=float(share) / 100,
                identical_share=float(identical.strip(" %")) / 100,
            ),
        )
    return found


def concluded(name):
    signal, answers = four()[name]
    auc = Auc(0.567, (0.539, 0.596), 600, 64)
    critic = CRITIC._replace(auc=auc, auc_of_like_length=auc) if name == "walks" else None
    return conclusion(STEP._replace(sft=signal), answers, critic)


def test_the_conclusion_of_four_models_whose_answer_is_known():
    found = {name: concluded(name) for name in four()}
    parts = {
        "starter": ["SFT has not converged", "expect what more SFT would give", "sft_continue"],
        "starter, converged": [
            "SFT has converged",
            "88% of the responses equal their target",
            "Decode at T = 0 (greedy decoding) first",
        ],
        "walks": [
            "SFT has converged",
            "Decode at T = 0.2 first, which costs nothing: 82.3% of the responses are right there, "
            "59.3% at T = 1. The likeliest of 4",
            "(86.1%) than a single one at any temperature (82.3% at T = 0.2)",
            "Recipe sharpening trains on it",
            "Compare the result with this model and with SFT of as many steps",
        ],
        "fork": ["SFT has converged", "(0.0%)", "(37.9%)", "sample at temperature 1"],
    }
    for name, wanted in parts.items():
        assert all(part in found[name] for part in wanted), found[name]
        # What sets a model apart is not said of another one.
        others = [text for other, text in found.items() if other != name]
        assert not any(wanted[1] in text for text in others)
        assert ("do not expect a gain in likelihood of either" in found[name]) == (
            name != "starter"
        )


def test_the_likeliest_response_counts_where_it_beats_every_other_decoding():
    """Two standard errors of .85 and .765 over 256 prompts are .045 and .053."""
    answers = right(0.6, 0.7, 0.7, 0.765)
    better = conclusion(STEP, answers._replace(likeliest_right_share=0.87), None)
    assert "The likeliest of 4 sampled responses is right more often (87.0%)" in better
    assert "(76.5% at T = 0 (greedy decoding))" in better
    assert "Recipe sharpening" in better
    for share in (0.85, 0.5, None):
        text = conclusion(STEP, answers._replace(likeliest_right_share=share), None)
        assert "sharpening" not in text
        assert "Something else would have to come" in text
    # Where a lower temperature is as good, whichever it is, it costs nothing.
    for alike in (right(0.6, 0.7, 0.7, 0.87), right(0.6, 0.7, 0.87, 0.765)):
        assert "sharpening" not in conclusion(
            STEP, alike._replace(likeliest_right_share=0.87), None
        )
    # It stands before what a critic may do.
    assert "sharpening" in concluded("fork")
    assert "sharpening" in concluded("walks")
    assert "sharpening" not in concluded("starter, converged")


def test_identical_responses_count_where_they_are_most_of_all():
    some = conclusion(STEP, ANSWERS._replace(identical_share=0.5), CRITIC)
    assert "equal their target" not in some
    assert "equal their target" in conclusion(STEP, ANSWERS._replace(identical_share=0.51), CRITIC)


def test_what_a_critic_adds_to_the_conclusion():
    long = Auc(0.9, (0.85, 0.95), 900, 64)
    at_chance = conclusion(STEP, ANSWERS, CRITIC)
    counts = conclusion(STEP, ANSWERS, CRITIC._replace(auc=TELLS, auc_of_length_alone=long))
    none = conclusion(STEP, ANSWERS, None)
    tells = conclusion(STEP, ANSWERS, CRITIC._replace(auc=TELLS, auc_of_like_length=TELLS))
    assert "method critic may use it" in tells
    assert "no better than SFT" in tells
    assert "A small critic finds nothing" in at_chance
    assert "may know nothing but their length" in counts
    assert "critic" not in none
    for text in (at_chance, counts, none):
        assert "other records, or a checker of right responses (recipe self_training)" in text


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"is_plain": False}, "its responses are not samples at temperature 1"),
        ({"is_covered": False}, "the argument does not cover this loss"),
    ],
)
@pytest.mark.parametrize("sft", [LEARNING, CONVERGED])
def test_where_the_first_step_need_not_be_that_of_sft(changes, reason, sft):
    text = conclusion(STEP._replace(sft=sft), ANSWERS._replace(**changes), CRITIC)
    assert reason in text
    assert ("has converged" in text) == (sft is CONVERGED)
    assert "expected first step" not in text
    assert "Compare it with SFT of as many steps" in text


def test_responses_that_are_cut_come_before_everything_else():
    text = conclusion(STEP, ANSWERS._replace(truncated_share=0.3), CRITIC)
    assert text.startswith("30% of the responses are cut")
    assert "expect" not in text
