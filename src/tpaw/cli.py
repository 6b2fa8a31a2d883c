"""The command line. Each command is a few calls into the library."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import tpaw
from tpaw.config import RunConfig
from tpaw.config_file import recipe_names, to_yaml
from tpaw.errors import InputError, Interrupted, TpawError
from tpaw.evaluation.suites import suite_names
from tpaw.interrupt import StopSignal
from tpaw.rundir import RunDirectory
from tpaw.study.config import read_study, study_names

app = typer.Typer(
    help="Self-play fine-tuning of an SFT model with TPAW (arXiv 2605.09922).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
config_app = typer.Typer(help="Show recipes and the schema of a configuration.")
app.add_typer(config_app, name="config", no_args_is_help=True)

Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="CONFIG...",
        help=f"A YAML file or a recipe ({', '.join(recipe_names())}); later ones go over earlier.",
    ),
]
Overrides = Annotated[
    list[str],
    typer.Option("--set", help="section.key=value, over everything else. May be repeated."),
]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Run directory. Default: runs/CONFIG.")
]


@app.callback(invoke_without_command=True)
def top(
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    """Self-play fine-tuning of an SFT model with TPAW (arXiv 2605.09922)."""
    if version:
        print(f"tpaw {tpaw.__version__}")
        raise typer.Exit


@app.command()
def run(config: Sources, output: Output = None, set_: Overrides = []) -> None:  # noqa: B006
    """Run self-play, or go on with the run that lies in the run directory.

    CONFIG may be a run directory itself: then that run goes on.
    """
    output = output or _default_output(config)
    settings = _load(config, set_)
    from tpaw.selfplay import self_play

    with _stoppable(f"tpaw run {shlex.quote(str(output))}") as stop:
        self_play(settings, output, stop)
    _print_summary(RunDirectory(output), settings)


@app.command()
def status(directory: Path) -> None:
    """Say what is done in a run directory, and what is next."""
    run = RunDirectory(directory)
    if not run.has_begun():
        raise InputError(f"{directory}: not a run directory (no run.json)")
    settings = run.load_config()
    from tpaw.report.status import done_and_next

    done, upcoming = done_and_next(run, settings)
    for stage in done:
        print(f"done  {stage}")
    print(f"next  {upcoming}" if upcoming else "all done")
    if done:
        _print_summary(run, settings)


@app.command()
def compare(
    systems: Annotated[
        list[str],
        typer.Argument(
            metavar="A B...",
            help="RUN (its newest checkpoint), RUN@i, or the folder of an evaluation.",
        ),
    ],
    suite: Annotated[
        str | None, typer.Option("--suite", help="A suite's name. Default: the run's own rows.")
    ] = None,
    json_: Annotated[
        Path | None, typer.Option("--json", help="Write every number to this file too.")
    ] = None,
) -> None:
    """Compare systems with the first of them, on the same items."""
    if json_ is not None and (json_.is_dir() or not json_.parent.is_dir()):
        raise InputError(f"--json {json_}: no file can be written there")
    from tpaw.artifacts import write_json
    from tpaw.evaluation.compare import compare as compare_evaluations
    from tpaw.evaluation.measures import find_evaluation
    from tpaw.report.comparison import comparison_table
    from tpaw.report.progress import progress

    evaluations = [find_evaluation(system, suite) for system in systems]
    rows = sum(len(evaluation.measures) for evaluation in evaluations)
    with progress("comparing", rows, "measures") as advance:
        comparison = compare_evaluations(evaluations, advance)
    console = _console()
    console.print(comparison_table(comparison))
    for text in comparison.notes:
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    if json_ is not None:
        write_json(json_, comparison.as_json())


@app.command()
def evaluate(
    reference: Annotated[
        str, typer.Argument(metavar="MODEL_OR_RUN", help="A run, RUN@3, or a model.")
    ],
    suite: Annotated[
        str, typer.Option(help=f"{', '.join(suite_names())}, or a YAML file of your own.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="For a model. Default: evaluations/MODEL/SUITE."),
    ] = None,
) -> None:
    """Evaluate on benchmarks of lm-evaluation-harness; of a run, every checkpoint.

    What is evaluated already is not evaluated again.
    """
    from tpaw.report.tables import suite_table
    from tpaw.suite_stage import evaluate_suite

    with _stoppable("the same command") as stop:
        found = evaluate_suite(reference, suite, output, stop)
    console = _console()
    console.print(suite_table([one.results for one in found]))
    for one in found:
        console.print(f"Results: {one.folder}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def plan(config: Sources, set_: Overrides = []) -> None:  # noqa: B006
    """Show lineage and cost of every iteration, before anything is spent."""
    settings = _load(config, set_)
    from tpaw.inputs import read_inputs
    from tpaw.plan import plan_run
    from tpaw.report.progress import progress
    from tpaw.report.tables import plan_table

    with progress("reading and tokenising", None, "rows") as advance:
        inputs = read_inputs(settings, advance)
    console = _console()
    console.print(plan_table(plan_run(settings, len(inputs.examples))))
    for text in (inputs.described(), *inputs.first_rows()):
        console.print(text, markup=False, highlight=False, soft_wrap=True)


@app.command()
def answer(
    checkpoint: Annotated[
        str, typer.Argument(metavar="MODEL_OR_RUN[@i]", help="A model, a run, or its θ_i.")
    ],
    data: Annotated[
        str | None,
        typer.Option("--data", help="Rows to answer. Default: the held-out rows of the run."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder. Default: answers/NAME.")
    ] = None,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="The likeliest token each time; nothing is sampled.")
    ] = False,
    set_: Overrides = [],  # noqa: B006
) -> None:
    """Answer the prompts of a file, sampled as in the run, for `tpaw judge` and alpaca_eval."""
    from tpaw.answers import answer_rows

    with _stoppable("the same command") as stop:
        folder = answer_rows(checkpoint, data, output, greedy=greedy, overrides=set_, stop=stop)
    print(f"Answers: {folder}")


@app.command()
def judge(
    a: Annotated[str, typer.Argument(metavar="A", help="A folder of `tpaw answer`, or a file.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one, on the same prompts.")],
    endpoint: Annotated[
        str, typer.Option("--endpoint", help="URL of an OpenAI-compatible endpoint, …/v1.")
    ],
    model: Annotated[str, typer.Option("--model", help="The judge's name at the endpoint.")],
    key_env: Annotated[
        str | None,
        typer.Option("--key-env", help="Environment variable that holds the endpoint's key."),
    ] = None,
    prompt: Annotated[
        Path | None, typer.Option("--prompt", help="Another prompt; see docs/evaluation.md.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder. Default: judgements/A-vs-B.")
    ] = None,
    cache: Annotated[
        Path, typer.Option("--cache", help="Folder of the judge's replies, for all comparisons.")
    ] = Path("judgements/replies"),
    parallel: Annotated[int, typer.Option("--parallel", min=1, help="Requests at a time.")] = 8,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Longest reply.")] = 1024,
) -> None:
    """Pairwise win rate of A against B, asked of a judge in both orders."""
    from tpaw.judge.match import Judge
    from tpaw.judge.prompt import load_prompt
    from tpaw.judging import judge_outputs, key_from
    from tpaw.report.tables import win_rate_table

    with _stoppable("the same command") as stop:
        folder, results = judge_outputs(
            (a, b),
            Judge(model, load_prompt(prompt), max_tokens),
            endpoint,
            key_from(key_env),
            output,
            cache,
            parallel=parallel,
            stop=stop,
        )
    console = _console()
    console.print(win_rate_table(results))
    for text in filter(None, (results.get("note"), f"Results: {folder}")):
        console.print(text, markup=False, highlight=False, soft_wrap=True)


@app.command()
def study(
    source: Annotated[
        str,
        typer.Argument(
            metavar="STUDY",
            help=f"A YAML file, or one that comes along ({', '.join(study_names())}).",
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder. Default: studies/STUDY.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time; they share the cores.")] = 1,
) -> None:
    """Run methods × settings × seeds, or go on with them; then compare, with statistics."""
    from tpaw.report.study import sentences, study_tables
    from tpaw.study.publish import publish_study
    from tpaw.study.runner import run_study, runs_of

    output = output or Path("studies") / Path(source).stem
    settings, conditions = read_study(source)
    runs = runs_of(conditions, settings.seeds, output)
    with _stoppable(f"tpaw study {shlex.quote(source)} -o {shlex.quote(str(output))}") as stop:
        failures = run_study(runs, output, jobs, stop)
    content = publish_study(source, settings, conditions, runs, failures, output, jobs)
    console = _console()
    for table in study_tables(content):
        console.print(table)
    for text in (*sentences(content), f"Report and figures: {output}"):
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    if failures:
        raise typer.Exit(1)


@app.command(hidden=True)
def prepare(directory: Path) -> None:
    """Do all of a run that comes before its first training; `tpaw study` shares it."""
    from tpaw.study.sharing import prepare_shared

    with _stoppable(f"tpaw prepare {shlex.quote(str(directory))}") as stop:
        prepare_shared(directory, stop)


@config_app.command("show")
def config_show(config: Sources, set_: Overrides = []) -> None:  # noqa: B006
    """Print the complete configuration, with a comment on every setting."""
    print(to_yaml(_load(config, set_), comments=True), end="")


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON schema of a configuration."""
    print(json.dumps(RunConfig.model_json_schema(by_alias=True), indent=2))


def main() -> None:
    """Run the command line; a `TpawError` becomes its text and its exit code."""
    # Read when the libraries are imported: their own bars would fight with ours.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except TpawError as error:
        print(f"tpaw: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


@contextlib.contextmanager
def _stoppable(again: str) -> Iterator[StopSignal]:
    """Listen for Ctrl-C and SIGTERM; say what goes on with the work, and exit as a shell expects.

    Args:
        again: the command.
    """
    stop = StopSignal()
    with stop.listening():
        try:
            yield stop
        except (Interrupted, KeyboardInterrupt) as interruption:
            number = getattr(interruption, "signal_number", None) or stop.signal_number or 2
            print(f"stopped; go on with: {again}", file=sys.stderr)
            raise typer.Exit(128 + number) from None


def _load(sources: list[str], overrides: list[str]) -> RunConfig:
    return RunConfig.load(*(_config_of(source) for source in sources), overrides=overrides)


def _config_of(source: str) -> str:
    run = RunDirectory(source)
    return str(run.config_file) if run.has_begun() else source


def _default_output(sources: list[str]) -> Path:
    if len(sources) == 1 and RunDirectory(sources[0]).has_begun():
        return Path(sources[0])
    return Path("runs") / "-".join(Path(source).stem for source in sources)


def _print_summary(run: RunDirectory, settings: RunConfig) -> None:
    from tpaw.report.summary import summarise
    from tpaw.report.tables import summary_table

    console = _console()
    console.print(summary_table(summarise(run, settings)))
    console.print(f"Results: {run.root}", markup=False, highlight=False, soft_wrap=True)


def _console() -> Console:
    # Wide enough for the tables where the output is a file or a pipe.
    return Console() if sys.stdout.isatty() else Console(width=140)
