"""The commands `compare`, `evaluate`, `answer` and `judge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tpaw.cli.common import Command, Overrides, Trust, console_of_stdout, stoppable
from tpaw.errors import InputError
from tpaw.evaluation.benchmarks.suite import suite_names

app = typer.Typer()


@app.command(cls=Command)
def compare(
    systems: Annotated[
        list[str],
        typer.Argument(
            metavar="A B...",
            help="Two or more systems: RUN (its newest checkpoint), RUN@i (its θ_i), or a folder "
            "that `tpaw evaluate` wrote. A is the baseline.",
        ),
    ],
    suite: Annotated[
        str | None,
        typer.Option(
            "--suite",
            help="Compare results on this benchmark suite. "
            "Default: the held-out records of the run.",
        ),
    ] = None,
    json_: Annotated[
        Path | None, typer.Option("--json", help="Also write all numbers to this JSON file.")
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            "--html",
            help="Also write a page with the numbers and the systems' answers side by side.",
        ),
    ] = None,
) -> None:
    """Compare every system with the first one on the same items, with statistical tests.

    Example: tpaw compare runs/sft runs/mine --html comparison.html
    """
    for option, path in (("--json", json_), ("--html", html)):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise InputError(
                f"{option} {path}: cannot be written; give a file in a folder that exists"
            )
    from tpaw.evaluation.compare import compare as compare_evaluations
    from tpaw.evaluation.load import find_evaluation
    from tpaw.report.comparison import comparison_table
    from tpaw.runtime.progress import progress
    from tpaw.storage.artifacts import write_json

    evaluations = [find_evaluation(system, suite) for system in systems]
    measures = sum(len(evaluation.measures) for evaluation in evaluations)
    with progress("compare", measures, "measures") as advance:
        comparison = compare_evaluations(evaluations, advance)
    console = console_of_stdout()
    console.print(comparison_table(comparison))
    for text in comparison.notes:
        console.print_text(text)
    if json_ is not None:
        write_json(json_, comparison.as_json())
    if html is not None:
        from tpaw.report.html.comparison import write_comparison

        write_comparison(html, comparison, evaluations)


@app.command(cls=Command)
def evaluate(
    reference: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_RUN",
            help="A run directory, RUN@3 (its θ_3), or a model (folder or Hub id).",
        ),
    ],
    suite: Annotated[
        str, typer.Option(help=f"{', '.join(suite_names())}, or the path of a YAML file.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder for the results of a model. Default: evaluations/MODEL/SUITE. "
            "Results of a run are always written to its run directory.",
        ),
    ] = None,
    trust: Trust = False,
) -> None:
    """Run lm-evaluation-harness benchmarks on a model, or on every checkpoint of a run.

    Finished evaluations are skipped.

    Example: tpaw evaluate runs/mine --suite gsm8k
    """
    from tpaw.evaluation.benchmarks.run import evaluate_suite
    from tpaw.report.tables import suite_table

    with stoppable("the same command again") as stop:
        found = evaluate_suite(reference, suite, output, stop, trust=trust)
    console = console_of_stdout()
    console.print(suite_table([one.results for one in found]))
    for one in found:
        console.print_text(f"Results: {one.folder}")


@app.command(cls=Command)
def answer(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_RUN[@i]",
            help="A model (folder or Hub id), a run directory (its newest checkpoint), or RUN@i.",
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="File of records that contain the prompts. Default: the held-out records of the "
            "run.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for the responses. Default: answers/NAME."),
    ] = None,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="Decode greedily instead of sampling.")
    ] = False,
    set_: Overrides = [],  # noqa: B006
    trust: Trust = False,
) -> None:
    """Generate responses to the prompts of a file, for `tpaw judge` and alpaca_eval.

    Sampling uses the settings of the run.

    Example: tpaw answer runs/mine@4 --data prompts.jsonl --greedy
    """
    from tpaw.evaluation.judge.answers import answer_rows

    with stoppable("the same command again") as stop:
        folder = answer_rows(
            checkpoint, data, output, greedy=greedy, overrides=set_, stop=stop, trust=trust
        )
    console_of_stdout().print_text(f"Responses: {folder}")


@app.command(cls=Command)
def judge(
    a: Annotated[
        str,
        typer.Argument(
            metavar="A",
            help="A folder that `tpaw answer` wrote, or an alpaca_eval file.",
        ),
    ],
    b: Annotated[
        str,
        typer.Argument(
            metavar="B",
            help="The same for the other system, on the same prompts.",
        ),
    ],
    endpoint: Annotated[
        str, typer.Option("--endpoint", help="URL of an OpenAI-compatible endpoint, ending in /v1.")
    ],
    model: Annotated[str, typer.Option("--model", help="The judge's model name at the endpoint.")],
    key_env: Annotated[
        str | None,
        typer.Option("--key-env", help="Name of the environment variable that holds the API key."),
    ] = None,
    prompt: Annotated[
        Path | None,
        typer.Option(
            "--prompt", help="File with a prompt for the judge; see docs/how-to/judge.md."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for the results. Default: judgements/A-vs-B."),
    ] = None,
    cache: Annotated[
        Path,
        typer.Option("--cache", help="Folder that caches the judge's replies for all comparisons."),
    ] = Path("judgements/replies"),
    parallel: Annotated[
        int, typer.Option("--parallel", min=1, help="Number of parallel requests.")
    ] = 8,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, help="Longest reply of the judge, in tokens.")
    ] = 1024,
) -> None:
    """Ask a judge model which responses are better, and report the win rate of A against B.

    The judge sees each pair in both orders.

    Example: tpaw judge answers/a answers/b --endpoint http://localhost:8000/v1 --model judge
    """
    from tpaw.evaluation.judge.match import Judge
    from tpaw.evaluation.judge.prompt import load_prompt
    from tpaw.evaluation.judge.run import judge_outputs, key_from
    from tpaw.report.tables import win_rate_table

    with stoppable("the same command again") as stop:
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
        console.print_text(text)
