"""The commands that take a model out of a run: `export`, `push` and `ask`."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer

from tpaw.cli.common import Command, Overrides, Trust, console_of_stdout
from tpaw.errors import InputError

app = typer.Typer()

Dtype = Literal["fp32", "bf16", "fp16"]
Merge = Annotated[
    bool,
    typer.Option(
        "--merge",
        help="Write an adapter as an ordinary model: add it to the weights of its base, in "
        "fp32. It has no effect on a checkpoint that is a whole model.",
    ),
]


@app.command(cls=Command)
def export(
    reference: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_RUN",
            help="RUN (its newest checkpoint), RUN@3 (its θ_3), or a model or adapter (folder or "
            "Hub id).",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The new folder. It must be empty or absent.")
    ],
    dtype: Annotated[Dtype, typer.Option(help="Type of the weights that are written.")] = "fp32",
    merge: Merge = False,
    trust: Trust = False,
) -> None:
    """Write a checkpoint as a model folder for other programs.

    The folder holds weights, configuration and tokenizer.
    A checkpoint that a run trained also gets a model card, README.md.
    Without --merge, an adapter is written as an adapter of PEFT.

    Example: tpaw export runs/mine@4 --dtype bf16 --merge -o my-model
    """
    from tpaw.models.export import export as export_checkpoint
    from tpaw.models.references import find_checkpoint
    from tpaw.report.model_card import model_card

    checkpoint = find_checkpoint(reference, trust=trust)
    card = model_card(checkpoint, dtype=dtype, merge=merge)
    export_checkpoint(checkpoint, output, dtype, merge=merge, card=card)
    console_of_stdout().print_text(f"Written: {output}")


@app.command(cls=Command)
def push(
    reference: Annotated[
        str,
        typer.Argument(
            metavar="RUN[@i]", help="RUN (its newest checkpoint) or RUN@3 (its θ_3); not θ_0."
        ),
    ],
    repository: Annotated[
        str, typer.Argument(metavar="ORG/NAME", help="The repository on the Hugging Face Hub.")
    ],
    private: Annotated[
        bool, typer.Option("--private", help="Create a private repository.")
    ] = False,
    dtype: Annotated[
        Dtype,
        typer.Option(
            help="Type of the weights. Default: bf16, as most models are shared; fp32 keeps every "
            "bit of the run's weights."
        ),
    ] = "bf16",
    merge: Merge = False,
    trust: Trust = False,
) -> None:
    """Send a checkpoint of a run to the Hugging Face Hub, with a model card.

    It sends what `tpaw export` writes, as one commit.
    The token is that of `hf auth login` or HF_TOKEN.
    A repository that exists must be empty or made by this command.
    Its files are then replaced; the Hub keeps the earlier commits.

    Example: tpaw push runs/mine@4 my-org/my-model --merge --private
    """
    from tpaw.models.push import Destination, find_to_push
    from tpaw.models.push import push as push_checkpoint
    from tpaw.report.model_card import TAG, model_card

    with _interruptible("stopped; the run is unchanged; to send it, run the same command again"):
        destination = Destination(repository, private=private)
        checkpoint = find_to_push(reference, merge=merge, trust=trust)
        destination.check(TAG)
        card = model_card(checkpoint, dtype=dtype, merge=merge, repository=repository)
        assert card is not None
        url = push_checkpoint(checkpoint, destination, dtype, merge=merge, card=card)
    console_of_stdout().print_text(f"Sent: {url}")


@app.command(cls=Command)
def ask(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="A [B]",
            help="One or two checkpoints: RUN (its newest), RUN@3 (its θ_3), or a model (folder or "
            "Hub id).",
        ),
    ],
    greedy: Annotated[
        bool, typer.Option("--greedy", help="Decode greedily instead of sampling.")
    ] = False,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Longest answer in tokens. Default: that of the run."),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="Answer this prompt, print the answers and end.")
    ] = None,
    set_: Overrides = [],  # noqa: B006
    trust: Trust = False,
) -> None:
    """Type prompts; one or two checkpoints answer them side by side, token by token.

    Prompt format, sampling and precision are those of the run.
    Each prompt is a conversation of its own.
    Ctrl-C ends the answer that is being made. An empty line or Ctrl-D leaves.
    Without a terminal, each line of the standard input is a prompt.

    Example: tpaw ask runs/mine@4 runs/mine@0 --greedy
    """
    if len(checkpoints) > 2:
        raise InputError(f"A [B]: {len(checkpoints)} checkpoints; give one or two")
    from tpaw.ask.speaker import load_speaker
    from tpaw.ask.terminal import answer_lines, talk
    from tpaw.models.references import find_checkpoint

    with _interruptible("stopped"):
        found = [find_checkpoint(reference, trust=trust) for reference in checkpoints]
        speakers = [
            load_speaker(checkpoint, greedy=greedy, max_new_tokens=max_new_tokens, overrides=set_)
            for checkpoint in found
        ]
        console = console_of_stdout()
        if prompt is None and sys.stdin.isatty() and console.is_terminal:
            with contextlib.suppress(ImportError):  # `input` then edits and remembers lines
                import readline  # noqa: F401
            talk(speakers, console, input)
            return
        lines = [prompt] if prompt is not None else (line.rstrip("\n") for line in sys.stdin)
        if not answer_lines(speakers, lines, console):
            raise typer.Exit(InputError.exit_code)


class _Terminated(BaseException):
    """SIGTERM has arrived. Nothing but `_interruptible` catches it."""


@contextlib.contextmanager
def _interruptible(message: str) -> Iterator[None]:
    """End with one line and a shell's exit code on Ctrl-C and SIGTERM. The work cleans up."""

    def terminate(number: int, frame: object) -> None:
        raise _Terminated

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except (KeyboardInterrupt, _Terminated) as error:
        number = signal.SIGTERM if isinstance(error, _Terminated) else signal.SIGINT
        print(message, file=sys.stderr)
        raise typer.Exit(128 + number) from None
    finally:
        signal.signal(signal.SIGTERM, previous)
