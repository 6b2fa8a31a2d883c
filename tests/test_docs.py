"""The documents: links and anchors resolve; the tests, commands and settings they name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

from tpaw.cli.main import app
from tpaw.config.schema import RunConfig

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    page
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md"))
    if page.name != "report.md"  # test_results has those
)
# They name settings and commands of their time.
HISTORY = {"CHANGELOG.md", "log.md"}
NOT_SETTINGS = {"train.jsonl", "model.forward"}
NOT_WRITTEN_YET: set[Path] = set()


@pytest.fixture(params=PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def page(request):
    return request.param


def prose(page):
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)


def anchors(page):
    """As GitHub makes them from headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", h.strip().lower()).replace(" ", "-") for h in headings}


def test_links_and_anchors_resolve(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if re.match(r"https?:", link) or target in NOT_WRITTEN_YET:
            continue
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_named_files_and_tests_exist(page):
    defined = {
        name
        for path in ROOT.glob("tests/**/*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), flags=re.M)
    }
    for name in re.findall(r"`(test_\w+)`", prose(page)):
        assert name in defined, name
    for name in re.findall(r"`((?:tests|checks|src)/[\w./-]+\.\w+)`", prose(page)):
        assert (ROOT / name).exists(), name


def test_named_commands_exist(page):
    commands = typer.main.get_command(app).commands
    for name in re.findall(r"(?:^|`)tpaw ([a-z]+)\b", page.read_text(encoding="utf-8"), re.M):
        assert name in commands, name


def test_named_settings_exist(page):
    if page.name in HISTORY:
        return
    schema = RunConfig.model_json_schema(by_alias=True)
    for name in re.findall(r"`([a-z_]+\.[a-z_.]+)(?:: [^`]*)?`", prose(page)):
        section, *keys = name.split(".")
        if name in NOT_SETTINGS or section not in schema["properties"]:
            continue
        assert exists(schema, schema["properties"][section], keys), name


def exists(schema, node, keys):
    """Whether a setting of that path is somewhere below a node of the JSON schema."""
    for option in (node, *node.get("anyOf", ())):
        if "$ref" in option:
            option = schema["$defs"][option["$ref"].rpartition("/")[2]]
        if not keys or option.get("additionalProperties") is True:
            return True
        found = option.get("properties", {}).get(keys[0])
        if found is not None and exists(schema, found, keys[1:]):
            return True
    return False
