"""Answers of one system, in the format that alpaca_eval reads, and those of two side by side.

The format is a JSON list of {"instruction", "output", "generator"}, with "dataset" where there is
one (tatsu-lab/alpaca_eval, `evaluate`); more keys do no harm there, so `tpaw answer` adds its own.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from tpaw.config.schema import DataConfig
from tpaw.data.readers import read_records
from tpaw.errors import InputError, printable
from tpaw.storage.artifacts import SETTINGS

OUTPUTS = "outputs.json"


class Outputs(NamedTuple):
    """What one system answered.

    Attributes:
        name: the system's, as the file says, or the file's own.
        sha256: of the instructions and answers, in their order.
        answers: pairs of instruction and answer.
    """

    name: str
    sha256: str
    answers: list[tuple[str, str]]


class Pair(NamedTuple):
    """Two answers to one instruction.

    Attributes:
        first, second: of the first and the second system.
    """

    instruction: str
    first: str
    second: str


def read_outputs(path: str, argument: str) -> Outputs:
    """Read a folder of `tpaw answer`, or any file with the columns `instruction` and `output`.

    A column `input`, as older files have it, belongs to the instruction.

    Args:
        argument: what the command line calls it, for errors.

    Raises:
        InputError: nothing there, not finished, or a row without text.
    """
    file = Path(path)
    if file.is_dir():
        unfinished = (file / SETTINGS).is_file() and not (file / OUTPUTS).is_file()
        if unfinished:
            raise InputError(f"{argument}: {path}: not finished; go on with `tpaw answer` first")
        file /= OUTPUTS
    if not file.is_file():
        raise InputError(f"{argument}: {path}: no answers there ({OUTPUTS} of `tpaw answer`)")
    rows = read_records(DataConfig(path=str(file)), argument)
    answers, digest = [], hashlib.sha256()
    for number, row in enumerate(rows, start=1):
        texts = [row.get("instruction"), row.get("input") or "", row.get("output")]
        for text in texts:
            if not isinstance(text, str) or not _is_whole(text):
                raise InputError(
                    f"{argument}: {path}: row {number}: `instruction` and `output` must be text, "
                    f"not {printable(repr(text), 60)}"
                )
        instruction, extra, output = map(str, texts)
        answers.append((f"{instruction}\n{extra}" if extra.strip() else instruction, output))
        digest.update("".join(f"{len(text)}:{text}" for text in answers[-1]).encode())
    names = {row.get("generator") for row in rows}
    name = names.pop() if len(names) == 1 else None
    known = name if isinstance(name, str) and name else label(path)
    return Outputs(printable(known, 80), digest.hexdigest(), answers)


def label(path: str) -> str:
    """A folder's name, or a file's without its suffix."""
    whole = Path(path).resolve()
    return whole.name if whole.is_dir() else whole.stem


def pair_up(first: Outputs, second: Outputs) -> list[Pair]:
    """The answers of two systems to the same instructions, in the order of the first.

    Where an instruction has several answers, the k-th of one stands against the k-th of the other.

    Raises:
        InputError: one has an instruction that the other lacks, or has it more often.
    """
    asked, answered = (Counter(text for text, _ in side.answers) for side in (first, second))
    if uneven := (asked - answered) + (answered - asked):
        raise InputError(
            f"A and B answer other instructions: {first.name} has {len(first.answers)} answers, "
            f"{second.name} {len(second.answers)}; {uneven.total()} without a counterpart, "
            f"such as {printable(repr(next(iter(uneven))), 120)}"
        )
    waiting: dict[str, list[str]] = defaultdict(list)
    for instruction, answer in reversed(second.answers):
        waiting[instruction].append(answer)
    return [Pair(text, answer, waiting[text].pop()) for text, answer in first.answers]


def _is_whole(text: str) -> bool:
    """Whether it can be written as UTF-8: JSON may bring half a surrogate pair."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
