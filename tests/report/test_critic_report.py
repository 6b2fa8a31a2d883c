"""The table of method critic, and the alarm when its critic is exploited."""

from __future__ import annotations

import io

from rich.console import Console

from tpaw.report.critic import critic_tables, exploited


def auc(value):
    return {"value": value, "interval_95": [value - 0.02, value + 0.02], "pairs": 9, "prompts": 3}


def player(i, logp, score=None, different=0.9, **facts):
    """θ_i, and what the critic said of the responses of θ_{i-1}."""
    entry = {"iteration": i, "evaluation": {"logps": {"target_logp": logp}}}
    if score is None:
        return entry
    critic = {
        "auc": auc(0.61),
        "auc_of_like_length": {"value": None},
        "auc_of_length_alone": auc(0.5),
        "different_share": different,
        "score_by_first_critic": score,
        "spread_of_scores": 2.0,
    }
    return entry | {"critic": critic | facts}


def shown(players):
    console = Console(file=io.StringIO(), width=160)
    for table in critic_tables({"players": players}):
        console.print(table)
    return console.file.getvalue()


def test_the_table_has_what_decides():
    text = shown(
        [
            player(0, -7.2),
            player(1, -7.3, 0.0, best_right_share_heldout=0.9, right_share_heldout=0.78),
        ]
    )
    [row] = [line for line in text.splitlines() if "0.610" in line]
    for cell in ("[0.590, 0.630]", "–", "0.500", "0.780", "0.900", "-7.30"):
        assert cell in row
    assert shown([player(0, -7.2)]) == ""


def test_the_alarm_needs_all_three_signs():
    def run(score, logp, different):
        # The responses that score and differ so are those of θ_1.
        return [player(0, -10.0), player(1, logp, 1.0), player(2, logp, score, different)]

    [text] = exploited(run(1.5, -11.0, 0.7))
    for part in ("θ_1", "0.25 standard deviations", "1.00 nats", "22%", "critic.each_iteration"):
        assert part in text
    assert exploited(run(1.1, -11.0, 0.7)) == []  # liked as before
    assert exploited(run(1.5, -10.4, 0.7)) == []  # targets lost four percent
    assert exploited(run(1.5, -11.0, 0.85)) == []  # still as different
    assert exploited([player(0, -10.0)]) == []


def test_the_alarm_when_fewer_responses_are_right():
    def run(score, right):
        first = player(1, -10.0, 1.0, right_share=0.874, prompts=4000)
        return [player(0, -10.0), first, player(2, -10.0, score, right_share=right, prompts=4000)]

    # Two standard errors: 2 √((.874 · .126 + .86 · .14) / 4000) = .0152.
    [text] = exploited(run(1.5, 0.858))
    signs = ("θ_1", "0.25 standard deviations", "85.8%, of θ_0's 87.4%")
    for part in (*signs, "critic.each_iteration"):
        assert part in text
    without = run(1.5, 0.858)  # nothing is held out, so there are no log-probs
    for entry in without:
        del entry["evaluation"]
    assert exploited(without) == [text]
    assert exploited(run(1.5, 0.86)) == []
    assert exploited(run(1.1, 0.7)) == []  # liked as before
