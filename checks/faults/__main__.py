"""Break runs and give bad input by the command line, and look at what is said and what is kept.

    python checks/faults                      every row; exits with 1 if one fails
    python checks/faults --only F6 --only S   one row, and all rows of a kind

A row is one kind of fault (F), bad input (B) or hostile input (S). Commands run in forked processes
that have the libraries imported. A row fails on a traceback, a hang, a raw control character, an
unexpected exit code, a message without the cause, or a resumed run whose weights, responses or
log-probs differ from those of an uninterrupted run. Rows that fill or lock a disk need root; they
are skipped without it. Nothing outside of the folder of the run is touched.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import hostile  # noqa: F401
import inputs  # noqa: F401
import interruptions  # noqa: F401
from bench import ROWS, TINY, Bench, Fail, Skip, has
from fork_server import PRELOADED


def preload():
    """Import once what each command would import."""
    more = ("pyarrow.parquet", "datasets", "jinja2", "lm_eval.tasks", "lm_eval.evaluator")
    for name in (
        *PRELOADED,
        *more,
        "tpaw.evaluation.benchmarks.harness",
        "tpaw.evaluation.judge.run",
    ):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def corpus(base):
    """Write the runs that the rows begin with; gives the seconds of a whole run."""
    (base / "tiny.yaml").write_text(json.dumps(TINY))
    made = base / "made"
    made.mkdir()
    x = Bench(made, base)
    began = time.monotonic()
    outcome = x.tpaw("run", x.tiny, "-o", base / "done")
    if outcome.code:
        raise SystemExit(f"a plain run fails: {outcome.text}")
    seconds = time.monotonic() - began
    for name, at in (
        ("begun", has("iterations/2/responses/shard-00001*")),
        ("stopped", has("iterations/2/training/checkpoint-3/manifest.json")),
    ):
        child = x.start("run", x.tiny, "-o", base / name)
        child.until(lambda n=name, a=at: a(base / n))
        child.send(signal.SIGKILL)
        child.wait()
        if child.outcome.code != -9:
            raise SystemExit(f"{name}: the run ended too early")
    return seconds


def run_row(name, folder, base, seconds, options):
    """Run a row in this process; gives what the table shows."""
    x = Bench(folder, base)
    x.whole, x.seed, x.whole_matrix = seconds, options.seed, options.all
    began = time.monotonic()
    verdict, why = "pass", ""
    try:
        ROWS[name](x)
    except Fail as problem:
        verdict, why = "NOT", str(problem)
    except Skip as reason:
        verdict, why = "n/a", str(reason)
    except Exception:
        verdict, why = "NOT", "the check itself fails: " + traceback.format_exc()
    return [verdict, why, x.said, time.monotonic() - began]


def in_rows(names, base, seconds, options):
    """Run the rows, some at a time; gives each with its result as it ends."""
    waiting, running = list(reversed(names)), {}
    while waiting or running:
        while waiting and len(running) < options.jobs:
            name = waiting.pop()
            folder = base / f"row-{name}"
            folder.mkdir()
            pid = os.fork()
            if pid == 0:
                os.setpgid(0, 0)
                found = run_row(name, folder, base, seconds, options)
                (base / f"{name}.json").write_text(json.dumps(found), errors="surrogateescape")
                os._exit(0)
            running[pid] = name
        for pid, name in list(running.items()):
            if os.waitpid(pid, os.WNOHANG)[0]:
                del running[pid]
                file = base / f"{name}.json"
                yield (
                    name,
                    json.loads(file.read_text()) if file.exists() else ["NOT", "died", [], 0],
                )
                shutil.rmtree(base / f"row-{name}", ignore_errors=True)
        time.sleep(0.01)


def main():
    """Run the rows, print the table, and exit with 1 if any fails."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", action="append", help="A row or a letter. Can be repeated.")
    parser.add_argument("--all", action="store_true", help="Damage every file in every way.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--said", action="store_true", help="Show every message.")
    options = parser.parse_args()
    wanted = options.only or list(ROWS)
    names = [name for name in ROWS if name in wanted or name[0] in wanted]
    preload()
    failed = 0
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as place:
        base = Path(place).resolve()
        seconds = corpus(base)
        print(f"a whole run takes {seconds:.1f} s", flush=True)
        for name, (verdict, why, said, took) in in_rows(names, base, seconds, options):
            failed += verdict == "NOT"
            what = (ROWS[name].__doc__ or "").strip()
            print(f"{name:5} {verdict:4} {took:5.1f} s  {what}", flush=True)
            if why:
                print(f"      {why[:3000]}", flush=True)
            shown = said if options.said else said[:1]
            for line in shown:
                print(
                    f"      | {line[:400]}".encode(errors="backslashreplace").decode(), flush=True
                )
    print(f"{len(names)} rows, {failed} failed, {time.monotonic() - began:.0f} s")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
