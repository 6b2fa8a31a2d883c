"""The commands that tell whether it works: of the command line, and as thin as the others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tpaw.cli.common import Overrides, console_of_stdout, stoppable
from tpaw.errors import InputError
from tpaw.evaluation.benchmarks.suite import suite_names

app = typer.Typer()


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
    from tpaw.evaluation.compare import compare as compare_evaluations
    from tpaw.evaluation.load import find_evaluation
    from tpaw.report.comparison import comparison_table
    from tpaw.runtime.progress import progress
    from tpaw.storage.artifacts import write_json

    evaluations = [find_evaluation(system, suite) for system in systems]
    rows = sum(len(evaluation.measures) for evaluation in evaluations)
    with progress("comparing", rows, "measures") as advance:
        comparison = compare_evaluations(evaluations, advance)
    console = console_of_stdout()
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
    from tpaw.evaluation.benchmarks.run import evaluate_suite
    from tpaw.report.tables import suite_table

    with stoppable("the same command") as stop:
        found = evaluate_suite(reference, suite, output, stop)
    console = console_of_stdout()
    console.print(suite_table([one.results for one in found]))
    for one in found:
        console.print(f"Results: {one.folder}", markup=False, highlight=False, soft_wrap=True)


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
    from tpaw.evaluation.judge.answers import answer_rows

    with stoppable("the same command") as stop:
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
    from tpaw.evaluation.judge.match import Judge
    from tpaw.evaluation.judge.prompt import load_prompt
    from tpaw.evaluation.judge.run import judge_outputs, key_from
    from tpaw.report.tables import win_rate_table

    with stoppable("the same command") as stop:
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
    console = console_of_stdout()
    console.print(win_rate_table(results))
    for text in filter(None, (results.get("note"), f"Results: {folder}")):
        console.print(text, markup=False, highlight=False, soft_wrap=True)
