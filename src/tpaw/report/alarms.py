"""Alarms: what a person should know before the next iteration is paid for, and what to do about it.

`docs/reference/alarms.md` has the thresholds in one table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from tpaw.objectives.base import SATURATED

TRUNCATED = 0.10
IDENTICAL = 0.50
LESS_LIKELY = 0.05
"""Share of the log-prob of held-out targets."""
OTHER_LENGTH = 1 / 3
REPEATING = 0.10
"""Share of the responses that repeat themselves, above that of the targets."""
DRIFT = 0.2
"""Nats per token of the responses of θ_0."""
NEAR_LIMIT = 0.5
"""Share of the difference that the first step may have."""
P_VALUE = 0.05


class Alarm(NamedTuple):
    """One line for a person.

    Attributes:
        iteration: the checkpoint or the iteration that it is about.
        name: of the alarm, as in the table of the documentation.
        text: what was seen.
        advice: what to do.
    """

    iteration: int
    name: str
    text: str
    advice: str

    def line(self) -> str:
        """The alarm in one line."""
        return f"alarm: {self.text} {self.advice}"


def alarms(players: Sequence[Mapping[str, Any]]) -> list[Alarm]:
    """Return the newest alarm of each name.

    Args:
        players: the entries `players` of summary.json.
    """
    found: list[Alarm] = []
    for before, entry in pairwise([{}, *players]):
        found += [Alarm(entry["iteration"], *alarm) for alarm in _of_responses(entry, players)]
        found += [Alarm(entry["iteration"], *alarm) for alarm in _of_training(entry)]
        found += [Alarm(entry["iteration"], *alarm) for alarm in _of_evaluation(entry, players[0])]
        found += [Alarm(entry["iteration"], *alarm) for alarm in _of_drift(entry, before)]
    return list({alarm.name: alarm for alarm in found}.values())


def is_worse(exact_match: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is worse than θ_0 on the same held-out records, beyond chance.

    Args:
        exact_match: its entry `exact_match` of results.json.
    """
    test = exact_match["versus_start"]
    return bool(test["only_first"] > test["only_second"] and test["p_value"] < P_VALUE)


def _of_responses(
    entry: Mapping[str, Any], players: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, str, str]]:
    responses = entry.get("responses")
    if not responses:
        return
    who = f"θ_{entry['iteration'] - 1}"
    if (share := responses["truncated_share"]) > TRUNCATED:
        yield (
            "truncated",
            f"{share:.0%} of the responses of {who} were cut at the length limit.",
            "Raise generate.max_new_tokens or max_length.",
        )
    if (share := responses["identical_share"]) > IDENTICAL:
        yield (
            "identical",
            f"{share:.0%} of the responses of {who} equal their target.",
            "Little is left to learn from these records: expect less of further iterations.",
        )
    share, natural = (responses.get(f"repeating{of}_share", 0.0) for of in ("", "_targets"))
    if share - natural > REPEATING:
        yield (
            "repeating",
            f"{share:.0%} of the responses of {who} repeat themselves, and {natural:.0%} of the "
            "targets do.",
            "Look at the samples; lower train.learning_rate, or generate.temperature.",
        )
    first = next((p["responses"] for p in players if "responses" in p), responses)
    before, now = (r["tokens"] / max(1, r["rows"]) for r in (first, responses))
    if before and abs(now / before - 1) > OTHER_LENGTH:
        yield (
            "length",
            f"The responses of {who} have {now:.0f} tokens in the mean, those of the first "
            f"iteration had {before:.0f}.",
            "Look at the samples: the model may loop, or leave something out.",
        )


def _of_training(entry: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    training = entry.get("training", {})
    where = f"iteration {entry['iteration']}"
    if (reward := training.get("rewards/target", 0.0)) < 0:
        yield (
            "target reward",
            f"In {where} the target reward is {reward:+.3f}: the targets lose likelihood.",
            "Lower train.learning_rate, or raise objective.eta.",
        )
    if (margin := training.get("rewards/margins", 0.0)) > SATURATED:
        yield (
            "saturated",
            f"In {where} the mean margin is {margin:.1f}, and the loss hardly has a gradient.",
            "Lower objective.lambda or train.learning_rate, or train fewer epochs.",
        )
    first_step = entry.get("first_step", {})
    if first_step and first_step["difference"] > NEAR_LIMIT * first_step["limit"]:
        yield (
            "first step",
            f"In {where} the policy's first log-probs differ from the stored ones by "
            f"{first_step['difference']:.1g} nats per token, of {first_step['limit']:.1g} allowed.",
            "Use precision fp32, or look for what differs between scoring and training: kernels, "
            "dtypes, versions.",
        )
    if entry.get("lines_not_finite", 0):
        yield (
            "not finite",
            f"In {where} the loss or the norm of the gradient is not finite.",
            "Lower train.learning_rate and use `tpaw run … --restart-iteration`.",
        )


def _of_evaluation(
    entry: Mapping[str, Any], start: Mapping[str, Any]
) -> Iterator[tuple[str, str, str]]:
    if entry["iteration"] == 0:
        return
    who = f"θ_{entry['iteration']}"
    exact, first_exact = (e.get("evaluation", {}).get("exact_match") for e in (entry, start))
    if exact and first_exact and is_worse(exact):
        yield (
            "worse",
            f"{who} answers {exact['accuracy']:.1%} of the held-out problems right, θ_0 "
            f"{first_exact['accuracy']:.1%} (p = {exact['versus_start']['p_value']:.1g}).",
            "Use an earlier checkpoint, and a lower train.learning_rate.",
        )
    logps, first_logps = (e.get("evaluation", {}).get("logps") for e in (entry, start))
    if logps and first_logps:
        fall = first_logps["target_logp"] - logps["target_logp"]
        if logps["margin"] > 0 and fall > LESS_LIKELY * abs(first_logps["target_logp"]):
            yield (
                "less likely",
                f"Held-out targets are {fall:.2f} nats less likely under {who} than under θ_0, "
                "although the margin grows.",
                "Lower train.learning_rate, or raise objective.eta.",
            )


def _of_drift(
    entry: Mapping[str, Any], before: Mapping[str, Any]
) -> Iterator[tuple[str, str, str]]:
    logps = (found.get("evaluation", {}).get("logps", {}) for found in (entry, before))
    now, then = (of.get("drift", 0.0) for of in logps)
    if now > max(DRIFT, then):
        yield (
            "drift",
            f"θ_{entry['iteration']} finds the responses of θ_0 less likely by {now:.2f} nats per "
            f"token; the checkpoint before by {then:.2f}.",
            "Lower train.learning_rate or the number of iterations, if θ_0 had skills to keep.",
        )
