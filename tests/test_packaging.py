"""The wheel and the sdist hold everything, and what is installed from the wheel works by itself."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
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


def test_the_image_has_what_the_wheel_is_built_from_and_every_extra(built, tmp_path):
    """Docker is not needed: the lines of the Dockerfile are carried out in a folder."""
    text = (ROOT / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (.*)$", text, re.M):
        *sources, target = line.split()
        folder = tmp_path / target.strip("/")
        for source in sources:
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, folder)
            else:
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / source, folder)
    [constraints, place, extras] = re.findall(r"--constraint (\S+) '(\S+)\[(.*)\]'", text)[0]
    assert (tmp_path / constraints.strip("/")).is_file()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {*extras.split(","), "dev"} == {*project["optional-dependencies"]}
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "d")]
    source = tmp_path / place.strip("/")
    subprocess.run(command, cwd=source, check=True, capture_output=True, timeout=120)
    [wheel], [whole] = (tmp_path / "d").glob("*.whl"), built.glob("*.whl")
    assert zipfile.ZipFile(wheel).namelist() == zipfile.ZipFile(whole).namelist()


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
