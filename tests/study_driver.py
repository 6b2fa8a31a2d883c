"""`tpaw study` whose runs are forked and not started: the same processes, without their imports."""

from __future__ import annotations

import functools

from fork_server import CLI, Forked

import tpaw.study.runner
from tpaw.cli.main import main


def fork(*arguments, log, threads):
    """Start one; leaves its process id beside its log."""
    process = Forked(CLI, *arguments, out=log)
    log.with_suffix(".pid").write_text(str(process.pid))
    return process


def study():
    tpaw.study.runner.SECONDS_BETWEEN_LOOKS = 0.02
    tpaw.study.runner.run_study = functools.partial(tpaw.study.runner.run_study, launch=fork)
    main()
