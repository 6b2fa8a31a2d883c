"""The command `tpaw`. Each subcommand is a few calls into the library."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

import tpaw
from tpaw.cli.evaluate import app as evaluate_app
from tpaw.cli.run import app as run_app
from tpaw.cli.study import app as study_app
from tpaw.errors import TpawError, for_terminal

app = typer.Typer(
    help="Fine-tune an SFT model by self-play with TPAW (arXiv 2605.09922).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(run_app)
app.add_typer(evaluate_app)
app.add_typer(study_app)


@app.callback(invoke_without_command=True)
def top(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Fine-tune an SFT model by self-play with TPAW (arXiv 2605.09922)."""
    if version:
        print(f"tpaw {tpaw.__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line. For a `TpawError`, print its text and exit with its exit code."""
    # The libraries read these variables at import. Their progress bars would overwrite ours.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except TpawError as error:
        print(for_terminal(f"tpaw: {error}"), file=sys.stderr)
        sys.exit(error.exit_code)
