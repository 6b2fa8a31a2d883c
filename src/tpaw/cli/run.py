"""The commands `run`, `sft`, `status`, `plan` and `config`."""

from __future__ import annotations

import contextlib
import json
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from tpaw.cli.common import (
    Command,
    Overrides,
    Trust,
    console_of_stdout,
    load_libraries,
    stoppable,
)
from tpaw.config.files import recipe_summaries, to_yaml
from tpaw.config.schema import RunConfig
from tpaw.errors import InputError, printable
from tpaw.evaluation.benchmarks.suite import load_suites
from tpaw.runtime.console import TextConsole
from tpaw.storage.run_directory import (
    RunDirectory,
    needs_trust,
    refuse_untrusted_code,
    refuse_untrusted_server,
)
from tpaw.storage.run_directory import restart_iteration as discard_training

if TYPE_CHECKING:
    from rich.console import RenderableType

    from tpaw.config.plan import IterationPlan
    from tpaw.data.inputs import Inputs

app = typer.Typer()
config_app = typer.Typer(
    help="List the recipes, print a complete configuration, or print its JSON schema."
)
app.add_typer(config_app, name="config", no_args_is_help=True)

Found = TypeVar("Found")
SECONDS_BETWEEN_LOOKS = 2.0
Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="CONFIG...",
        help="A YAML file, a recipe (see `tpaw config list`) or a run directory. Later ones "
        "override earlier ones.",
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="Run directory. Default: runs/CONFIG, or CONFIG itself if it is a run directory.",
    ),
]


@app.command(cls=Command)
def run(
    config: Sources,
    output: Output = None,
    restart_iteration: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Discard the unfinished training of iteration N and train it from the start. "
            "Its responses and log-probs are kept.",
        ),
    ] = None,
    set_: Overrides = [],  # noqa: B006
    trust: Trust = False,
) -> None:
    """Run self-play or a baseline.

    Run the same command again to resume a run that was stopped.
    If CONFIG is a run directory, that run is resumed.

    Example: tpaw run mine.yaml -o runs/mine --set seed=1
    """
    output = output or _default_output(config)
    settings = load(config, set_, trust)
    if restart_iteration is not None:
        discard_training(output, restart_iteration)
    _run(settings, output)


@app.command(cls=Command)
def new(
    config: Annotated[Path, typer.Argument(metavar="FILE", help="The YAML file to write.")],
    model: Annotated[str, typer.Option(help="The SFT model: a folder or a Hub id.")],
    data: Annotated[str, typer.Option(help="Its records: a file, a folder or a Hub id.")],
    heldout: Annotated[
        str | None,
        typer.Option(help="Records to evaluate on. Default: a tenth of the prompts, split off."),
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(
            metavar="ROLE=NAME,...",
            help="Columns with unusual names, such as prompt=text,target=label or messages=chat. "
            "Roles: prompt, target (or completion, as in TRL), messages, chosen, rejected.",
        ),
    ] = None,
) -> None:
    """Look at a model and its data, and write a configuration that runs.

    Example: tpaw new mine.yaml --model ./sft-model --data train.jsonl
    """
    from tpaw.pipeline.proposal import columns_of, propose, write_proposal
    from tpaw.runtime.progress import progress

    named = columns_of(columns) if columns is not None else None
    with progress("read and tokenize", None, "records") as advance:
        proposal = propose(config, model, data, heldout, named, advance)
    write_proposal(config, proposal)
    console = console_of_stdout()
    for text in (*proposal.reasons, *proposal.first_rows):
        console.print_text(text)
    console.print_text(f"Written: {', '.join(map(str, (config, *proposal.files)))}")
    name = shlex.quote(str(config))
    console.print_text(f"Next: tpaw plan {name}; tpaw probe {name}; tpaw run {name}")


@app.command(cls=Command)
def sft(
    config: Sources,
    output: Output = None,
    set_: Overrides = [],  # noqa: B006
    trust: Trust = False,
) -> None:
    """Train a starting model by supervised fine-tuning (TRL) with the paper's settings.

    Equal to `tpaw run sft CONFIG...`: CONFIG overrides the recipe sft.
    The model is written to iterations/1/checkpoint in the run directory.

    Example: tpaw sft mine.yaml -o runs/sft
    """
    output = output or _default_output(["sft", *config] if not _is_run(config) else config)
    settings = load(["sft", *config], set_, trust)
    if settings.method != "sft":
        raise InputError(
            f"method: {settings.method}: `tpaw sft` supports only method sft; use `tpaw run`"
        )
    _run(settings, output)


def _run(settings: RunConfig, output: Path) -> None:
    from tpaw.report.live import live_view
    from tpaw.runtime.progress import screen
    from tpaw.selfplay import self_play

    trust = " --trust" if needs_trust(settings) else ""
    run = RunDirectory(output)
    console = TextConsole(stderr=True)
    view = lambda: live_view(run, settings, console.width) if run.has_begun() else None  # noqa: E731
    with stoppable(f"tpaw run {shlex.quote(str(output))}{trust}") as stop, screen(view, console):
        load_libraries("tpaw.pipeline.stages")
        self_play(settings, output, stop)
    _print_summary(run, settings)


@app.command(cls=Command)
def status(
    directory: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    watch: Annotated[
        bool,
        typer.Option(
            "--watch",
            help="Show it again whenever it changes, until the run is finished. Ctrl-C ends this "
            "command and not the run.",
        ),
    ] = False,
) -> None:
    """Show which stages of a run are done and which stage is next.

    Example: tpaw status runs/mine --watch
    """
    if watch and not RunDirectory(directory).has_begun():
        console_of_stdout().print_text(f"{directory}: waiting for the run to begin")
        with contextlib.suppress(KeyboardInterrupt):
            while not RunDirectory(directory).has_begun():
                time.sleep(SECONDS_BETWEEN_LOOKS)
    run = _run_in(directory)
    settings = run.load_config()
    from tpaw.report.status import done_and_next

    if watch:
        _watch(run, settings)
    console = console_of_stdout()
    done, upcoming = done_and_next(run, settings)
    for stage in done:
        console.print_text(f"done  {stage}")
    console.print_text(f"next  {upcoming}" if upcoming else "finished")
    if done:
        _print_summary(run, settings)


def _watch(run: RunDirectory, settings: RunConfig) -> None:
    """Show a view of a run until it is finished, or until Ctrl-C."""
    from rich.live import Live

    from tpaw.report.live import live_view
    from tpaw.report.status import done_and_next

    console, shown = console_of_stdout(), None
    with contextlib.suppress(KeyboardInterrupt), contextlib.ExitStack() as stack:
        show: Callable[[RenderableType], None] = console.print
        if console.is_terminal:
            in_place = Live(console=console, transient=True, vertical_overflow="ellipsis")
            show = stack.enter_context(in_place).update
        while True:
            found = _tried_twice(lambda: done_and_next(run, settings))
            if found != shown:
                show(_tried_twice(lambda: live_view(run, settings, console.width))(None))
            shown = found
            if found[1] is None:
                return
            time.sleep(SECONDS_BETWEEN_LOOKS)


def _tried_twice(look: Callable[[], Found]) -> Found:
    from tpaw.errors import ArtifactError

    try:
        return look()
    except (ArtifactError, OSError):  # a file may be replaced while it is read
        time.sleep(SECONDS_BETWEEN_LOOKS)
        return look()


@app.command(cls=Command)
def report(
    directory: Annotated[
        Path,
        typer.Argument(metavar="RUN_OR_STUDY", help="A run directory, or the folder of a study."),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="The file to write. Default: report.html in that folder."
        ),
    ] = None,
) -> None:
    """Write the report of a run or a study: one HTML file, which needs no network.

    `tpaw run` writes it too, whenever a stage ends, and `tpaw study` at its end.

    Example: tpaw report runs/mine -o mine.html
    """
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        raise InputError(
            f"--output {output}: cannot be written; give a file in a folder that exists"
        )
    path = output or directory / "report.html"
    study = directory / "study.json"
    if study.is_file():
        from tpaw.report.html.study import write_study_page
        from tpaw.report.study import read_study_results

        found = read_study_results(study)
        try:
            write_study_page(path, found)
        except (AttributeError, LookupError, TypeError, ValueError) as error:  # edited by hand
            raise InputError(
                f"{study}: cannot be read as the results of a study: {printable(repr(error))}"
            ) from None
    else:
        run = _run_in(directory)
        settings = run.load_config()
        from tpaw.report.html.page import write_report

        write_report(run, settings, path)
    console_of_stdout().print_text(f"Report: {path}")


def _run_in(directory: Path) -> RunDirectory:
    """The run of a folder.

    Raises:
        InputError: there is none.
    """
    run = RunDirectory(directory)
    if run.has_begun():
        return run
    if not directory.is_dir():
        raise InputError(f"{directory}: no such folder; give a run directory")
    within = [path.name for path in sorted(directory.iterdir()) if RunDirectory(path).has_begun()]
    hint = f"; it holds the runs {', '.join(within[:5])}" if within else ""
    raise InputError(f"{directory}: not a run directory; it has no run.json{hint}")


@app.command(cls=Command)
def plan(
    config: Sources,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Run a few real steps of each stage on this device, and show what the run takes: "
            "time, and peak memory. Nothing of it is kept.",
        ),
    ] = False,
    price_per_hour: Annotated[
        float | None,
        typer.Option(min=0.0, help="Price of one hour of the device, for --measure."),
    ] = None,
    set_: Overrides = [],  # noqa: B006
    trust: Trust = False,
) -> None:
    """Show the players, the cost and the disk space of every iteration.

    Nothing is trained or written, but for --measure in a temporary folder.

    Example: tpaw plan mine.yaml --measure --price-per-hour 2.50
    """
    if price_per_hour is not None and not measure:
        raise InputError(f"--price-per-hour {price_per_hour:g}: it needs --measure")
    settings = load(config, set_, trust)
    from tpaw.config.plan import plan_run
    from tpaw.models.size import model_size
    from tpaw.pipeline.preflight import read_inputs, try_architecture
    from tpaw.pipeline.space import bytes_of_inputs, described_space, plan_space
    from tpaw.report.tables import plan_table, space_table
    from tpaw.runtime.progress import progress

    with progress("read and tokenize", None, "records") as advance:
        inputs = read_inputs(settings, advance)
    layout = try_architecture(settings)
    plans = plan_run(settings, len(inputs.examples))
    sizes = (
        model_size(settings.model, settings.iterations),
        len(inputs.heldout),
        bytes_of_inputs(inputs.tokens, len(inputs.examples) + len(inputs.heldout)),
    )
    spaces = plan_space(settings, plans, *sizes)
    console = console_of_stdout()
    console.print(plan_table(plans))
    console.print(space_table([space._asdict() for space in spaces]))
    space = described_space(settings, plans, *sizes)
    for text in (*space, *layout, inputs.described(), *inputs.first_rows()):
        console.print_text(text)
    if measure:
        _print_costs(settings, inputs, plans, price_per_hour)


def _print_costs(
    settings: RunConfig, inputs: Inputs, plans: Sequence[IterationPlan], price: float | None
) -> None:
    from tpaw.pipeline.costs import measure_costs
    from tpaw.report.costs import costs_table, described_costs

    with stoppable("tpaw plan --measure") as stop:
        found = measure_costs(settings, inputs, stop)
    heldout = len(inputs.heldout)
    costs = {"θ_0": {"evaluate": found.of_evaluation(heldout, is_first=True)}} if heldout else {}
    costs |= {f"θ_{plan.iteration}": found.of_iteration(plan, heldout) for plan in plans}
    console = console_of_stdout()
    console.print(costs_table(costs))
    for text in (*described_costs(costs, found.memory._asdict(), price), found.described()):
        console.print_text(text)


@config_app.command("list")
def config_list() -> None:
    """List the recipes that come with the package.

    Example: tpaw config list
    """
    summaries = recipe_summaries()
    width = max(map(len, summaries))
    for name, summary in summaries.items():
        print(f"{name:{width}}  {summary}")


@config_app.command("show", cls=Command)
def config_show(config: Sources, set_: Overrides = []) -> None:  # noqa: B006
    """Print the complete configuration with the description of every setting.

    Example: tpaw config show starter spin --set seed=1
    """
    print(to_yaml(load(config, set_, trust=True), comments=True), end="")  # runs no code


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON schema of a configuration.

    Example: tpaw config schema > schema.json
    """
    print(json.dumps(RunConfig.model_json_schema(by_alias=True), indent=2))


def load(sources: list[str], overrides: list[str], trust: bool) -> RunConfig:
    """Read the configuration of a command; code of a run directory is refused without `trust`."""
    runs = [RunDirectory(source) for source in sources]
    files = [
        str(run.config_file) if run.has_begun() else source
        for source, run in zip(sources, runs, strict=True)
    ]
    # Run directories, also where their config.yaml is named.
    used = [run for run in (RunDirectory(Path(file).parent) for file in files) if run.has_begun()]
    for run in used:
        run.check_config()
    config = RunConfig.load(*files, overrides=overrides)
    load_suites(config.evaluate.suites, trust=trust)
    for run in used:
        refuse_untrusted_code(config.model, run, trust=trust)
        refuse_untrusted_server(config.generate, run, trust=trust)
    return config


def _is_run(sources: list[str]) -> bool:
    return len(sources) == 1 and RunDirectory(sources[0]).has_begun()


def _default_output(sources: list[str]) -> Path:
    if _is_run(sources):
        return Path(sources[0])
    return Path("runs") / "-".join(Path(source).stem for source in sources)


def _print_summary(run: RunDirectory, settings: RunConfig) -> None:
    from tpaw.report.alarms import Alarm
    from tpaw.report.critic import critic_tables
    from tpaw.report.summary import summarise
    from tpaw.report.tables import suites_of_run, summary_table

    console = console_of_stdout()
    summary = summarise(run, settings)
    console.print(summary_table(summary, console.width))
    for table in (*critic_tables(summary), *suites_of_run(summary)):
        console.print(table)
    lines = [Alarm(**alarm).line() for alarm in summary["alarms"]]
    for text in (*lines, *summary["notes"], f"Results: {run.root}"):
        console.print_text(text)
    if run.report_file.exists():
        console.print_text(f"Report: {run.report_file}")
