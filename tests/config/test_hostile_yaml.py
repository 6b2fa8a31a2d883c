"""Texts that make PyYAML hang, grow or raise something else are refused with file and line."""

from __future__ import annotations

import itertools

import pytest
from messages import by_first, refused

from tpaw.config.schema import RunConfig
from tpaw.config.yaml_reader import MAX_CHARACTERS, MAX_VALUES, parse_yaml
from tpaw.errors import brief

LETTERS = "abcdefghij"
# 9^9 values: "billion laughs".
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{here}: &{here} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, here in itertools.pairwise(LETTERS)
)


def load(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return RunConfig.load(str(path))


@by_first(
    ("name", "text", "parts"),
    [
        ("bomb", BOMB + "extends: *j", ["line 5"]),
        ("bomb in a setting", BOMB + "train: {epochs: *i}", ["line 5"]),
        ("many values", "- 1\n" * (MAX_VALUES + 1), ["line 10001", MAX_VALUES]),
        ("long", "x" * (MAX_CHARACTERS + 1), [MAX_CHARACTERS]),
        ("deep list", "extends: " + "[" * 20_000, ["line 1"]),
        ("deep mapping", "\n".join(" " * i + "a:" for i in range(200)), ["line 50"]),
        ("inside of itself", "train: &a [*a]", ["line 1"]),
        ("not a whole number", "seed: !!int abc", ["'abc'", "int", "line 1"]),
        ("no number", "\nseed: !!float x", ["'x'", "float", "line 2"]),
        ("no date", "seed: !!timestamp x", ["'x'", "timestamp"]),
        ("no truth", "seed: !!bool x", ["'x'", "bool"]),
        ("empty number", "seed: !!int ''", ["''", "int"]),
        ("digits", "seed: " + "9" * 5000, ["100"]),
        ("list as key", "{[1, 2]: 3}", ["key", "line 1"]),
        ("mapping as key", "train: {{a: 1}: 3}", ["key", "line 1"]),
        ("tag", "seed: !!python/object/apply:os.getcwd []", ["line 1"]),
        ("list as mapping", "train: !!map [1]", ["line 1"]),
    ],
)
def test_a_file(tmp_path, name, text, parts):
    with refused("run.yaml", *parts):
        load(tmp_path, text)


@by_first(
    ("override", "parts"),
    [
        ("seed=!!int x", ["'x'", "int"]),
        ("seed=2001-99-99", ["seed", "2001-99-99"]),
        ("data.path={[1]: 2}", ["data.path", "key"]),
        ("train={a: &a [*a]}", ["train"]),
    ],
)
def test_an_override(override, parts):
    with refused(*parts):
        RunConfig.load("starter", overrides=[override])


def test_an_override_of_great_depth():
    with refused("--set", "a.a"):
        RunConfig.load("starter", overrides=["a." * 2000 + "a=1"] * 2)


def test_an_alias_may_repeat_a_value(tmp_path):
    config = load(tmp_path, "extends: starter\nscore: &s {shard_size: 7}\ngenerate: *s\n")
    assert config.generate.shard_size == config.score.shard_size == 7


def test_a_date_is_text():
    config = RunConfig.load("starter", overrides=["model.revision=2024-05-01"])
    assert config.model.revision == "2024-05-01"


def test_files_that_extend_the_next_twice(tmp_path):
    for i in range(24):
        (tmp_path / f"{i}.yaml").write_text(f"extends: [{i + 1}.yaml, {i + 1}.yaml]\n")
    (tmp_path / "24.yaml").write_text("extends: starter\n")
    with refused(tmp_path / "0.yaml", "extends", 50):
        RunConfig.load(str(tmp_path / "0.yaml"))
    assert RunConfig.load(str(tmp_path / "21.yaml")) == RunConfig.load("starter")


def test_a_long_chain_of_files(tmp_path):
    for i in range(1200):
        (tmp_path / f"{i}.yaml").write_text(f"extends: {i + 1}.yaml\n")
    (tmp_path / "1200.yaml").write_text("extends: starter\n")
    with refused(tmp_path / "0.yaml", "extends", 50):
        RunConfig.load(str(tmp_path / "0.yaml"))


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "/dev/null"])
def test_a_name_that_no_configuration_has(name):
    with refused("no such file or recipe"):
        RunConfig.load(name)


def test_many_unknown_keys(tmp_path):
    with refused("x0: unknown", 3) as caught:
        load(tmp_path, "extends: starter\n" + "".join(f"x{i}: 1\n" for i in range(23)))
    assert len(str(caught.value).splitlines()) == 21


def test_a_large_value_is_cut():
    tree = parse_yaml("a: &a [x, x, x, x, x, x, x, x, x]\nb: [*a, *a, *a]")
    assert brief(tree) == repr(tree)
    assert len(brief([tree] * 10**6)) <= 1000
    assert brief("x" * 10**6).count("x") < 200
    nested = []
    for _ in range(10**5):
        nested = [nested]
    assert brief(nested) == "[[[[...]]]]"
