"""The section `objective` is that of the method it names, and the loop must fit the method."""

from __future__ import annotations

import sys

import pytest
from messages import by_first, refused

from tpaw.config.changes import differences
from tpaw.config.files import load_tree, recipe_names, to_yaml
from tpaw.config.methods import method_names
from tpaw.config.schema import ObjectiveConfig, RunConfig
from tpaw.objectives.base import NamedObjective


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """Writes modules that can be imported for the time of a test, by their dotted names."""
    folder = tmp_path / "outside" / "not_ours"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(folder.parent))

    def write(name, text):
        (folder / f"{name}.py").write_text(text)

    yield write
    for name in [name for name in sys.modules if name.partition(".")[0] == "not_ours"]:
        del sys.modules[name]


def test_each_method_has_settings_with_its_name_and_a_recipe():
    assert method_names() == [
        *("alpha_spin", "gsil", "irft", "self_training", "space", "spif_ls"),
        *("spin_ipo", "spin_norm", "tpaw", "tspin"),
    ]
    assert set(method_names()) <= set(recipe_names())
    for name in method_names():
        objective = RunConfig.load("starter", name).objective
        assert isinstance(objective, NamedObjective)
        assert objective.name == name


@pytest.mark.parametrize("base", ["starter", "ultrachat-qwen2.5-1.5b"])
@pytest.mark.parametrize("name", method_names())
def test_a_method_goes_on_top_of_a_recipe_and_back_and_is_shown_whole(tmp_path, base, name):
    config = RunConfig.load(base, name)
    path = tmp_path / "shown.yaml"
    for comments in (True, False):
        path.write_text(to_yaml(config, comments=comments))
        assert RunConfig.load(str(path)) == config
        assert differences(config, RunConfig.load(str(path))) == []
    for name_of_field, field in type(config.objective).model_fields.items():
        key = field.alias or name_of_field
        assert f"\n  {key}: " in path.read_text()
    # Undone by the recipe tpaw, but for the decoding and what TPAW's recipe leaves open.
    undone, plain = RunConfig.load(base, name, "tpaw"), RunConfig.load(base, "tpaw")
    assert isinstance(undone.objective, ObjectiveConfig)
    assert (undone.team, undone.data) == (plain.team, plain.data)


def test_another_method_drops_the_settings_of_the_one_before():
    recipes = ["ultrachat-qwen2.5-1.5b", "space"]
    assert load_tree(recipes)["objective"] == {"name": "space", "mu": 1.0}
    more = load_tree([*recipes, {"objective": {"mu": 2.0}}])["objective"]
    assert more == {"name": "space", "mu": 2.0}
    assert load_tree([*recipes, "tpaw"], ["objective.eta=3"])["objective"] == {
        **{"name": "tpaw", "target_weight": "adaptive", "player_weight": "softmax", "eta": 3},
    }
    # A setting of tpaw before the name is given stays, as tpaw is the default.
    both = load_tree([{"objective": {"eta": 2.0}}, {"objective": {"name": "tpaw"}}])
    assert both["objective"] == {"name": "tpaw", "eta": 2.0}


def test_another_rule_drops_the_one_before():
    tree = load_tree(["spin"], ["team.opponents={spaced: 3}", "team.main_players.last=2"])
    assert tree["team"] == {"opponents": {"spaced": 3}, "main_players": {"last": 2}}
    drawn = "team.opponents.sampled"
    tree = load_tree(["spin"], [f"{drawn}={{count: 3, seed: 1}}", f"{drawn}.seed=2"])
    assert tree["team"]["opponents"] == {"sampled": {"count": 3, "seed": 2}}


ONE = "team.main_players={last: 1}"


@by_first(
    ("overrides", "parts"),
    [
        (["objective.name=spcae"], ["objective.name", "'spcae'", "space"]),
        (["objective.name=base"], ["objective.name", "'base'"]),
        (["objective.name=3"], ["objective.name", 3, "tpaw", "gsil"]),
        (["objective.name=no.such_module"], ["objective.name", "'no.such_module'"]),
        (["objective.name=a..b"], ["objective.name", "'a..b'"]),
        (["objective.name=json.tool"], ["objective.name", "'json.tool'", "Settings"]),
        (["objective={name: space, mu: -1}", ONE], ["objective.mu", -1, 0]),
        (["objective={name: space, mu: one}", ONE], ["objective.mu", "'one'"]),
        (["objective={name: space, nu: 1}", ONE], ["objective.nu", "objective.mu"]),
        (["objective={name: gsil, loss: l2}", ONE], ["objective.loss", "'l2'", "brier"]),
        (["objective={name: irft, lambda: [1, 2, 3, 4]}", ONE], ["objective.lambda"]),
        (["objective={name: space, eta: 2}", ONE], ["objective.eta", "mu"]),
        (["objective=space"], ["objective", "'space'"]),
        (["objective.name=space"], ["team.main_players", 3, "objective.name", "{last: 1}"]),
        (
            ["objective.name=gsil", "team.main_players={first_and_last: true}"],
            ["team.main_players", "objective.name", "{last: 1}"],
        ),
        (["objective.name=tspin", ONE], ["team.main_players", 1, "objective.name", "tspin"]),
        (["objective.name=space", "method=sft"], ["objective.name", "'space'", "sft"]),
        (["data.chunks=2"], ["data.chunks", 2, "team.opponents", "{last: 1}"]),
        (["data.chunks=0"], ["data.chunks", 0, 1]),
        (["data.chunks=2", "method=dpo"], ["data.chunks", 2, "dpo"]),
        (["evaluate.data.chunks=2"], ["evaluate.data.chunks", 2]),
        (
            ["objective.name=tspin", "team.opponents={last: 1}", "data.chunks=2"],
            ["data.chunks", 2, "tspin"],
        ),
        (["generate.samples=0"], ["generate.samples", 0, 1]),
        (
            ["generate={samples: 2, temperature: 0}"],
            ["generate.samples", 2, "generate.temperature"],
        ),
        (["generate.temperature=-0.5"], ["generate.temperature", -0.5, 0]),
        (["evaluate.temperatures=[0.5, 0]"], ["evaluate.temperatures", 0, "above 0"]),
        (["evaluate.temperatures=[0.5, 0.5]"], ["evaluate.temperatures", 0.5, "once"]),
        (["evaluate.temperatures=[1e-9]"], ["evaluate.temperatures", 1e-09, 1e-05]),
        (["evaluate.temperatures=[-1]"], ["evaluate.temperatures", -1, 0]),
        (
            ["evaluate.temperatures=[1]", "evaluate.exact_match=false"],
            ["evaluate.temperatures", "exact_match"],
        ),
        (["evaluate.samples=4"], ["evaluate.samples", 4, "evaluate.temperatures"]),
        (["evaluate.samples=0"], ["evaluate.samples", 0, 1]),
        (["checker=exact"], ["checker", "'exact'", "exact_match"]),
        (["checker=no.module"], ["checker", "'no.module'", "No module named"]),
        (["checker=json.tool"], ["checker", "'json.tool'", "is_right"]),
        (["team.opponents={all: false}"], ["team.opponents.all", "False", "True"]),
        (["team.opponents={}"], ["team.opponents.last"]),
        (["team.opponents={spaced: 0}"], ["team.opponents.spaced", 0, 1]),
        (["team.opponents={sapced: 2}"], ["team.opponents", "sapced", "spaced"]),
        (["team.opponents={last: 2, all: true}"], ["team.opponents", "last", "all"]),
        (["team.main_players={sampled: {seed: 1}}"], ["team.main_players.sampled.count"]),
        (["team.main_players={sampled: {count: 0}}"], ["team.main_players.sampled.count", 0, 1]),
        (
            ["team.main_players={all: true}", "objective.min_player_weight=0.3"],
            ["objective.min_player_weight", 0.3, 4],
        ),
    ],
)
def test_what_does_not_fit_is_refused(overrides, parts):
    with refused(*parts):
        RunConfig.load("starter", overrides=overrides)


def test_a_server_decodes_greedily_too_but_not_nearly():
    server = {
        "generate": {"backend": "server", "server": {"endpoints": ["http://127.0.0.1:8000/v1"]}}
    }
    config = RunConfig.load("starter", server, overrides=["generate.temperature=0"])
    assert config.generate.temperature == 0
    with refused("generate.temperature", 0.005, 0, 0.01):
        RunConfig.load("starter", server, overrides=["generate.temperature=0.005"])
    with refused("evaluate.temperatures", 0.005, 0, 0.01):
        RunConfig.load("starter", server, overrides=["evaluate.temperatures=[0.7, 0.005]"])


def test_a_module_that_fails_or_says_something_else(outside):
    outside("broken", "raise RuntimeError('no luck today')")
    with refused("objective.name", "'not_ours.broken'", "no luck today"):
        RunConfig.load("starter", {"objective": {"name": "not_ours.broken"}})
    outside("empty", "Settings = dict")
    with refused("objective.name", "'not_ours.empty'", "NamedObjective"):
        RunConfig.load("starter", {"objective": {"name": "not_ours.empty"}})
    outside(
        "vague",
        "from typing import ClassVar\n"
        "from tpaw.objectives.base import NamedObjective\n"
        "class Settings(NamedObjective):\n"
        "    needs: ClassVar = 3\n",
    )
    with refused("objective.name", "not_ours.vague", "ObjectiveNeeds"):
        RunConfig.load("starter", {"objective": {"name": "not_ours.vague"}})


def test_a_method_may_take_one_response_alone(outside):
    outside(
        "single",
        "from typing import ClassVar\n"
        "from tpaw.objectives.base import NamedObjective, ObjectiveNeeds\n"
        "class Settings(NamedObjective):\n"
        "    needs: ClassVar = ObjectiveNeeds('none', one_response=True)\n",
    )
    settings = {"objective": {"name": "not_ours.single"}}
    assert RunConfig.load("starter", settings).objective.name == "not_ours.single"
    with refused("generate.samples", 2, "not_ours.single"):
        RunConfig.load("starter", settings, overrides=["generate.samples=2"])


def test_the_likeliest_responses_need_a_reference_that_tells_them(outside):
    outside(
        "blind",
        "from typing import ClassVar\n"
        "from tpaw.objectives.base import NamedObjective, ObjectiveNeeds\n"
        "class Settings(NamedObjective):\n"
        "    needs: ClassVar = ObjectiveNeeds('none', responses='likeliest')\n",
    )
    with refused("objective.name", "not_ours.blind", "likeliest", "reference"):
        RunConfig.load("starter", {"objective": {"name": "not_ours.blind"}})


def test_the_schema_covers_every_method_and_rule():
    properties = RunConfig.model_json_schema(by_alias=True)
    *methods, other = properties["properties"]["objective"]["anyOf"]
    assert other["properties"]["name"]["pattern"] == r"\."
    assert sorted(m["properties"]["name"]["const"] for m in methods) == method_names()
    rules = properties["$defs"]["TeamConfig"]["properties"]["opponents"]["anyOf"]
    assert [next(iter(rule["properties"])) for rule in rules] == [
        *("last", "all", "first_and_last", "spaced", "sampled"),
    ]
