"""A comparison by a judge, from two files of answers to results on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tpaw.errors import InputError
from tpaw.evaluation.judge.endpoint import Endpoint
from tpaw.evaluation.judge.match import SAMPLING, Judge, Judged, Match
from tpaw.evaluation.judge.outputs import Pair, label, pair_up, read_outputs
from tpaw.evaluation.judge.replies import Replies
from tpaw.evaluation.judge.win_rate import win_rate
from tpaw.runtime.interrupt import StopSignal
from tpaw.runtime.watch import Watch
from tpaw.storage.artifacts import own_folder, write_json, write_text
from tpaw.storage.run_directory import environment


def key_from(variable: str | None) -> str | None:
    """The endpoint's key, from the environment variable of that name.

    Raises:
        InputError: a variable is named and not set.
    """
    if variable is None:
        return None
    if not os.environ.get(variable):
        raise InputError(f"--key-env {variable}: no such environment variable, or empty")
    return os.environ[variable]


def judge_outputs(
    paths: tuple[str, str],
    judge: Judge,
    endpoint: str,
    api_key: str | None,
    output: Path | None,
    cache: Path,
    *,
    parallel: int,
    stop: StopSignal,
) -> tuple[Path, dict[str, Any]]:
    """Ask what no earlier call has asked; then write results.json and verdicts.jsonl.

    Args:
        paths: A and B; see `outputs.read_outputs`.
        endpoint: URL; never stored.
        output: default judgements/A-vs-B.
        cache: folder of replies, for any number of comparisons.
        parallel: requests at a time.

    Returns:
        The folder, and what its results.json holds.

    Raises:
        InputError: the answers, the endpoint's URL or the folder cannot be used.
        JudgeError: the endpoint cannot be reached, or refuses. What it replied is kept.
    """
    a, b = (read_outputs(path, name) for path, name in zip(paths, "AB", strict=True))
    pairs = pair_up(a, b)
    client = Endpoint(endpoint, api_key)
    folder = output or Path("judgements") / "-vs-".join(map(label, paths))
    sides = {side: {"name": o.name, "sha256": o.sha256} for side, o in (("a", a), ("b", b))}
    asked = {"model": judge.model, "max_tokens": judge.max_tokens, **SAMPLING}
    settings = {**sides, "judge": asked | {"prompt_sha256": judge.prompt.sha256}}
    own_folder(folder, settings, prompt=judge.prompt.text)
    match = Match(pairs, judge, Replies(cache))
    if match.missing:
        watch = Watch(stop)
        with watch.progress("ask the judge", len(match.missing), "requests") as on_done:
            match.ask(client, parallel, on_done)
    judged = match.judged()
    results = {
        "measure": judge.measure,
        **settings,
        "replied_as": match.models(),
        **win_rate(pairs, judged),
        "versions": environment()["versions"],
    }
    write_text(folder / "verdicts.jsonl", _verdict_lines(pairs, judged))
    write_json(folder / "results.json", results)
    return folder, results


def _verdict_lines(pairs: Sequence[Pair], judged: Sequence[Judged]) -> str:
    lines = []
    for number, (pair, item) in enumerate(zip(pairs, judged, strict=True)):
        orders = [order._asdict() for order in item.orders or ()]
        line = {"item": number, "instruction": pair.instruction, "outcome": item.outcome}
        lines.append(json.dumps(line | {"orders": orders}) + "\n")
    return "".join(lines)
