"""Interrupt runs and give bad input through the command line; check messages and kept files.

    python checks/faults                      every row; exits with 1 if one fails
    python checks/faults --only F6 --only S   one row, and all rows of a kind

A row is one kind of fault (F), bad input (B) or hostile input (S). Commands run in forked processes
in which the libraries are already imported. A row fails on a traceback, a hang, a raw control
character, an unexpected exit code, a message without the cause, or a resumed run whose weights,
responses or log-probs differ from those of an uninterrupted run. Rows that fill or lock a disk need
root; they are skipped without it. Nothing outside of the folder of the run is touched.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import hostile  # noqa: F401
import inputs  # noqa: F401
import interruptions  # noqa: F401
from bench import ROWS, TINY, Bench, Fail, Skip, has
from commands import forked, preload
from fork_server import run_child


def corpus(base):
    """Write the runs that the rows begin with; gives the seconds of a whole run."""
    (base / "tiny.yaml").write_text(json.dumps(TINY))
    made = base / "made"
    made.mkdir()
    x = Bench(made, base)
    whole = x.run(base / "done")
    if whole.code:
        raise SystemExit(f"a plain run fails: {whole.text}")
    for name, marker in (
        ("begun", has("iterations/2/responses/shard-00001*")),
        ("stopped", has("iterations/2/training/checkpoint-3/manifest.json")),
    ):
        if x.begin(base / name, marker).kill().code != -signal.SIGKILL:
            raise SystemExit(f"{name}: the run ended too early")
    return whole.seconds


def verdict(x, name):
    """Try a row; gives the verdict, and why."""
    try:
        ROWS[name](x)
    except Fail as problem:
        return "NOT", str(problem)
    except Skip as reason:
        return "n/a", str(reason)
    return "pass", ""


def tried(names, base, jobs, **options):
    """Try each row in a folder and a process of its own, so that one cannot end the others.

    Args:
        options: of each `Bench`.

    Yields:
        The row, the verdict, why, what was said, and the seconds.
    """

    def start(name):
        folder = base / f"row-{name}"
        folder.mkdir()

        def call():
            x = Bench(folder, base, **options)
            found = [*verdict(x, name), x.said]
            (folder / "found.json").write_text(json.dumps(found), errors="surrogateescape")

        run_child(call, folder / "printed", folder / "printed")

    for name, code, seconds, _ in forked(names, jobs, start):
        folder = base / f"row-{name}"
        if code:
            printed = (folder / "printed").read_text("utf-8", "surrogateescape")
            found = ["NOT", f"the check itself fails, exit {code}: {printed}", []]
        else:
            found = json.loads((folder / "found.json").read_text())
        yield name, *found, seconds
        shutil.rmtree(folder, ignore_errors=True)


def show(text, length):
    """Print the start of a text, below its row."""
    print(f"      {text[:length]}".encode(errors="backslashreplace").decode(), flush=True)


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
    preload("lm_eval.evaluator", "tpaw.evaluation.benchmarks.harness", "tpaw.evaluation.judge.run")
    failed = 0
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as place:
        base = Path(place).resolve()
        seconds = corpus(base)
        print(f"a whole run takes {seconds:.1f} s", flush=True)
        given = {"seconds": seconds, "seed": options.seed, "damage_all": options.all}
        for name, found, why, said, took in tried(names, base, options.jobs, **given):
            failed += found == "NOT"
            what = (ROWS[name].__doc__ or "").strip()
            print(f"{name:5} {found:4} {took:5.1f} s  {what}", flush=True)
            if why:
                show(why, 3000)
            for line in said if options.said else said[:1]:
                show(f"| {line}", 400)
    print(f"{len(names)} rows, {failed} failed, {time.monotonic() - began:.0f} s")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
