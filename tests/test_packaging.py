"""The wheel and the sdist hold everything, and what is installed from the wheel works by itself."""

from __future__ import annotations

import shlex
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tpaw.config.schema import RunConfig

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with both, built from the working tree."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    return folder


def package_files():
    """Every file of the package in the working tree, but for what Python makes."""
    found = (ROOT / "src" / "tpaw").rglob("*")
    files = {p.relative_to(ROOT / "src").as_posix() for p in found if p.is_file()}
    return {name for name in files if "__pycache__" not in name}


def test_the_wheel_holds_every_file_of_the_package(built):
    [wheel] = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert package_files() <= names
    kept = {name for name in names if ".dist-info/" not in name}
    assert kept == package_files()
    for name in ("starter/model/model.safetensors", "report/html/templates/report.js"):
        assert f"tpaw/{name}" in names


def test_the_sdist_holds_package_tests_and_documentation(built):
    [sdist] = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"src/{name}" for name in package_files()} <= names
    assert {"README.md", "LICENSE", "pyproject.toml", "docs/README.md", "Makefile"} <= names
    assert "tests/test_packaging.py" in names
    assert not [name for name in names if name.startswith((".venv", "runs", "studies"))]


def test_what_is_installed_from_the_wheel_runs_the_starter(built, tmp_path):
    [wheel] = built.glob("*.whl")
    site = tmp_path / "site"
    install = ["pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([sys.executable, "-m", *install, str(wheel)], check=True, timeout=120)
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r}); import tpaw;"
        f"assert tpaw.__file__.startswith({str(site)!r}), tpaw.__file__;"
        "sys.argv = ['tpaw', *sys.argv[1:]]; from tpaw.cli.main import main; main()"
    )
    few = ["--set", "iterations=1", "--set", "train.epochs=1", "--set", "data.limit=128"]
    few += ["--set", "train.learning_rate=3e-4", "--set", "evaluate.data=null"]
    for arguments, part in (
        (["config", "list"], "starter"),
        (["run", "starter", "-o", "run", *few], "Report: run/report.html"),
    ):
        found = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert found.returncode == 0, found.stderr
        assert part in found.stdout
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000


def test_the_commands_of_the_workflows_are_accepted():
    """No workflow can run here; what it gives to tpaw can be checked."""
    lines = [
        line
        for path in (ROOT / ".github" / "workflows").glob("*.yml")
        for line in path.read_text(encoding="utf-8").splitlines()
        if "tpaw run" in line
    ]
    assert lines
    for line in lines:
        recipe, *rest = shlex.split(line.partition("tpaw run ")[2])
        overrides = [value for _, value in zip(rest[::2], rest[1::2], strict=True)]
        assert set(rest[::2]) == {"--set"}
        assert RunConfig.load(recipe, overrides=overrides).iterations == 1
