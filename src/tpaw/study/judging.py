"""Win rates in a study: a judge compares the last checkpoint of each run with the baseline's.

Both runs of a comparison have the same seed. The responses are greedy, as for exact match. They,
the judge's replies and the verdicts are in the study's folder, so nothing is computed or asked
twice.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tpaw.evaluation.judge.endpoint import Endpoint
from tpaw.evaluation.judge.match import Judge
from tpaw.evaluation.judge.outputs import OUTPUTS
from tpaw.evaluation.judge.run import judge_outputs
from tpaw.runtime.interrupt import StopSignal
from tpaw.runtime.progress import note
from tpaw.statistics.over_seeds import over_seeds, seed_difference
from tpaw.storage.lock import locked
from tpaw.storage.run_directory import needs_trust
from tpaw.study.runner import Launch, Pool, StudyRun, launch_process

COUNTS = ("wins", "losses", "ties", "invalid", "pairs")
NO_PREFERENCE = 0.5


class StudyJudge(NamedTuple):
    """Who judges a study.

    Attributes:
        judge: decides the content of the requests.
        endpoint: URL. It is never stored.
        api_key: key of the endpoint; None if it needs none. It is never stored.
    """

    judge: Judge
    endpoint: str
    api_key: str | None

    def check(self) -> None:
        """Raise an InputError if the URL or the key cannot be used."""
        Endpoint(self.endpoint, self.api_key, "--judge-endpoint")


def judge_study(
    runs: Sequence[StudyRun],
    baseline: str,
    by: StudyJudge,
    output: Path,
    jobs: int,
    stop: StopSignal,
    launch: Launch = launch_process,
) -> dict[str, Any]:
    """Let the finished runs answer their held-out prompts, then ask the judge.

    Args:
        runs: the runs of the study. One that is not finished, or whose answers fail, is left out.
        baseline: name of the condition that the others are compared with.
        by: the judge.
        output: folder of the study.
        jobs: processes at a time that answer.
        stop: tells whether the user asked for a stop.
        launch: starts one of them.

    Returns:
        `measure`, which names the judge and its prompt, `baseline`, and `conditions`: by name, the
        win rate over seeds, its difference from one half, and `by_seed` with rates and counts. A
        seed without a valid pair has no rate and is not in the means.

    Raises:
        InputError: the endpoint's URL cannot be used, or a held-out record has no text.
        JudgeError: the endpoint cannot be reached, or refuses requests. Earlier replies are stored.
        Interrupted: the user asked for a stop; answers and replies are stored.
    """
    with locked(output / "lock"):
        answers = _answer(runs, output, jobs, stop, launch)
        opponents = {run.seed: path for run, path in answers if run.condition.name == baseline}
        # Another judge, or another prompt for it, has a folder of its own.
        asked = hashlib.sha256(by.judge.measure.encode()).hexdigest()[:12]
        by_seed: dict[str, dict[int, dict[str, Any]]] = {}
        for run, path in answers:
            if run.condition.name == baseline or run.seed not in opponents:
                continue
            _, found = judge_outputs(
                (str(path), str(opponents[run.seed])),
                by.judge,
                by.endpoint,
                by.api_key,
                _folder(output / "judgements" / asked, run),
                output / "replies",
                parallel=8,
                stop=stop,
            )
            kept = {"win_rate": found["win_rate"], "interval_95": found["interval_95"]}
            kept |= {name: _total(found[name]) for name in COUNTS}
            by_seed.setdefault(run.condition.name, {})[run.seed] = kept
    return {
        "measure": by.judge.measure,
        "baseline": baseline,
        "conditions": {name: _over_seeds(found) for name, found in by_seed.items()},
    }


def _answer(
    runs: Sequence[StudyRun], output: Path, jobs: int, stop: StopSignal, launch: Launch
) -> list[tuple[StudyRun, Path]]:
    """The runs that have answered, with the folders of their answers."""
    finished = {run.name: run for run in runs if run.is_done()}
    for name in [run.name for run in runs if run.name not in finished]:
        note(f"{name}: not finished; the judge does not see it")

    def folder(name: str) -> Path:
        return _folder(output / "answers", finished[name])

    def begin(name: str) -> list[str]:
        run = finished[name]
        trust = ["--trust"] if needs_trust(run.config) else []
        return ["answer", str(run.folder), "--output", str(folder(name)), "--greedy", *trust]

    waiting = deque(name for name in finished if not (folder(name) / OUTPUTS).is_file())
    pool = Pool(jobs, output / "logs", stop.check, launch)
    try:
        failures = pool.work(waiting, begin)
    except BaseException:
        pool.stop()
        raise
    return [(run, folder(name)) for name, run in finished.items() if name not in failures]


def _folder(parent: Path, run: StudyRun) -> Path:
    return parent / run.condition.folder / f"seed-{run.seed}"


def _total(count: Any) -> int:
    """Ties are counted by their kind."""
    return sum(count.values()) if isinstance(count, dict) else int(count)


def _over_seeds(by_seed: dict[int, dict[str, Any]]) -> dict[str, Any]:
    rates = [found["win_rate"] for found in by_seed.values() if found["win_rate"] is not None]
    if not rates:
        return {"win_rate": None, "against_half": None, "by_seed": by_seed}
    against_half = seed_difference([NO_PREFERENCE] * len(rates), rates)
    return {
        "win_rate": over_seeds(rates)._asdict(),
        "against_half": against_half._asdict(),
        "by_seed": by_seed,
    }
