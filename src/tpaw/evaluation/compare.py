"""Compare systems with a baseline on the same items.

Right-or-wrong scores are compared by the exact McNemar test. Other scores are compared by a
sign-flip test, with a bootstrap interval of the difference. Holm's correction covers all p-values
of a comparison. Measures are refused if anything except the system could change a score.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from tpaw.errors import InputError
from tpaw.evaluation.load import GAP, Evaluation, Measure
from tpaw.runtime.progress import OnDone, ignore
from tpaw.statistics.over_items import (
    Interval,
    holm,
    mcnemar,
    mean_interval,
    paired_difference,
    wilson_interval,
)


class ComparisonRow(NamedTuple):
    """One measure of one system. For the baseline, all fields after `interval_95` are None.

    Attributes:
        measure: name of the measure.
        system: name of the system.
        items: number of items; None for a suite's average over tasks, which has no interval and no
            test.
        value: mean over the items: a share in [0, 1] for accuracy, nats for log-probs, percent for
            a suite's average.
        interval_95: Wilson interval for shares, BCa bootstrap interval for other scores.
        difference: value minus the baseline's value.
        difference_interval_95: BCa bootstrap over items; None for shares.
        only_baseline, only_system: number of items that only the baseline / only this system
            solved; None for scores that are not right or wrong.
        p_value: two-sided, not corrected.
        holm_p_value: corrected for all tests of the comparison.
    """

    measure: str
    system: str
    items: int | None
    value: float
    interval_95: Interval | None
    difference: float | None = None
    difference_interval_95: Interval | None = None
    only_baseline: int | None = None
    only_system: int | None = None
    p_value: float | None = None
    holm_p_value: float | None = None


class Comparison(NamedTuple):
    """The result of `tpaw compare`.

    Attributes:
        systems: names of the systems; the first is the baseline.
        suite: name of the suite; None for the held-out evaluations of runs.
        rows: sorted by measure, then by system.
        tests: number of p-values that Holm's correction covers.
        notes: measures that were left out, and differences that do not prevent a comparison.
    """

    systems: list[str]
    suite: str | None
    rows: list[ComparisonRow]
    tests: int
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        """Return the result as plain values for JSON. Intervals are pairs."""
        return self._asdict() | {"rows": [row._asdict() for row in self.rows]}


def compare(evaluations: Sequence[Evaluation], on_done: OnDone = ignore) -> Comparison:
    """Compare every system with the first one.

    Args:
        evaluations: the baseline, then one or more other systems.
        on_done: called with 1 after each row.

    Raises:
        InputError: there are fewer than two systems, or their measures cannot be compared.
    """
    if len(evaluations) < 2:
        raise InputError(
            f"a comparison needs two systems or more, not {len(evaluations)}; add a system"
        )
    baseline, *others = evaluations
    for other in others:
        _check_same_measures(baseline, other)
    names, notes = list(baseline.measures), _version_notes(baseline, others)
    if GAP in names and (differing := _with_other_initial_answers(baseline, others)):
        names.remove(GAP)
        notes.append(
            f"{GAP}: left out, because it is measured against sampled responses of θ_0, and those "
            f"of {', '.join(differing)} differ from those of {baseline.name}"
        )
    for name in names:
        for other in others:
            _check_same_conditions(name, baseline, other)
    rows = []
    for name in names:
        # Use the same test for all systems, even if the scores of one system happen to be 0 and 1.
        is_binary = all(evaluation.measures[name].is_binary for evaluation in evaluations)
        for evaluation in evaluations:
            rows.append(_row(name, baseline, evaluation, is_binary=is_binary))
            on_done(1)
    p_values = [row.p_value for row in rows if row.p_value is not None]
    adjusted = iter(holm(p_values))
    rows = [
        row if row.p_value is None else row._replace(holm_p_value=next(adjusted)) for row in rows
    ]
    return Comparison(
        [evaluation.name for evaluation in evaluations],
        baseline.suite,
        rows + _averages(evaluations),
        len(p_values),
        notes,
    )


def _row(
    name: str, baseline: Evaluation, evaluation: Evaluation, *, is_binary: bool
) -> ComparisonRow:
    start, found = baseline.measures[name].scores, evaluation.measures[name].scores
    first, scores = list(start.values()), [found[item] for item in start]
    value = sum(scores) / len(scores)
    interval = (
        wilson_interval(round(sum(scores)), len(scores)) if is_binary else mean_interval(scores)
    )
    row = ComparisonRow(name, evaluation.name, len(scores), value, interval)
    if evaluation is baseline:
        return row
    if is_binary:
        test = mcnemar([score == 1 for score in first], [score == 1 for score in scores])
        return row._replace(
            difference=value - sum(first) / len(first),
            only_baseline=test.only_first,
            only_system=test.only_second,
            p_value=test.p_value,
        )
    paired = paired_difference(first, scores)
    return row._replace(
        difference=paired.difference,
        difference_interval_95=paired.interval_95,
        p_value=paired.p_value,
    )


def _averages(evaluations: Sequence[Evaluation]) -> list[ComparisonRow]:
    """Return one row for each system with its suite average in percent.

    The average has no test, because the tasks of a suite are not a random sample.
    """
    start = evaluations[0].score
    if start is None or any(evaluation.score is None for evaluation in evaluations):
        return []
    return [
        ComparisonRow(
            "average, %", e.name, None, e.score, None, e.score - start if position else None
        )
        for position, e in enumerate(evaluations)
        if e.score is not None
    ]


def _check_same_measures(baseline: Evaluation, other: Evaluation) -> None:
    if baseline.suite != other.suite:
        held = [e.suite or "the run's own held-out records" for e in (baseline, other)]
        raise InputError(
            f"{baseline.name} is evaluated on {held[0]}, but {other.name} on {held[1]}; "
            "choose an evaluation that both have with --suite NAME"
        )
    for one, without in ((baseline, other), (other, baseline)):
        for name in one.measures:
            if name not in without.measures:
                raise InputError(
                    f"{name}: {one.name} has this measure, but {without.name} does not; "
                    "compare systems that have the same measures"
                )


def _check_same_conditions(name: str, baseline: Evaluation, other: Evaluation) -> None:
    first, second = baseline.measures[name], other.measures[name]
    for condition in first.conditions | second.conditions:
        values = [measure.conditions.get(condition) for measure in (first, second)]
        if values[0] != values[1]:
            raise InputError(
                f"{name}: {condition} is {values[0]!r:.200} in {baseline.name} and "
                f"{values[1]!r:.200} in {other.name}; it must be the same to compare them"
            )
    _check_same_items(name, baseline, other)


def _check_same_items(name: str, baseline: Evaluation, other: Evaluation) -> None:
    first, second = baseline.measures[name], other.measures[name]
    differing = first.scores.keys() ^ second.scores.keys()
    if differing:
        example = min(differing)
        owner = baseline.name if example in first.scores else other.name
        raise InputError(
            f"{name}: {baseline.name} and {other.name} are evaluated on different items: "
            f"{len(first.scores)} and {len(second.scores)} items, of which "
            f"{len(first.scores.keys() & second.scores.keys())} are in both; only {owner} has "
            f"{example!r}" + _hint(first)
        )
    for item, found in first.hashes.items():
        if second.hashes[item] != found:
            raise InputError(
                f"{name}: item {item!r} is a different document in {baseline.name} and in "
                f"{other.name}; evaluate both on the same data"
            )


def _hint(measure: Measure) -> str:
    """Return the likely cause. The item ids of a run's own evaluation are hashes of token ids."""
    if measure.hashes:
        return ""
    return "; the held-out records, the tokenizer or the chat template are not the same"


def _with_other_initial_answers(baseline: Evaluation, others: Sequence[Evaluation]) -> list[str]:
    expected = baseline.measures[GAP].conditions
    return [other.name for other in others if other.measures[GAP].conditions != expected]


def _version_notes(baseline: Evaluation, others: Sequence[Evaluation]) -> list[str]:
    """Return a note for each package whose version differs.

    lm_eval has no note, because its version is a condition of a measure.
    """
    return [
        f"{package} is {version} for {baseline.name} and {other.versions.get(package)} for "
        f"{other.name}"
        for other in others
        for package, version in baseline.versions.items()
        if package != "lm_eval" and other.versions.get(package) != version
    ]
