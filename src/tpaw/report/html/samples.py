"""Prompts with their target and the responses of every checkpoint, for report.html.

A large run has more of them than fit into the file. Then each kind of sample gets its share, and
the file says how many there are.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from tpaw.config.schema import RunConfig
from tpaw.errors import ArtifactError
from tpaw.evaluation.items import read_items
from tpaw.report.html.kept import kept_responses
from tpaw.storage.artifacts import MANIFEST, is_published, read_files, read_manifest
from tpaw.storage.run_directory import RunDirectory

KINDS = (
    "wrong to right", "right to wrong", "always wrong", "always right", "changed", "truncated",
    "identical",
)  # fmt: skip
LOOKED_AT = 20_000
"""Of more prompts than this, the first ones are looked at."""
LONGEST_TEXT = 20_000
"""Characters of a text that is shown; the rest is cut."""


class Samples(NamedTuple):
    """Some of the prompts of one file.

    Attributes:
        items: what is shown, in the order of the file; see `_sample`.
        systems: the names of those whose responses the items have.
        of_kind: how many prompts are of each kind, of those that were looked at.
        looked_at, total: numbers of prompts.
        problems: files that could not be read, each with the reason.
    """

    items: list[dict[str, Any]]
    systems: list[str]
    of_kind: dict[str, int]
    looked_at: int
    total: int
    problems: list[str]

    def as_json(self) -> dict[str, Any]:
        """The part of the page's data that its script reads."""
        return {key: value for key, value in self._asdict().items() if key != "problems"}


def heldout_samples(run: RunDirectory, iterations: int, budget: int) -> Samples:
    """Held-out prompts with the greedy responses of every checkpoint that was evaluated.

    Args:
        run: the run directory.
        iterations: of the run.
        budget: bytes that the items may have as JSON.
    """
    evaluations = {f"θ_{i}": run.evaluation(i) for i in range(iterations + 1)}
    return samples_of_evaluations(run.inputs / "heldout.parquet", evaluations, budget)


def samples_of_evaluations(inputs: Path, evaluations: Mapping[str, Path], budget: int) -> Samples:
    """Held-out prompts with the greedy responses of several systems.

    Args:
        inputs: the parquet file of the held-out examples.
        evaluations: names of systems, each with the folder of its evaluation. Those that are not
            published are left out.
        budget: bytes that the items may have as JSON.
    """
    problems: list[str] = []
    answers: dict[str, dict[str, dict[str, Any]]] = {}
    for name, folder in evaluations.items():
        if not is_published(folder):
            continue
        found: dict[str, dict[str, Any]] = {}
        for item in _read(folder / "exact_match.jsonl", problems):
            found[item["id"]] = _answer(item["completion"], item["finish_reason"], item["correct"])
        for item in _read(folder / "logps.jsonl", problems):
            known = found.setdefault(item["id"], {})
            names = ("target_logp", "initial_answer_logp")
            known["logps"] = [f"{item[name]:.2f}" for name in names]
        answers[name] = found
    return _chosen(inputs, answers, budget, problems)


def training_samples(run: RunDirectory, config: RunConfig, budget: int) -> Samples:
    """Training prompts with the responses of each checkpoint, which the next iteration used.

    Of several to a prompt, the one that the method chooses is shown, or the first.

    Args:
        run: the run directory.
        config: the run's configuration.
        budget: bytes that the items may have as JSON.
    """
    problems: list[str] = []
    answers: dict[str, dict[str, dict[str, Any]]] = {}
    for t in range(config.iterations):
        folder = run.iteration(t).responses
        if not is_published(folder):
            continue
        found = answers[f"θ_{t}"] = {}
        for row in islice(_responses(folder, problems), LOOKED_AT):
            found.setdefault(row["example_id"], _answer(row["text"], row["finish_reason"]))
        try:
            name, kept = kept_responses(run, config, t)
        except (OSError, ValueError, KeyError, pa.ArrowException, ArtifactError) as error:
            problems.append(f"iterations/{t + 1}: which responses were trained on: {error}")
            continue
        for response in kept[:LOOKED_AT]:
            answer = _answer(response.text, response.finish_reason)
            found[response.example_id] = answer | {"chosen": name}
    return _chosen(run.inputs / "train.parquet", answers, budget, problems)


def _responses(folder: Path, problems: list[str]) -> Iterator[dict[str, Any]]:
    columns = ["example_id", "text", "finish_reason"]
    for entry in read_files(folder / MANIFEST):
        path = folder / entry["path"]
        try:
            yield from pq.read_table(path, columns=columns).to_pylist()
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            problems.append(f"{path.name}: {error}")


def _read(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """The first items of a file, none if it is absent: then nobody could tell right responses."""
    if not path.exists():
        return []
    try:
        return read_items(path, LOOKED_AT)
    except (OSError, ValueError) as error:
        problems.append(f"{path.name}: {error}")
        return []


def _answer(text: str, finish_reason: str, is_right: bool | None = None) -> dict[str, Any]:
    answer: dict[str, Any] = {"text": text[:LONGEST_TEXT]}
    if finish_reason == "length":
        answer["truncated"] = True
    if is_right is not None:
        answer["right"] = is_right
    return answer


def _chosen(
    inputs: Path, answers: dict[str, dict[str, dict[str, Any]]], budget: int, problems: list[str]
) -> Samples:
    systems = list(answers)
    around = _around_prompts(inputs.parent)
    try:
        file = pq.ParquetFile(inputs)
        total = file.metadata.num_rows
        rows = islice(_rows(file), LOOKED_AT)
        items = [
            _sample(row, [answers[name].get(row["id"]) for name in systems], around) for row in rows
        ]
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        if inputs.exists():
            problems.append(f"{inputs.name}: {error}")
        return Samples([], systems, {}, 0, 0, problems)
    counts = Counter(KINDS[kind] for item in items for kind in item["kinds"])
    chosen = within_budget(items, budget)
    return Samples(chosen, systems, dict(counts), len(items), total, problems)


def _rows(file: pq.ParquetFile) -> Iterator[dict[str, Any]]:
    for batch in file.iter_batches(4096, columns=["id", "prompt", "target"]):
        yield from batch.to_pylist()


def _around_prompts(inputs: Path) -> tuple[str, str]:
    """What the chat template puts around a user turn; runs of earlier versions do not say."""
    if not is_published(inputs):
        return "", ""
    before, after = read_manifest(inputs).get("around_prompts", ("", ""))
    return before, after


def without_template(prompt: str, before: str, after: str) -> str:
    """A prompt for people: the user turn alone where the chat template made nothing else of it.

    Args:
        prompt: as the model reads it.
        before, after: what the chat template puts around a user turn.
    """
    is_around = prompt.startswith(before) and prompt[len(before) :].endswith(after)
    return prompt[len(before) : len(prompt) - len(after)] if is_around else prompt


def _sample(
    row: dict[str, Any], answers: Sequence[dict[str, Any] | None], around: tuple[str, str]
) -> dict[str, Any]:
    """A prompt with its target and one response of each player, None where there is none."""
    target = row["target"][:LONGEST_TEXT]
    return {
        "id": row["id"],
        "prompt": without_template(row["prompt"], *around)[:LONGEST_TEXT],
        "target": target,
        "answers": list(answers),
        "kinds": _kinds(target, [a for a in answers if a and "text" in a]),
    }


def _kinds(target: str, answers: Sequence[dict[str, Any]]) -> list[int]:
    """The places in `KINDS` of the kinds that a sample is of."""
    if not answers:
        return []
    right = [answer["right"] for answer in answers if "right" in answer]
    first, last = answers[0]["text"], answers[-1]["text"]
    applies = {
        "wrong to right": bool(right) and not right[0] and right[-1],
        "right to wrong": bool(right) and right[0] and not right[-1],
        "always wrong": bool(right) and not any(right),
        "always right": bool(right) and all(right),
        "changed": first != last,
        "truncated": any("truncated" in answer for answer in answers),
        "identical": last.strip() == target.strip(),
    }
    return [place for place, kind in enumerate(KINDS) if applies[kind]]


def within_budget(items: Iterable[dict[str, Any]], budget: int) -> list[dict[str, Any]]:
    """Choose items of every kind, in turn, until their JSON would have more bytes than allowed.

    Args:
        items: in the order of the file.
        budget: bytes.

    Returns:
        The chosen items, in the order of the file.
    """
    items = list(items)
    of_kind: dict[int | None, list[int]] = {kind: [] for kind in (None, *range(len(KINDS)))}
    for number, item in enumerate(items):
        for place in item["kinds"] or [None]:
            of_kind[place].append(number)
    queues = [iter(numbers) for numbers in of_kind.values() if numbers]
    chosen: set[int] = set()
    while queues:
        for queue in list(queues):
            candidate = next((n for n in queue if n not in chosen), None)
            if candidate is None:
                queues.remove(queue)
                continue
            budget -= len(json.dumps(items[candidate], ensure_ascii=False).encode())
            if budget < 0:
                return [items[n] for n in sorted(chosen)]
            chosen.add(candidate)
    return [items[n] for n in sorted(chosen)]
