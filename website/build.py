"""Build the site from docs/, with Zensical and with Material for MkDocs, and check its links.

    python website/build.py     # `make docs` runs it in an environment of its own

The documents link to files outside of docs/, such as ../src/tpaw/selfplay.py. A forge can follow
such a link, but a site has only its pages. So the build works on a copy in build/website, in which
each file that a document names is a page of its own, in source/.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
STAGE = ROOT / "build" / "website"
LANGUAGES = {".py": "python", ".yaml": "yaml"}
FENCES = re.compile(r"(^```.*?^```$)", re.M | re.S)
LINK = re.compile(r"\]\(([^)\s#]+)(#[^)\s]*)?\)")
NOT_SEARCHED = "---\nsearch:\n  exclude: true\n---\n\n"


def stage() -> None:
    """Copy mkdocs.yml and docs/ to `STAGE`, with a page for each file or folder that is linked."""
    shutil.rmtree(STAGE, ignore_errors=True)
    shutil.copytree(DOCS, STAGE / "docs")
    shutil.copy(ROOT / "mkdocs.yml", STAGE)
    # Not a link: hatchling would meet the folder here first, and leave src/ out of what it builds.
    shutil.copytree(ROOT / "src", STAGE / "src", ignore=shutil.ignore_patterns("__pycache__"))
    waiting, done = list(DOCS.rglob("*.md")), set[Path]()
    while waiting:
        source = waiting.pop()
        if source not in done:
            done.add(source)
            page = STAGE / "docs" / _page_of(source)
            page.parent.mkdir(parents=True, exist_ok=True)
            page.write_text(_content(source, waiting.append), encoding="utf-8")


def _page_of(source: Path) -> Path:
    """The place in docs/ of a file or a folder of the repository."""
    inside = source.is_relative_to(DOCS)
    place = source.relative_to(DOCS) if inside else "source" / source.relative_to(ROOT)
    if source.is_dir():
        return place / "index.md"
    return place if inside or source.suffix == ".md" else Path(f"{place}.md")


def _content(source: Path, needed: Callable[[Path], None]) -> str:
    """A file or a folder as Markdown. `needed` gets whatever else has to be a page."""

    def moved(link: re.Match[str]) -> str:
        target = Path(os.path.normpath(source.parent / link[1]))
        if urlsplit(link[1]).scheme:
            return link[0]
        if not target.exists():
            raise SystemExit(f"{source.relative_to(ROOT)}: no such file: {link[1]}")
        if target.is_dir() or not target.is_relative_to(DOCS):
            needed(target)
        return f"]({linked(target)}{link[2] or ''})"

    def linked(target: Path) -> str:
        return os.path.relpath(_page_of(target), _page_of(source).parent)

    name = source.relative_to(ROOT)
    if source.is_dir():
        files = [path for path in sorted(source.iterdir()) if path.is_file()]
        for path in files:
            if not path.is_relative_to(DOCS):
                needed(path)
        rows = [f"- [`{path.name}`]({linked(path)})" for path in files]
        return NOT_SEARCHED + "\n".join([f"# `{name}`", "", *rows, ""])
    text = source.read_text(encoding="utf-8")
    if source.suffix != ".md":
        fence = f"``````{LANGUAGES.get(source.suffix, 'text')}\n{text.rstrip()}\n``````\n"
        return f"{NOT_SEARCHED}# `{name}`\n\n{fence}"
    parts = FENCES.split(text)
    parts[::2] = [LINK.sub(moved, part) for part in parts[::2]]
    return "".join(parts)


class _Page(HTMLParser):
    """The ids of a page, what it links to, and what a browser loads with it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids, self.links, self.loads = set[str](), list[str](), list[str]()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Called by the parser."""
        given = {key: value or "" for key, value in attrs}
        self.ids.update(given[key] for key in ("id", "name") if key in given)
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") not in ("canonical", "next", "prev"):
            self.loads.append(given.get("href", ""))
        elif "src" in given:
            self.loads.append(given["src"])


def problems(site: Path) -> list[str]:
    """What is wrong with the links of a built site: files, anchors, and anything of other hosts."""
    pages = {path: _Page(path) for path in site.rglob("*.html")}
    found = []
    for path, page in pages.items():
        if path.name == "404.html":  # its links begin at the root of a server
            continue
        name = path.relative_to(site)
        for link in page.loads:
            if urlsplit(link).netloc:
                found.append(f"{name}: loads from another host: {link}")
        for link in (*page.loads, *page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (
                Path(os.path.normpath(path.parent / unquote(parts.path))) if parts.path else path
            )
            target = target / "index.html" if target.is_dir() else target
            anchor = unquote(parts.fragment)
            if not target.is_file() or not target.is_relative_to(site):
                found.append(f"{name}: no such file: {link}")
            elif anchor and target in pages and anchor not in pages[target].ids:
                found.append(f"{name}: no such anchor: {link}")
    api = pages[site / "reference" / "api.html"].ids
    for named in re.findall(r"^::: (\S+)", (DOCS / "reference" / "api.md").read_text(), re.M):
        if named not in api:
            found.append(f"reference/api.html: no docstring of {named}")
    return sorted(set(found))


def main() -> None:
    """Build both sites and check them."""
    stage()
    binaries = Path(sys.executable).parent
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "NO_COLOR": "1"}
    for command, site in (
        (["zensical", "build", "--strict", "--clean"], STAGE / "site"),
        (["mkdocs", "build", "--strict", "--quiet", "--site-dir", "material"], STAGE / "material"),
    ):
        command[0] = str(binaries / command[0])
        done = subprocess.run(command, cwd=STAGE, env=quiet, capture_output=True, text=True)
        print(re.sub(r"\x1b\[[\d;]*m", "", done.stdout + done.stderr))
        if done.returncode:
            raise SystemExit(f"{command[0]}: exit code {done.returncode}")
        if found := problems(site):
            raise SystemExit("\n".join([*found, f"{site}: {len(found)} problems"]))
        print(f"{site}: {len(list(site.rglob('*.html')))} pages, every link holds")


if __name__ == "__main__":
    main()
