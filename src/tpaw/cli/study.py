"""The command `study`, and the hidden command `prepare` that a study runs in its own process."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tpaw.cli.common import Command, Trust, console_of_stdout, stoppable
from tpaw.errors import InputError
from tpaw.evaluation.benchmarks.suite import load_suites
from tpaw.storage.run_directory import (
    RunDirectory,
    refuse_untrusted_code,
    refuse_untrusted_server,
)
from tpaw.study.config import read_study, study_names

if TYPE_CHECKING:
    from tpaw.study.judging import StudyJudge

app = typer.Typer()


@app.command(cls=Command)
def study(
    source: Annotated[
        str,
        typer.Argument(
            metavar="STUDY",
            help=f"A YAML file, or a study of the package ({', '.join(study_names())}).",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for runs and report. Default: studies/STUDY."),
    ] = None,
    jobs: Annotated[
        int, typer.Option(min=1, help="Number of parallel runs. They share the CPU cores.")
    ] = 1,
    judge_endpoint: Annotated[
        str | None,
        typer.Option(
            "--judge-endpoint",
            help="URL of an OpenAI-compatible endpoint, ending in /v1. Its model then compares the "
            "last responses of each method with the baseline's. It needs --judge-model.",
        ),
    ] = None,
    judge_model: Annotated[
        str | None,
        typer.Option("--judge-model", help="The judge's model name at the endpoint."),
    ] = None,
    judge_key_env: Annotated[
        str | None,
        typer.Option(
            "--judge-key-env", help="Name of the environment variable that holds the API key."
        ),
    ] = None,
    trust: Trust = False,
) -> None:
    """Run methods × settings × seeds, then compare them with statistical tests.

    Run the same command again to resume a study that was stopped.

    Example: tpaw study methods --jobs 2
    """
    from tpaw.report.study import sentences, study_tables
    from tpaw.study.judging import judge_study
    from tpaw.study.publish import publish_study
    from tpaw.study.runner import run_study, runs_of

    output = output or Path("studies") / Path(source).stem
    judge = _judge(judge_endpoint, judge_model, judge_key_env)
    settings, conditions = read_study(source)
    for condition in conditions:
        load_suites(condition.config(settings.seeds[0]).evaluate.suites, trust=trust)
    runs = runs_of(conditions, settings.seeds, output)
    with stoppable(f"tpaw study {shlex.quote(source)} -o {shlex.quote(str(output))}") as stop:
        failures = run_study(runs, output, jobs, stop)
        # Before the judge is asked: an endpoint that fails must not cost the report.
        content = publish_study(source, settings, conditions, runs, failures, output, jobs)
        if judge is not None:
            win_rates = judge_study(runs, content["baseline"], judge, output, jobs, stop)
            content = publish_study(
                source, settings, conditions, runs, failures, output, jobs, win_rates
            )
    console = console_of_stdout()
    for table in study_tables(content):
        console.print(table)
    for text in (*sentences(content), f"Report and figures: {output}"):
        console.print_text(text)
    if failures:
        raise typer.Exit(1)


def _judge(endpoint: str | None, model: str | None, key_env: str | None) -> StudyJudge | None:
    from tpaw.evaluation.judge.match import Judge
    from tpaw.evaluation.judge.prompt import load_prompt
    from tpaw.evaluation.judge.run import key_from
    from tpaw.study.judging import StudyJudge

    if endpoint is None and model is None and key_env is None:
        return None
    if endpoint is None or model is None:
        missing = "--judge-endpoint" if endpoint is None else "--judge-model"
        raise InputError(
            f"{missing}: missing; a judge needs both --judge-endpoint and --judge-model"
        )
    api_key = key_from(key_env, "--judge-key-env")
    judge = StudyJudge(Judge(model, load_prompt(None)), endpoint, api_key)
    judge.check()
    return judge


@app.command(hidden=True)
def prepare(directory: Path, trust: Trust = False) -> None:
    """Compute the stages before the first training, which the runs of a study share."""
    from tpaw.study.sharing import prepare_shared

    run = RunDirectory(directory)
    config = run.load_config()
    refuse_untrusted_code(config.model, run, trust=trust)
    refuse_untrusted_server(config.generate, run, trust=trust)
    with stoppable(f"tpaw prepare {shlex.quote(str(directory))}") as stop:
        prepare_shared(directory, stop)
