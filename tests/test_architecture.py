"""The folder graph has no circle, the public surface is what it says, and tests stand alone."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import pytest

import tpaw

PACKAGE = Path(tpaw.__file__).parent
TESTS = Path(__file__).parent


def imported(tree, modules):
    """Modules of ours that a file imports; lazy imports and those for types alone included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tpaw":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in modules else node.module for name in names)
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == "tpaw")


def module_graph(package=PACKAGE):
    """module -> modules that it imports."""
    files = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).with_suffix("").parts
        name = ".".join(("tpaw", *(p for p in parts if p != "__init__")))
        files[name] = path
    return {
        name: set(imported(ast.parse(path.read_text()), files)) - {name}
        for name, path in files.items()
    }


def folder_of(module):
    """Two levels: `evaluation.judge` is a folder of its own."""
    parts = module.split(".")[1:]
    folders = parts if (PACKAGE.joinpath(*parts) / "__init__.py").is_file() else parts[:-1]
    return ".".join(folders) or (parts[0] if parts else "")


def folder_graph(modules):
    folders = defaultdict(set)
    for module, targets in modules.items():
        if module != "tpaw":  # the public surface imports from everywhere
            folders[folder_of(module)] |= {
                folder_of(target) for target in targets if target != "tpaw"
            }
    return {folder: targets - {folder} for folder, targets in folders.items()}


def circle_in(graph):
    """Some circle as a list of names, or None."""
    done, path = set(), []

    def visit(node):
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return None
        path.append(node)
        found = next(filter(None, map(visit, sorted(graph.get(node, ())))), None)
        path.pop()
        done.add(node)
        return found

    return next(filter(None, map(visit, sorted(graph))), None)


def test_there_is_no_circle_between_folders():
    graph = folder_graph(module_graph())
    assert len(graph) > 15
    assert sum(map(len, graph.values())) > 60
    assert circle_in(graph) is None


def test_there_is_no_circle_between_modules():
    graph = {m: targets - {"tpaw"} for m, targets in module_graph().items() if m != "tpaw"}
    assert len(graph) > 60
    assert circle_in(graph) is None


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("from tpaw.data.examples import Example", "tpaw.data.examples"),
        ("import tpaw.data.examples", "tpaw.data.examples"),
        ("from tpaw.data import examples", "tpaw.data.examples"),
        ("def f():\n    from tpaw.data.examples import Example", "tpaw.data.examples"),
        (
            "if TYPE_CHECKING:\n    from tpaw.data.examples import Example",
            "tpaw.data.examples",
        ),
    ],
)
def test_every_kind_of_import_is_seen(text, target):
    assert list(imported(ast.parse(text), {"tpaw.data.examples"})) == [target]


def test_a_circle_is_found():
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


@pytest.mark.parametrize("folder", ["objectives", "statistics"])
def test_the_mathematics_depends_on_nothing_else_of_ours(folder):
    for name, targets in module_graph().items():
        if name.startswith(f"tpaw.{folder}."):
            assert all(target.startswith(f"tpaw.{folder}") for target in targets), name


def test_the_public_surface():
    assert tpaw.__all__ == [
        "Objective",
        "ObjectiveNeeds",
        "ObjectiveOutput",
        "PairLogps",
        "Player",
        "RunConfig",
        "Team",
        "TeamLoss",
        "TeamObjective",
        "TeamTrainer",
        "TpawError",
        "self_play",
        "team_loss",
    ]
    for name in tpaw.__all__:
        assert getattr(tpaw, name).__module__.startswith("tpaw.")


def borrowed(text, modules):
    """Modules out of `modules` that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [name for alias in node.names for name in alias.name.split(".")]
        else:
            continue
        yield from (name for name in names if name in modules)


def test_no_file_of_the_tests_imports_a_test_module_or_a_conftest():
    files = sorted(TESTS.rglob("*.py"))
    modules = {path.stem for path in files if path.stem.startswith("test_")} | {"conftest"}
    assert len(modules) > 30
    found = {
        str(path.relative_to(TESTS)): list(borrowed(path.read_text(), modules)) for path in files
    }
    assert not {path: names for path, names in found.items() if names}


@pytest.mark.parametrize(
    "text",
    [
        "import conftest",
        "from conftest import sums",
        "from .conftest import sums",
        "from tests import conftest",
        "def f():\n    from tests.pipeline.conftest import sums",
    ],
)
def test_a_borrowed_module_is_seen(text):
    assert list(borrowed(text, {"conftest"})) == ["conftest"]
