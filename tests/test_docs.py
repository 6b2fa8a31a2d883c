"""The documents: links and anchors resolve, what they name exists, and a site has all of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer
import yaml

import tpaw
from tpaw.cli.main import app
from tpaw.config.files import to_yaml
from tpaw.config.schema import RunConfig
from website import build, reference

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


def test_lists_are_lists_in_a_site_too(page):
    """Python-Markdown wants a blank line before a list, and four spaces before a list in a list."""
    before = ""
    for line in prose(page).split("\n"):
        if item := re.match(r"( *)(?:[-*]|\d+\.) ", line):
            assert len(item[1]) % 4 == 0, line
            in_list = re.match(r" *(?:[-*]|\d+\.) |  ", before)
            assert not before or in_list or item[1], line
        before = line


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


@pytest.mark.parametrize("path", [*reference.pages()], ids=lambda path: path.stem)
def test_the_generated_pages_say_what_the_code_says(path):
    assert path.read_text(encoding="utf-8") == reference.pages()[path], "run `make reference`"


def test_the_page_of_settings_has_every_setting():
    content = (reference.FOLDER / "settings.md").read_text(encoding="utf-8")
    shown = yaml.safe_load(to_yaml(RunConfig.load("starter", "lora"), comments=False))
    for name in leaves(shown):
        if not name.startswith(("team.opponents.", "team.main_players.", "objective.name")):
            assert f"# `{name}`\n" in content, name


def leaves(tree, path=""):
    for key, value in tree.items():
        yield from (
            leaves(value, f"{path}{key}.")
            if isinstance(value, dict) and value
            else [f"{path}{key}"]
        )


def test_the_page_of_commands_has_every_option():
    content = (reference.FOLDER / "commands.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^##+ tpaw (.+?)\n(.*?)(?=^##|\Z)", content, flags=re.M | re.S))
    commands = dict(typer.main.get_command(app).commands)
    commands |= {f"config {name}": it for name, it in commands["config"].commands.items()}
    assert sections.keys() == {name for name, it in commands.items() if not it.hidden}
    for name, section in sections.items():
        for parameter in commands[name].params:
            for option in parameter.opts if parameter.param_type_name == "option" else ():
                assert option == "--help" or f"`{option}`" in section, f"{name} {option}"


def test_the_page_of_the_api_has_every_public_name():
    content = (reference.FOLDER / "api.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^::: (\S+)$", content, flags=re.M))
    assert {f"{tpaw._HOME[name]}.{name}" for name in tpaw.__all__} <= named


def test_the_site_has_every_page():
    def pages(node):
        if isinstance(node, str):
            return [node]
        return [
            p for item in node for p in pages(item.values() if isinstance(item, dict) else item)
        ]

    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = pages(yaml.safe_load(text[text.index("\nnav:\n") :])["nav"])
    assert sorted(listed) == sorted(
        str(p.relative_to(ROOT / "docs")) for p in ROOT.glob("docs/**/*.md")
    )


@pytest.mark.parametrize("picture", [*ROOT.glob("docs/images/*.svg")], ids=lambda path: path.stem)
def test_pictures_load_nothing(picture):
    content = picture.read_text(encoding="utf-8")
    assert not re.search(r"@font-face|url\(['\"]?http|@import|href", content)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A repository with a page that links to a file, a folder and a page outside of docs/."""
    for name, value in (("ROOT", ""), ("DOCS", "docs"), ("STAGE", "build/website")):
        monkeypatch.setattr(build, name, tmp_path / value)
    files = {
        "mkdocs.yml": "",
        "src/code.py": "x = [1](2)\n",
        "worlds/a.yaml": "a: 1\n",
        "OTHER.md": "See [page](docs/how-to/page.md#part), [code](src/code.py).\n",
        "docs/how-to/page.md": "[c](../../src/code.py) [w](../../worlds) [o](../../OTHER.md#top) "
        "[s](#part) [h](https://x.org/a) [n](next.md)\n```\n[c](../../src/code.py)\n```\n",
        "docs/how-to/next.md": "",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    return tmp_path


def test_files_outside_of_the_documents_are_pages_of_the_site(small):
    build.stage()
    docs = small / "build" / "website" / "docs"
    assert (docs / "how-to" / "page.md").read_text() == (
        "[c](../source/src/code.py.md) [w](../source/worlds/index.md) [o](../source/OTHER.md#top) "
        "[s](#part) [h](https://x.org/a) [n](next.md)\n```\n[c](../../src/code.py)\n```\n"
    )
    assert (docs / "source" / "OTHER.md").read_text() == (
        "See [page](../how-to/page.md#part), [code](src/code.py.md).\n"
    )
    assert "x = [1](2)\n" in (docs / "source" / "src" / "code.py.md").read_text()
    assert "[`a.yaml`](a.yaml.md)" in (docs / "source" / "worlds" / "index.md").read_text()
    assert (docs / "source" / "worlds" / "a.yaml.md").is_file()


def test_a_broken_link_out_of_the_documents_ends_the_build(small):
    (small / "src" / "code.py").unlink()
    with pytest.raises(SystemExit, match=r"src/code\.py"):
        build.stage()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('<a href="a.html#x">', None),
        ('<a href="https://x.org/a">', None),
        ('<a href="b.html">', "a.html: no such file: b.html"),
        ('<a href="#y">', "a.html: no such anchor: #y"),
        ('<a href="reference/api.html#y">', "a.html: no such anchor: reference/api.html#y"),
        ('<a href="../outside.html">', "a.html: no such file: ../outside.html"),
        ('<img src="b.svg">', "a.html: no such file: b.svg"),
        (
            '<link rel="stylesheet" href="https://x.org/a.css">',
            "a.html: loads from another host: https://x.org/a.css",
        ),
        (
            '<script src="//x.org/a.js">',
            "a.html: loads from another host: //x.org/a.js",
        ),
    ],
)
def test_the_check_of_a_site_finds_what_is_broken(content, problem, small):
    (small / "docs" / "reference").mkdir()
    (small / "docs" / "reference" / "api.md").write_text("::: a.b\n\n::: a.c\n")
    (small / "site" / "reference").mkdir(parents=True)
    (small / "site" / "reference" / "api.html").write_text('<h2 id="a.b">')
    (small / "outside.html").write_text("")
    (small / "site" / "a.html").write_text(f'<p id="x">{content}')
    missing = "reference/api.html: no docstring of a.c"
    assert build.problems(small / "site") == sorted(filter(None, (problem, missing)))
