"""The command `tpaw`. Each subcommand is a few calls into the library."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

import tpaw
from tpaw.cli.evaluate import app as evaluate_app
from tpaw.cli.probe import app as probe_app
from tpaw.cli.run import app as run_app
from tpaw.cli.share import app as share_app
from tpaw.cli.study import app as study_app
from tpaw.errors import (
    MemoryShortageError,
    StorageError,
    TpawError,
    first_line,
    for_terminal,
    printable,
)
from tpaw.runtime.memory import is_out_of_memory
from tpaw.storage.failures import storage_failure

app = typer.Typer(
    help="Fine-tune an SFT model by self-play with TPAW (arXiv 2605.09922).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(run_app)
app.add_typer(probe_app)
app.add_typer(evaluate_app)
app.add_typer(study_app)
app.add_typer(share_app)


@app.callback(invoke_without_command=True)
def top(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Fine-tune an SFT model by self-play with TPAW (arXiv 2605.09922)."""
    if show_version:
        print(f"tpaw {tpaw.__version__}")
        raise typer.Exit


@app.command("env")
def env() -> None:
    """Print versions and hardware, for a bug report.

    Example: tpaw env
    """
    import platform

    import torch

    from tpaw.storage.run_directory import environment

    found = environment()
    lines = {
        **found["versions"],
        **{name: _version(name) for name in ("peft", "trl", "bitsandbytes", "ray", "lm_eval")},
        "python": found["python"],
        "system": f"{platform.system()} {platform.release()}, {found['machine']}",
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else "?"),
        "CUDA": str(torch.version.cuda),
        "GPUs": ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        or "none",
    }
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{name:{width}}  {value}")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def main() -> None:
    """Run the command line. An expected failure is one text and an exit code.

    Anything else is a bug of TPAW: its traceback is shown, with the request to report it.
    """
    # The libraries read these variables at import. Their progress bars would overwrite ours.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # It warns when it is imported, also where nobody asked for 4-bit weights on a CPU.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        app()
    except Exception as error:
        expected = _expected(error)
        if expected is None:
            print(for_terminal(traceback.format_exc().rstrip()), file=sys.stderr)
            print(
                "tpaw: this is a bug in tpaw; please report it with the command and the lines "
                "above. Published files are kept.",
                file=sys.stderr,
            )
            sys.exit(1)
        print(for_terminal(f"tpaw: {expected}"), file=sys.stderr)
        sys.exit(expected.exit_code)


def _expected(error: Exception) -> TpawError | None:
    """The error in a user's words, or None if it is a bug."""
    if isinstance(error, TpawError):
        return error
    if (failure := storage_failure(error, os.curdir)) is not None:
        return StorageError(f"{failure}. Correct the cause, then run the same command again.")
    if is_out_of_memory(error):  # where no setting decides how much is needed
        return MemoryShortageError(
            f"memory has run out ({printable(first_line(error))}); free some memory or use a "
            "machine with more, then run the same command again. Published files are kept."
        )
    if isinstance(error, OSError):  # libraries that reach for a network or a file
        return TpawError(str(error))
    return None
