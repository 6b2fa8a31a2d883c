from __future__ import annotations

import json
from pathlib import Path

import pytest
from messages import by_first, refused
from pydantic import ValidationError

from tpaw.config.changes import differences
from tpaw.config.files import recipe_names, to_yaml
from tpaw.config.schema import AdapterConfig, ObjectiveConfig, RunConfig

PAPER_RECIPES = {
    "ultrachat-qwen2.5-1.5b": ((1e-6, 1e-6, 1e-7, 1e-7), (2, 2, 2, 1)),
    "ultrachat-llama-3.1-8b": ((1e-6, 1e-6, 5e-7, 5e-7), (2, 2, 1, 1)),
    "gsm8k-qwen2.5-1.5b": ((1e-6, 1e-6, 1e-7, 1e-7), (2, 2, 1, 1)),
}


@pytest.mark.parametrize("name", PAPER_RECIPES)
def test_recipes_are_the_papers(name):
    config = RunConfig.load(name)
    assert (config.train.learning_rate, config.train.epochs) == PAPER_RECIPES[name]
    assert config.objective.lambda_ == (0.1, 0.1, 0.1, 5.0)
    assert (config.objective.eta, config.objective.gamma) == (6.0, 0.5)
    assert (config.objective.min_player_weight, config.iterations) == (0.01, 4)
    assert (config.train.batch_size, config.max_length) == (64, 2048)
    assert (config.train.optimizer, config.train.schedule, config.train.warmup) == (
        "rmsprop",
        "cosine",
        0.1,
    )
    assert (config.team.opponents.last, config.team.main_players.last) == (3, 3)
    assert (config.generate.temperature, config.generate.top_p, config.generate.top_k) == (
        1.0,
        1.0,
        0,
    )
    assert config.precision == "bf16"


def test_recipes_name_the_data_of_the_hub():
    """openai/gsm8k has the configurations main and socratic, and no default."""
    config = RunConfig.load("gsm8k-qwen2.5-1.5b")
    for data, split in ((config.data, "train"), (config.evaluate.data, "test")):
        assert (data.path, data.name, data.split) == ("openai/gsm8k", "main", split)
    config = RunConfig.load("ultrachat-qwen2.5-1.5b")
    for data, split in (
        (config.data, "train_sft[:50000]"),
        (config.evaluate.data, "test_sft[:1000]"),
    ):
        assert (data.path, data.name, data.split) == ("HuggingFaceH4/ultrachat_200k", None, split)
        assert data.turn == "first"


@pytest.mark.parametrize(
    ("variant", "opponents", "players", "target_weight", "player_weight"),
    [
        ("tpaw", 3, 3, "adaptive", "softmax"),
        ("no_target_weight", 3, 3, "one", "softmax"),
        ("no_player_weight", 3, 3, "adaptive", "uniform"),
        ("no_adaptive_weights", 3, 3, "one", "uniform"),
        ("no_team", 1, 1, "adaptive", "softmax"),
        ("spin", 2, 1, "one", "uniform"),
    ],
)
def test_variants_are_recipes_over_a_recipe(
    variant, opponents, players, target_weight, player_weight
):
    config = RunConfig.load("starter", variant)
    team, objective = config.team, config.objective
    assert (team.opponents.last, team.main_players.last) == (opponents, players)
    assert (objective.target_weight, objective.player_weight) == (target_weight, player_weight)
    assert config.model == RunConfig.load("starter").model


@pytest.mark.parametrize(
    ("name", "learning_rate"),
    [("sft-ultrachat-qwen2.5-1.5b", 5e-5), ("sft-ultrachat-llama-3.1-8b", 1e-5)],
)
def test_the_first_stage_is_the_papers(name, learning_rate):
    config = RunConfig.load(name)
    train = config.train
    assert (config.method, config.iterations, train.epochs) == ("sft", 1, 1)
    assert (train.learning_rate, train.optimizer, train.batch_size) == (
        learning_rate,
        "adamw_torch",
        64,
    )
    assert (train.schedule, train.warmup, config.max_length) == ("cosine", 0.1, 2048)
    assert (config.data.split, config.data.limit) == ("train_sft", None)


def test_spins_official_schedule():
    config = RunConfig.load("starter", "spin_schedule")
    spin = RunConfig.load("starter", "spin")
    assert (config.team, config.objective.target_weight) == (spin.team, "one")
    assert config.objective.lambda_ == (0.1, 0.1, 0.1, 5.0)
    train = config.train
    assert (train.learning_rate, train.epochs) == ((5e-7, 5e-7, 1e-7, 1e-7), 6)
    assert (train.optimizer, train.schedule, train.warmup) == ("rmsprop", "linear", 0.1)


@pytest.mark.parametrize("base", ["starter", *PAPER_RECIPES])
@pytest.mark.parametrize(
    ("name", "method", "iterations", "epochs"),
    [("sft", "sft", 1, 1), ("sft_continue", "sft", 4, 1), ("dpo", "dpo", 1, 2)],
)
def test_baselines_go_on_top_of_a_recipe(base, name, method, iterations, epochs):
    config = RunConfig.load(base, name)
    assert (config.method, config.iterations) == (method, iterations)
    assert (config.train.epochs, config.train.optimizer) == (epochs, "adamw_torch")
    assert config.objective.lambda_ == 0.1
    assert config.train.learning_rate == (1e-6 if name == "dpo" else 5e-5)


def test_a_variant_alone_says_what_it_lacks():
    with refused("model"):
        RunConfig.load("spin")


@by_first(
    ("override", "parts"),
    [
        ("train.leraning_rate=1", ["train.leraning_rate", "train.learning_rate"]),
        ("trian.epochs=1", ["trian", "train"]),
        ("evaluate.data.pth=x", ["evaluate.data.pth", "evaluate.data.path"]),
        ("train.learning_rate=-1", ["train.learning_rate", -1, 0]),
        ("train.learning_rate=[1e-6, 1e-7]", ["train.learning_rate", 2, "[1e-06, 1e-07]", 4]),
        ("train.epochs=[1,1,1,1,1]", ["train.epochs", 5, 4]),
        ("objective.lambda=[1,2]", ["objective.lambda", 2, 4]),
        ("objective.lambda=[1,2,-3,4]", ["objective.lambda[2]", -3]),
        ("train.epochs=1.5", ["train.epochs", 1.5]),
        ("train.epochs=0", ["train.epochs", 0]),
        ("objective.eta=0.5", ["objective.eta", 0.5, 1]),
        ("objective.gamma=.nan", ["objective.gamma", "nan"]),
        ("objective.target_weight=two", ["objective.target_weight", "'two'", "adaptive", "one"]),
        ("precision=fp16", ["precision", "'fp16'", "fp32", "bf16"]),
        ("iterations=true", ["iterations", "True"]),
        ("iterations='4'", ["iterations", "'4'"]),
        ("team.opponents.last=0", ["team.opponents.last", 0]),
        ("generate.max_new_tokens=256", ["generate.max_new_tokens", 256]),
        ("data.columns={prompt: a}", ["data.columns", "prompt", "target", "messages"]),
        ("data.columns={prompt: a, messages: c}", ["data.columns", "target"]),
        ("data.columns={prompt: a, target: b, messages: c}", ["data.columns", "messages"]),
        ("data.columns={}", ["data.columns", "prompt", "target", "messages"]),
        ("generate.temperature=-1", ["generate.temperature", -1, 0]),
        ("model=null", ["model", "None"]),
        ("objective.min_player_weight=0.4", ["objective.min_player_weight", 0.4, 3]),
        ("iterations=99999999", ["iterations", 99999999, 1000]),
        ("train.epochs=99999999999999999999", ["train.epochs", 99999999999999999999, 1000]),
        ("train.epochs=[1, 1, 1, 99999]", ["train.epochs[3]", 99999, 1000]),
        ("train.learning_rate=1e300", ["train.learning_rate", 1e300, 1000000]),
        ("train.learning_rate=1e400", ["train.learning_rate", "inf"]),
        ("objective.lambda=1e308", ["objective.lambda", 1e308, 1000000]),
        ("objective.eta=1e308", ["objective.eta", 1e308, 1000000]),
        ("objective.gamma=1e308", ["objective.gamma", 1e308, 1000000]),
        ("generate.temperature=1e-40", ["generate.temperature", 1e-40, 0, 1e-05]),
        ("generate.temperature=1e40", ["generate.temperature", 1e40, 1000]),
        ("generate.top_k=99999999999", ["generate.top_k", 99999999999, 1000000000]),
        ("generate.max_new_tokens=99999999999", ["generate.max_new_tokens", 1000000000]),
        ("max_length=99999999999", ["max_length", 99999999999, 1000000000]),
        ("data.limit=99999999999", ["data.limit", 99999999999, 1000000000]),
        ("team.opponents.last=99999", ["team.opponents.last", 99999, 100]),
        ("train.training_arguments={hub_token: hf_x}", ["hub_token", "HF_TOKEN"]),
        ("train.training_arguments={a: [{b: {WANDB_API_KEY: x}}]}", ["WANDB_API_KEY"]),
        ("nonsense", ["--set", "nonsense", "section.key=value"]),
        ("a..b=1", ["--set", "a..b=1", "section.key=value"]),
        ("train.epochs=[1", ["train.epochs", "[1", "YAML"]),
    ],
)
def test_every_error_names_the_key_the_value_and_what_is_allowed(override, parts):
    with refused(*parts):
        RunConfig.load("starter", overrides=[override])


def test_a_secret_is_not_shown():
    with refused("hub_token") as caught:
        RunConfig.load("starter", overrides=["train.training_arguments={hub_token: SESAME}"])
    assert "SESAME" not in str(caught.value)


def test_every_number_has_an_upper_bound():
    def unbounded(schema, path=""):
        for key, part in schema.items():
            if key == "type" and part in ("integer", "number"):
                if not {"maximum", "exclusiveMaximum"} & schema.keys():
                    yield path
            elif isinstance(part, dict | list):
                parts = part if isinstance(part, dict) else dict(enumerate(part))
                yield from unbounded(parts, f"{path}/{key}")

    assert list(unbounded(RunConfig.model_json_schema())) == []


def test_all_problems_are_reported_at_once():
    with refused("objective.eta", "train.epochs", "sed") as caught:
        RunConfig.load("starter", overrides=["objective.eta=0", "train.epochs=0", "sed=1"])
    assert len(str(caught.value).splitlines()) == 3


def test_numbers_as_people_write_them(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "extends: starter\n"
        "train: {learning_rate: [1e-6, 1E-6, 1.e-7, 1e-07]}\n"
        "objective: {lambda: .1}\n"
    )
    config = RunConfig.load(str(path))
    assert config.train.learning_rate == (1e-6, 1e-6, 1e-7, 1e-7)
    assert config.objective.lambda_ == 0.1


def test_extends_merges_in_order_and_finds_files_beside(tmp_path):
    (tmp_path / "base.yaml").write_text("extends: starter\ntrain: {epochs: 3, warmup: 0.2}\n")
    (tmp_path / "mine.yaml").write_text("extends: [base.yaml, spin]\ntrain: {epochs: 5}\n")
    config = RunConfig.load(str(tmp_path / "mine.yaml"), overrides=["seed=7"])
    assert (config.train.epochs, config.train.warmup, config.seed) == (5, 0.2, 7)
    assert config.team.opponents.last == 2
    (tmp_path / "later.yaml").write_text("train: {epochs: 4}\n")
    (tmp_path / "mine.yaml").write_text("extends: [base.yaml, later.yaml]\n")
    config = RunConfig.load(str(tmp_path / "mine.yaml"))
    assert (config.train.epochs, config.train.warmup) == (4, 0.2)


@by_first(
    ("text", "parts"),
    [
        ("train: [", ["run.yaml", "YAML"]),
        ("- 1", ["run.yaml", "[1]"]),
        ("seed: 1\nseed: 2", ["run.yaml", "'seed'"]),
        ("extends: 3", ["run.yaml", "extends", 3]),
        ("extends: staretr", ["staretr", "starter"]),
    ],
)
def test_files_that_are_not_configurations(tmp_path, text, parts):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with refused(*parts):
        RunConfig.load(str(path))


def test_a_file_that_extends_itself(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: b.yaml")
    (tmp_path / "b.yaml").write_text("extends: a.yaml")
    with refused(tmp_path / "a.yaml"):
        RunConfig.load(str(tmp_path / "a.yaml"))


@pytest.mark.parametrize("name", ["starter", *PAPER_RECIPES])
@pytest.mark.parametrize("comments", [True, False])
def test_what_is_shown_loads_as_the_same_configuration(tmp_path, name, comments):
    config = RunConfig.load(name)
    path = tmp_path / "shown.yaml"
    path.write_text(to_yaml(config, comments=comments))
    assert RunConfig.load(str(path)) == config


def test_every_setting_has_a_text():
    def walk(schema, root, path):
        for key, field in schema.get("properties", {}).items():
            options = [
                root["$defs"][option["$ref"].rpartition("/")[2]] if "$ref" in option else option
                for option in [field, *field.get("anyOf", [])]
            ]
            sections = [option for option in options if "properties" in option]
            for section in sections:
                yield from walk(section, root, f"{path}{key}.")
            if not sections and "description" not in field:
                yield path + key

    schema = RunConfig.model_json_schema(by_alias=True)
    json.dumps(schema)
    assert list(walk(schema, schema, "")) == []


def test_a_configuration_is_frozen():
    with pytest.raises(ValidationError):
        RunConfig.load("starter").seed = 3


def test_only_what_changes_results_counts_as_a_difference():
    old = RunConfig.load("starter")
    assert (
        differences(
            old,
            RunConfig.load(
                "starter",
                overrides=[
                    "train.tokens_per_row=32",
                    "train.save_every=7",
                    "generate.tokens_per_batch=2000",
                    "generate.shard_size=16",
                ],
            ),
        )
        == []
    )
    assert differences(
        old, RunConfig.load("starter", overrides=["objective.eta=4", "data.limit=3"])
    ) == [
        "data.limit: None → 3",
        "objective.eta: 6.0 → 4.0",
    ]


@pytest.mark.parametrize(("name", "quantization"), [("lora", None), ("qlora", "nf4")])
def test_adapters_go_on_top_of_a_recipe_with_split_weights(name, quantization):
    plain = RunConfig.load("ultrachat-llama-3.1-8b")
    assert (plain.train.weights, plain.model.adapter) == ("split", None)
    config = RunConfig.load("ultrachat-llama-3.1-8b", name)
    assert config.model.adapter == AdapterConfig(rank=64, alpha=None)
    assert config.model.quantization == quantization
    assert config.train.weights == "fp32"
    # A rank that was set before stays.
    assert RunConfig.load("starter", {"model": {"adapter": {"rank": 8}}}, name).model.adapter == (
        AdapterConfig(rank=8)
    )


@by_first(
    ("name", "model", "parts"),
    [
        ("fresh", {"adapter": {"each_iteration": "fresh"}}, ["each_iteration", "fresh"]),
        ("nf4", {"adapter": {}, "quantization": "nf4"}, ["model.quantization", "nf4"]),
    ],
)
def test_adapters_that_fsdp2_cannot_shard(name, model, parts):
    with refused("train.parallel", "fsdp2", "ddp", *parts):
        RunConfig.load("starter", {"model": model, "train": {"parallel": "fsdp2"}})


@by_first(
    ("name", "changes", "parts"),
    [
        (
            "split",
            {"precision": "bf16", "train": {"weights": "split", "parallel": "fsdp2"}},
            ["train.parallel", "fsdp2", "train.weights", "split"],
        ),
        (
            "in process",
            {"score": {"sharded": True}},
            ["score.sharded", "true", "launch.engine", "ray"],
        ),
        (
            "adapter",
            {
                "score": {"sharded": True},
                "launch": {"engine": "ray"},
                "model": {"adapter": {}},
            },
            ["score.sharded", "true", "model.adapter", "nf4"],
        ),
    ],
)
def test_weights_that_cannot_be_sharded(name, changes, parts):
    with refused(*parts):
        RunConfig.load("starter", changes)


def test_recipe_names():
    assert {"starter", "spin", "tpaw", *PAPER_RECIPES} <= set(recipe_names())


def test_a_single_tracker_and_the_name_lambda_as_people_write_them():
    assert RunConfig.load("starter", overrides=["train.report_to=wandb"]).train.report_to == (
        "wandb",
    )
    assert ObjectiveConfig(lambda_=0.2).lambda_ == 0.2


def test_settings_of_iterations_to_come_may_change():
    old = RunConfig.load("starter", overrides=["train.learning_rate=1e-6"])
    new = RunConfig.load("starter", overrides=["train.learning_rate=[1e-6, 1e-6, 5e-7, 5e-7]"])
    assert differences(old, new, begun=2) == []
    assert differences(old, new, begun=3) == [
        "train.learning_rate: [1e-06, 1e-06, 1e-06] → [1e-06, 1e-06, 5e-07]"
    ]


def test_a_revision_that_looks_like_a_number_survives(tmp_path):
    config = RunConfig.load("starter", overrides=["model.revision='1e10'"])
    (tmp_path / "c.yaml").write_text(to_yaml(config, comments=False))
    assert RunConfig.load(str(tmp_path / "c.yaml")).model.revision == "1e10"


def test_the_configuration_in_the_readme_loads(tmp_path):
    readme = Path(__file__).parents[2] / "README.md"
    block = readme.read_text().partition("```yaml\n")[2].partition("```")[0]
    assert len([line for line in block.splitlines() if not line.startswith("#")]) < 10
    (tmp_path / "mine.yaml").write_text(block)
    config = RunConfig.load(str(tmp_path / "mine.yaml"))
    assert config.train.epochs == (2, 2, 1, 1)
    assert config.evaluate.data.path == "heldout.jsonl"


COMMAND = "vllm serve {model} --port {port}"
SERVER = {
    "command": COMMAND,
    "unknown": "vllm serve {model} --port {port} --tp {gpus}",
    "no_port": "vllm serve {model}",
    "no_model": "vllm serve my/model --port {port}",
    "quote": "vllm serve '{model} --port {port}",
    "empty": " ",
    "key": "vllm serve {model} --port {port} --api-key sk-123",
    "token": "env HF_TOKEN=hf_123 vllm serve {model} --port {port}",
}


def served(**server):
    """The mapping of a configuration that generates by servers."""
    model = {"model": {"path": "m"}, "data": {"path": "d"}}
    return model | {"generate": {"backend": "server", "server": server}}


@by_first(
    ("name", "server", "parts"),
    [
        ("neither", {}, ["neither", "command", "endpoints"]),
        ("both", {"command": COMMAND, "endpoints": "http://a:1/v1"}, ["both"]),
        ("unknown", {"command": SERVER["unknown"]}, ["{gpus}", "{model}, {adapter}, {index}"]),
        ("no_port", {"command": SERVER["no_port"]}, ["{port}"]),
        ("no_model", {"command": SERVER["no_model"]}, ["{model}"]),
        ("quote", {"command": SERVER["quote"]}, ["no closing quotation"]),
        ("empty", {"command": SERVER["empty"]}, ["names no program"]),
        ("key", {"command": SERVER["key"]}, ["api_key", "VLLM_API_KEY"]),
        ("token", {"command": SERVER["token"]}, ["HF_TOKEN"]),
        ("name", {"command": COMMAND, "model": "theta-{port}"}, ["model", "{port}"]),
        ("no_url", {"endpoints": ["gpu-7:8000"]}, ["endpoints", "gpu-7:8000", "http://"]),
        (
            "password",
            {"endpoints": "http://me:secret@a/v1"},
            ["http://a/v1", "_API_KEY"],
        ),
        ("query", {"endpoints": "http://a/v1?key=secret"}, ["http://a/v1", "_API_KEY"]),
        ("twice", {"endpoints": ["http://a/v1", "http://a/v1"]}, ["twice"]),
        ("in_flight", {"command": COMMAND, "in_flight": 0}, ["generate.server.in_flight", "0"]),
        ("comand", {"comand": COMMAND}, ["generate.server.comand", "generate.server.command"]),
    ],
)
def test_a_generation_server_that_cannot_be_used_is_refused(name, server, parts):
    with refused("generate.server", *parts) as caught:
        RunConfig.load(served(**server))
    for secret in ("secret", "sk-123", "hf_123"):
        assert secret not in str(caught.value)


def test_settings_of_servers_without_servers_are_refused():
    with refused("generate.server", COMMAND, "generate.backend"):
        RunConfig.load(served(command=COMMAND), overrides=["generate.backend=hf"])
    with refused("generate.temperature", "0.001", "0.01"):
        RunConfig.load(served(command=COMMAND), overrides=["generate.temperature=0.001"])


def test_a_server_serves_what_is_trained():
    """Not the base alone, and not a base with other weights."""
    adapter = {"adapter": {"rank": 4}}
    settings = served(command=COMMAND)
    settings["model"] |= adapter
    with refused("generate.server.command", COMMAND, "{adapter}"):
        RunConfig.load(settings)
    settings["generate"]["server"]["command"] = f"{COMMAND} --lora-modules={{adapter}}={{adapter}}"
    assert RunConfig.load(settings).model.adapter is not None
    settings["model"] |= {"quantization": "nf4"}
    with refused("model.quantization", "nf4", "generate.backend"):
        RunConfig.load(settings)


def test_another_server_may_go_on_with_a_run():
    config = RunConfig.load(served(command=COMMAND))
    other = RunConfig.load(served(endpoints=["http://a/v1"], in_flight=3, model="theta-{index}"))
    plain = RunConfig.load({"model": {"path": "m"}, "data": {"path": "d"}})
    assert differences(config, other) == differences(config, plain) == []
