"""Draw what `tpaw status RUN` prints: `python -m website.terminal RUN docs/images/terminal.svg`.

The picture is an SVG without fonts of its own, so that it loads nothing from a network.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

FONTS = "Menlo, Consolas, DejaVu Sans Mono, monospace"


def main() -> None:
    """Run the command with colours, and write the picture."""
    run, picture = Path(sys.argv[1]), Path(sys.argv[2])
    printed = subprocess.run(
        [sys.executable, "-m", "tpaw", "status", run.name],
        cwd=run.parent,
        env={**os.environ, "FORCE_COLOR": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    lines = printed.rstrip().split("\n")
    # The list of stages is long, and its end says enough.
    table = next(i for i, line in enumerate(lines) if "┏" in line)
    shown = [f"$ tpaw status {run.name}", "…", *lines[table - 4 :]]
    console = Console(record=True, width=126, file=io.StringIO())
    for line in shown:
        console.print(Text.from_ansi(line.rstrip()))
    svg = console.export_svg(title="tpaw", theme=MONOKAI)
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.S)
    svg = re.sub(r"font-family: [^;]+;", f"font-family: {FONTS};", svg)
    picture.write_text(re.sub(r"[ \t]+$", "", svg, flags=re.M), encoding="utf-8")


if __name__ == "__main__":
    main()
