"""Read the responses of a system in alpaca_eval's format, and pair the responses of two systems.

The format is a JSON list of {"instruction", "output", "generator"}, optionally with "dataset"
(tatsu-lab/alpaca_eval, `evaluate`). alpaca_eval ignores other keys, so `tpaw answer` adds some.
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
    """The responses of one system.

    Attributes:
        name: the key `generator` of the file, or the name of the file.
        sha256: hash of the instructions and responses, in their order.
        answers: pairs of instruction and response.
    """

    name: str
    sha256: str
    answers: list[tuple[str, str]]


class Pair(NamedTuple):
    """Two responses to one instruction.

    Attributes:
        instruction: the instruction.
        first, second: the response of the first and of the second system.
    """

    instruction: str
    first: str
    second: str


def read_outputs(path: str, argument: str) -> Outputs:
    """Read a folder of `tpaw answer`, or any file with the columns `instruction` and `output`.

    Older files also have a column `input`. It is appended to the instruction.

    Args:
        path: the folder or file.
        argument: name of the argument on the command line, for errors.

    Raises:
        InputError: there is no such file, the folder is not finished, or a record has no text.
    """
    file = Path(path)
    if file.is_dir():
        unfinished = (file / SETTINGS).is_file() and not (file / OUTPUTS).is_file()
        if unfinished:
            raise InputError(f"{argument}: {path}: not finished; resume it with `tpaw answer`")
        file /= OUTPUTS
    if not file.is_file():
        raise InputError(
            f"{argument}: {path}: no such file; give a folder of `tpaw answer` (with {OUTPUTS}) "
            "or a file of responses"
        )
    records = read_records(DataConfig(path=str(file)), argument)
    answers, digest = [], hashlib.sha256()
    for number, record in enumerate(records, start=1):
        texts = [record.get("instruction"), record.get("input") or "", record.get("output")]
        for text in texts:
            if not isinstance(text, str) or not _is_whole(text):
                raise InputError(
                    f"{argument}: {path}: record {number}: `instruction` and `output` must be "
                    f"text, not {printable(repr(text), 60)}"
                )
        instruction, extra, output = map(str, texts)
        answers.append((f"{instruction}\n{extra}" if extra.strip() else instruction, output))
        digest.update("".join(f"{len(text)}:{text}" for text in answers[-1]).encode())
    names = {record.get("generator") for record in records}
    name = names.pop() if len(names) == 1 else None
    known = name if isinstance(name, str) and name else label(path)
    return Outputs(printable(known, 80), digest.hexdigest(), answers)


def label(path: str) -> str:
    """Return the name of a folder, or the name of a file without its suffix."""
    whole = Path(path).resolve()
    return whole.name if whole.is_dir() else whole.stem


def pair_up(first: Outputs, second: Outputs) -> list[Pair]:
    """Pair the responses of two systems to the same instructions.

    If an instruction has several responses, the k-th response of one system is paired with the k-th
    response of the other.

    Args:
        first: the responses of the first system.
        second: the responses of the second system, in any order.

    Returns:
        The pairs, in the order of the first system.

    Raises:
        InputError: an instruction does not occur equally often in both systems.
    """
    counts_a, counts_b = (Counter(text for text, _ in side.answers) for side in (first, second))
    if uneven := (counts_a - counts_b) + (counts_b - counts_a):
        raise InputError(
            f"A and B have different instructions: {first.name} has {len(first.answers)} "
            f"responses, {second.name} has {len(second.answers)}; without a counterpart: "
            f"{uneven.total()}, such as {printable(repr(next(iter(uneven))), 120)}; "
            "give both the same instructions"
        )
    waiting: dict[str, list[str]] = defaultdict(list)
    for instruction, answer in reversed(second.answers):
        waiting[instruction].append(answer)
    return [Pair(text, answer, waiting[text].pop()) for text, answer in first.answers]


def _is_whole(text: str) -> bool:
    """Whether the text can be written as UTF-8. JSON may contain half of a surrogate pair."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
