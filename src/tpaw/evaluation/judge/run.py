"""Compare two files of responses with a judge, and write the results."""

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


def key_from(variable: str | None, option: str = "--key-env") -> str | None:
    """Read the endpoint's API key from an environment variable.

    Args:
        variable: name of the environment variable; None means no key.
        option: the option that gave the name, for messages.

    Raises:
        InputError: the variable is not set or empty.
    """
    if variable is None:
        return None
    if not os.environ.get(variable):
        raise InputError(
            f"{option} {variable}: this environment variable is not set or is empty; "
            "set it to the endpoint's key"
        )
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
    """Send the requests that have no cached reply, then write results.json and verdicts.jsonl.

    Args:
        paths: the responses of A and B; see `outputs.read_outputs`.
        judge: decides the content of the requests.
        endpoint: URL. It is never stored.
        api_key: key of the endpoint; None if it needs none. It is never stored.
        output: folder of the results. The default is judgements/A-vs-B.
        cache: folder of replies. All comparisons may share it.
        parallel: number of requests at a time.
        stop: tells whether the user asked for a stop.

    Returns:
        The folder, and the content of its results.json.

    Raises:
        InputError: the responses, the endpoint's URL or the folder cannot be used.
        JudgeError: the endpoint cannot be reached, or refuses requests. Earlier replies are stored.
        Interrupted: the user asked for a stop; replies are stored.
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
