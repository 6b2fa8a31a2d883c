"""The command line. Each command is a few calls into the library."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

import tpaw
from tpaw.cli.evaluate import app as evaluate_app
from tpaw.cli.run import app as run_app
from tpaw.cli.study import app as study_app
from tpaw.errors import TpawError

app = typer.Typer(
    help="Self-play fine-tuning of an SFT model with TPAW (arXiv 2605.09922).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(run_app)
app.add_typer(evaluate_app)
app.add_typer(study_app)


@app.callback(invoke_without_command=True)
def top(
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    """Self-play fine-tuning of an SFT model with TPAW (arXiv 2605.09922)."""
    if version:
        print(f"tpaw {tpaw.__version__}")
        raise typer.Exit


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
