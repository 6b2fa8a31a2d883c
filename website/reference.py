"""Write the two pages of docs/reference that come from the code: settings.md and commands.md.

`make reference` runs it. tests/test_docs.py compares the pages with the code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer

from tpaw.cli.main import app
from tpaw.config.schema import RunConfig
from tpaw.study.config import StudyConfig

# Its wording differs between typer's versions.
OF_TYPER = ("install_completion", "show_completion", "help")
FOLDER = Path(__file__).parents[1] / "docs" / "reference"
NAMES = {
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "boolean": "true or false",
}
Schema = Mapping[str, Any]


def settings_page() -> str:
    """Every setting of a run and of a study: its key, type, default and description."""
    schema = RunConfig.model_json_schema(by_alias=True)
    properties, definitions = schema["properties"], schema["$defs"]
    single = {
        key: node
        for key, node in properties.items()
        if key != "objective" and _fields(node, definitions) is None
    }
    lines = [
        "# Settings",
        "Written from the code by `make reference`. Every setting of a run is here, with its type, "
        "its default and its meaning. [Configuration](config.md) says how to write a file and how "
        "to combine several. `tpaw config show mine.yaml` prints the settings of your run in this "
        "order.",
        "A setting that *may change* may have another value when a run continues "
        "([what may change](config.md#what-may-change-when-a-run-continues)).",
        "## The run",
        *_settings(single, "", definitions, schema["required"]),
    ]
    for key, node in properties.items():
        if key not in single and key != "objective":
            lines += [f"## {key}", *_section(node, key, definitions)]
        if key == "team":
            lines += [
                "### A rule of the team",
                "`team.opponents` and `team.main_players` are one of these each, such as "
                "`{last: 3}` or `{sampled: {count: 3, seed: 0}}`. A rule selects the newest "
                "checkpoint, and lists the newest first.",
            ]
            for kind in _resolved(node, definitions)["properties"]["opponents"]["anyOf"]:
                fields = _resolved(kind, definitions)["properties"]
                lines += _settings(fields, "", definitions, (), level=4)
    lines += [
        "## objective",
        "`objective.name` is the method ([methods](../concepts/methods.md)). It decides which "
        "other settings the section has.",
    ]
    kinds = [kind for kind in properties["objective"]["anyOf"] if "name" in kind["properties"]]
    kinds = [_resolved(kind, definitions) for kind in kinds]
    for kind in sorted(kinds, key=lambda kind: _name(kind) != "tpaw"):
        if (name := _name(kind)) is not None:
            fields = {k: v for k, v in kind["properties"].items() if k != "name"}
            about = kind if name == "tpaw" else kind["properties"]["name"]
            lines += [f"### objective: {name}", _escaped(about["description"])]
            lines += _settings(fields, "objective.", definitions, (), level=4, of=name)
    study = StudyConfig.model_json_schema(by_alias=True)
    lines += [
        "## A study",
        "These are the settings of the file that `tpaw study` reads ([study](../how-to/study.md)).",
        *_settings(study["properties"], "", study.get("$defs", {}), study["required"]),
    ]
    return "\n\n".join(lines) + "\n"


def commands_page() -> str:
    """Every command with its arguments and options."""
    top: Any = typer.main.get_command(app)
    context = top.make_context("tpaw", [], resilient_parsing=True)
    lines = [
        "# Commands",
        "Written from the code by `make reference`. `tpaw COMMAND --help` prints the same, and "
        "`tpaw --install-completion` installs completion for your shell. The exit codes are in "
        "[run directory](run-directory.md#exit-codes).",
        *_parameters(top, context),
    ]
    for name, command in sorted(top.commands.items()):
        if not command.hidden:
            lines += _command(command, name, context)
    return "\n\n".join(lines) + "\n"


def _section(node: Schema, key: str, definitions: Schema) -> Iterator[str]:
    section = _resolved(node, definitions)
    yield _escaped(section["description"])
    yield from _settings(section["properties"], f"{key}.", definitions, section.get("required", ()))


def _settings(
    properties: Schema,
    path: str,
    definitions: Schema,
    required: Any,
    level: int = 3,
    of: str = "tpaw",
) -> Iterator[str]:
    for key, node in properties.items():
        fields = _fields(node, definitions)
        about = [_type(node, definitions)]
        if key in required:
            about.append("required")
        elif "default" in node and (node["default"] is None or not fields):
            about.append(f"default `{_value(node['default'])}`")
        if node.get("changeable"):
            about.append("may change")
        suffix = "" if of == "tpaw" else f" of {of}"
        yield f"{'#' * level} `{path}{key}`{suffix}"
        yield f"*{'; '.join(about)}*"
        described = node.get("description") or (fields or {}).get("description", "")
        yield _escaped(described)
        if fields is not None:
            yield from _settings(
                fields["properties"],
                f"{path}{key}.",
                definitions,
                fields.get("required", ()),
                level=4,
            )


def _fields(node: Schema, definitions: Schema) -> Schema | None:
    """The object that a section holds; None if the node is a value or one of several objects."""
    kinds = [kind for kind in node.get("anyOf", [node]) if kind.get("type") != "null"]
    kind = _resolved(kinds[0], definitions)
    return kind if len(kinds) == 1 and "properties" in kind else None


def _type(node: Schema, definitions: Schema) -> str:
    kinds = [kind for kind in node.get("anyOf", [node]) if kind.get("type") != "null"]
    or_null = " or null" if len(kinds) < len(node.get("anyOf", kinds)) else ""
    kind = kinds[0]
    if len(kinds) > 1 and "$ref" not in kind and "properties" not in kind:
        if kinds[1].get("items") == kind:
            return f"{_type(kind, definitions)}; or a list with one for each iteration{or_null}"
        return " or ".join(_type(each, definitions) for each in kinds) + or_null
    if len(kinds) > 1:
        return "a [rule](#a-rule-of-the-team)"
    if "$ref" in kind or "properties" in kind:
        return f"section{or_null}"
    if "enum" in kind or "const" in kind:
        *others, last = (f"`{_value(value)}`" for value in kind.get("enum", [kind.get("const")]))
        return (f"{', '.join(others)} or {last}" if others else last) + or_null
    if kind.get("type") == "array":
        item = _type(kind["items"], definitions) if kind.get("items") else "anything"
        return f"list; each item: {item}{or_null}"
    if kind.get("type") == "object":
        return f"mapping{or_null}"
    return NAMES.get(kind.get("type", ""), "anything") + _bounds(kind) + or_null


def _value(value: Any) -> str:
    """A value as YAML takes it; a text without quotes."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _bounds(node: Schema) -> str:
    bounds = [
        ("minimum", "≥"),
        ("exclusiveMinimum", ">"),
        ("maximum", "≤"),
        ("exclusiveMaximum", "<"),
        ("multipleOf", "a multiple of"),
    ]
    found = [f"{sign} {node[key]:,}".removesuffix(".0") for key, sign in bounds if key in node]
    return f" {', '.join(found)}" if found else ""


def _resolved(node: Schema, definitions: Schema) -> Schema:
    return definitions[node["$ref"].rpartition("/")[2]] if "$ref" in node else node


def _name(kind: Schema) -> str | None:
    """The method that an objective's settings belong to; None for a module of somebody else."""
    name: str | None = kind["properties"]["name"].get("const")
    return name


def _command(command: Any, name: str, parent: Any) -> Iterator[str]:
    context = typer.Context(command, parent=parent, info_name=name)
    inner = getattr(command, "commands", {})
    yield f"## {context.command_path}" if parent.parent is None else f"### {context.command_path}"
    if not inner:
        usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
        yield f"```\n{usage}\n```"
    yield _escaped(command.help or "")
    yield from _parameters(command, context)
    for key, value in inner.items():
        yield from _command(value, key, context)


def _parameters(command: Any, context: Any) -> Iterator[str]:
    rows = []
    for parameter in command.params:
        if parameter.name in OF_TYPER or getattr(parameter, "hidden", False):
            continue
        is_option = parameter.param_type_name == "option"
        names = parameter.opts if is_option else [parameter.metavar or parameter.name.upper()]
        text = _escaped(parameter.help or "").replace("|", r"\|")
        record = (parameter.get_help_record(context) or ("", ""))[0]
        if choices := re.search(r"[<\[]([^<>\[\]]*\|[^<>\[\]]*)[>\]]", record):
            text += " One of " + ", ".join(f"`{name}`" for name in choices[1].split("|")) + "."
        if is_option and parameter.required:
            text += " Required."
        elif parameter.default not in (None, False, [], ()) and "Default:" not in text:
            text += f" Default: `{parameter.default}`."
        rows.append(f"| {', '.join(f'`{name}`' for name in names)} | {text} |".replace("\n", " "))
    if rows:
        yield "\n".join(["| argument or option | what it does |", "|---|---|", *rows])


def _escaped(text: str) -> str:
    """A description as Markdown: code stays code, and everything else is plain text."""
    text = re.sub(r"(?<!\n)\n(?!\n)", " ", text)
    parts = re.split(r"(`[^`]*`)", text)
    parts[::2] = [
        re.sub(r"([\\*]|(?<!\w)_|_(?!\w))", r"\\\1", part.replace("<", "&lt;"))
        for part in parts[::2]
    ]
    return re.sub(r"\bdocs/([\w/-]+)\.md", lambda match: _link(match[1]), "".join(parts))


def _link(page: str) -> str:
    return f"[{page.rpartition('/')[2]}](../{page}.md)"


def pages() -> dict[Path, str]:
    """The generated pages and their content."""
    return {FOLDER / "settings.md": settings_page(), FOLDER / "commands.md": commands_page()}


if __name__ == "__main__":
    for path, content in pages().items():
        path.write_text(content, encoding="utf-8")
        print(f"Written: {path}")
