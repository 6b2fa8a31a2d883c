"""What TPAW does with each architecture of transformers: checks it, and keeps the table of it.

    python checks/architectures.py            fail if a model gets wrong numbers, or if
                                              docs/reference/models.md says something else
    python checks/architectures.py --write    write docs/reference/models.md

It takes a few seconds for each architecture. To share the work, give the same file of results to
several processes, each with a piece of the work, and then once without a piece:

    python checks/architectures.py --results found.jsonl --piece 1/2 &
    python checks/architectures.py --results found.jsonl --piece 2/2
    python checks/architectures.py --results found.jsonl --write

What is in the file already is not computed again; remove the file after a change of the code.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path

import transformers

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from architectures import ARCHITECTURES, Examined, cells, examined  # noqa: E402

PAGE = ROOT / "docs" / "reference" / "models.md"
BEGIN = "| architecture |"
HEADINGS = ("architecture", "layout", "output head", "prompts are answered", "why")


def main() -> int:
    """Return 0 if every model is right and the table is up to date."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the table")
    parser.add_argument("--results", type=Path, help="file that keeps what was found")
    parser.add_argument("--piece", help="i/n: only every n-th architecture, from the i-th on")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    names = list(ARCHITECTURES)
    if arguments.piece:
        i, n = map(int, arguments.piece.split("/"))
        names = names[i - 1 :: n]
    found = _read(arguments.results)
    begin = time.monotonic()
    for name in names:
        if name in found:
            continue
        found[name] = _examined(name)
        if arguments.results:
            with arguments.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps([name, found[name]]) + "\n")
        print(name, *cells(found[name]), found[name].numbers, sep=" | ", flush=True)
    wrong = [name for name in names if found[name].failures]
    print(f"{len(names)} architectures, {len(wrong)} wrong, {time.monotonic() - begin:.0f} s")
    for name in wrong:
        print(f"{name}: {'; '.join(found[name].failures)}")
    if arguments.piece:
        return int(bool(wrong))
    before = PAGE.read_text(encoding="utf-8")
    after = before.partition(BEGIN)[0] + table({name: found[name] for name in ARCHITECTURES})
    if arguments.write:
        PAGE.write_text(after, encoding="utf-8")
    elif after != before:
        print(f"{PAGE.relative_to(ROOT)} differs; run this with --write and review the difference")
        return 1
    return int(bool(wrong))


def _read(file: Path | None) -> dict[str, Examined]:
    if file is None or not file.exists():
        return {}
    lines = file.read_text(encoding="utf-8").splitlines()
    return {name: Examined(*values) for name, values in map(json.loads, lines)}


def _examined(name: str) -> Examined:
    try:
        return examined(name)
    except Exception as error:  # the others are still examined
        return Examined("", "", "", (), (f"{type(error).__name__}: {error}",), {})


def table(found: dict[str, Examined]) -> str:
    """The table of the page, and below it the versions and counts."""
    rows = [HEADINGS, ("---",) * len(HEADINGS)]
    rows += [(name, *cells(one)) for name, one in found.items()]
    lines = ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows]
    layouts = [one.layout for one in found.values()]
    counts = ", ".join(f"{layouts.count(kind)} {kind}" for kind in dict.fromkeys(layouts))
    version = f"transformers {transformers.__version__}"
    return "\n".join(lines) + f"\n\nChecked with {version}: {len(found)} models, {counts}.\n"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


if __name__ == "__main__":
    sys.exit(main())
