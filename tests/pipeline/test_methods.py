"""Every method runs in the one loop, which does what its objective needs and no more."""

from __future__ import annotations

import importlib
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from builders import make_tokenizer, stopped_at_step, sums, write_jsonl
from messages import refused, says
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import tpaw.pipeline.stages
import tpaw.pipeline.training
from tests.report.html.parsed import shown_responses
from tpaw.config.files import to_yaml
from tpaw.config.methods import method_names
from tpaw.config.plan import plan_run
from tpaw.config.schema import RunConfig
from tpaw.data.examples import read_examples
from tpaw.data.token_ids import read_table
from tpaw.generation.generator import FakeGenerator
from tpaw.generation.responses import read_responses
from tpaw.pipeline.stages import Stages
from tpaw.report.summary import summarise
from tpaw.report.tables import plan_table
from tpaw.selfplay import self_play
from tpaw.storage.artifacts import read_manifest
from tpaw.storage.run_directory import RunDirectory

GUIDE = Path(__file__).parents[2] / "docs" / "how-to" / "add-a-method.md"
RECIPES = sorted(set(method_names()) - {"tpaw"})  # each has a recipe of its name
N = 12


@pytest.fixture
def short(settings, tmp_path):
    """Two short iterations over twelve rows, without evaluation."""
    settings["data"]["path"] = str(write_jsonl(tmp_path / "rows.jsonl", sums(N)))
    settings["train"] |= {"batch_size": 4, "save_every": 2}
    settings["generate"]["max_new_tokens"] = 6
    return settings | {"iterations": 2, "evaluate": {}}


def load(settings, recipe, *overrides):
    """A recipe over the short run; a random model is never right, and IRFT's parts are small."""
    fields = {"self_training": ["objective.keep=all"], "irft": ["train.batch_size=1"]}
    own = ["train.epochs=1", *fields.get(recipe, []), *overrides]
    return RunConfig.load(settings, recipe, overrides=own)


def different_answers():
    """Opens a generator whose responses differ between prompts and players, and from targets."""

    def answer(prompt, seed):
        rng = np.random.default_rng([seed, *prompt.tolist()])
        return [*rng.integers(5, 320, 4).tolist(), 4]

    return FakeGenerator(answer).opener


def scored(run, players):
    """Of each iteration, the number of sequences scored; and every (player, sequence) pair."""
    counts, pairs = {}, []
    for player in players:
        folder = run.logprobs(player)
        for shard in json.loads((folder / "manifest.json").read_text())["files"]:
            count = counts.get(shard["stage"], 0)
            counts[shard["stage"]] = count + shard["sequences"]
            pairs += [(player, key) for key in read_table(folder / shard["path"])["sequence"]]
    return dict(sorted(counts.items())), pairs


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_trains_and_goes_on_after_a_stop(short, tmp_path, recipe):
    config, run = load(short, recipe), RunDirectory(tmp_path / "r")
    stopped_at_step(2, config, run.root)
    assert not run.checkpoint(1).exists()
    assert self_play(config, run.root).index == 2
    prints = [read_manifest(run.checkpoint(i))["fingerprint"] for i in (1, 2)]
    assert len(set(prints)) == 2
    for i, plan in enumerate(plan_run(config, N), start=1):
        lines = [json.loads(line) for line in run.training_log(i).read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, plan.optimizer_steps + 1))
        assert any(line["grad_norm"] > 0 for line in lines)


def test_tspin_scores_nothing_and_trains_on_the_responses_of_the_initial_model(
    short, tmp_path, monkeypatch
):
    datasets, original = [], tpaw.pipeline.training.team_trainer

    def noting(policy, arguments, dataset, *others):
        datasets.append(dataset)
        return original(policy, arguments, dataset, *others)

    def score(*args):
        raise AssertionError("nothing is to be scored")

    monkeypatch.setattr(tpaw.pipeline.training, "team_trainer", noting)
    monkeypatch.setattr(tpaw.pipeline.stages, "ScoreTask", score)
    config = load(short, "tspin", "keep=last", "generate.samples=2")
    self_play(config, tmp_path / "r", open_generator=different_answers())
    run = RunDirectory(tmp_path / "r")
    assert not (run.root / "logprobs").exists()
    assert [plan.to_score for plan in plan_run(config, N)] == [0, 0]
    first, newest = (read_responses(run.responses(i)) for i in (1, 2))
    assert len(first) == len(newest) == len(datasets[1]) == 2 * N
    for i in range(2 * N):  # the first response beside the first, the second beside the second
        row = datasets[1][i]
        assert row["initial_ids"].tolist() == first[i].token_ids.tolist()
        assert row["generated_ids"].tolist() == newest[i].token_ids.tolist()
        assert row["player_target_logps"].shape == (0,)
        assert datasets[0][i]["initial_ids"].tolist() == datasets[0][i]["generated_ids"].tolist()


def test_alpha_spin_scores_each_player_and_sequence_once_and_as_many_as_planned(short, tmp_path):
    config = load(short | {"iterations": 3}, "alpha_spin")
    run = RunDirectory(tmp_path / "r")
    self_play(config, run.root, open_generator=different_answers())
    players = [path.name for path in (run.root / "logprobs").iterdir()]
    assert len(players) == 3
    counts, pairs = scored(run, players)
    # y and g_0 under θ_0; y, g_1, g_0 under θ_1 and g_1 under θ_0; y, g_2, g_1 under θ_2 and g_2
    # under θ_0.
    assert counts == {"iteration-1": 2 * N, "iteration-2": 4 * N, "iteration-3": 4 * N}
    assert list(counts.values()) == [plan.to_score for plan in plan_run(config, N)]
    assert len(pairs) == len(set(pairs))


def test_each_iteration_of_irft_takes_the_next_part_of_one_shuffle(short, tmp_path):
    options = ("train.batch_size=2", "data.chunks=3")
    config = load(short | {"iterations": 4}, "irft", *options)
    assert config.generate.temperature == 0
    run = RunDirectory(tmp_path / "r")
    self_play(config, run.root, open_generator=different_answers())
    ids = [example.id for example in read_examples(run.inputs / "train.parquet")]
    parts = [[r.example_id for r in read_responses(run.responses(i))] for i in range(1, 5)]
    assert [len(part) for part in parts] == [4, 4, 4, 4]
    assert sorted(id for part in parts[:3] for id in part) == sorted(ids)
    assert parts[3] == parts[0]
    assert parts[:3] != [ids[i : i + 4] for i in range(0, N, 4)]
    counts, _ = scored(run, [path.name for path in (run.root / "logprobs").iterdir()])
    assert list(counts.values()) == [8] * 4 == [plan.to_score for plan in plan_run(config, N)]
    other = load(short | {"iterations": 1, "seed": 1}, "irft", *options)
    self_play(other, tmp_path / "other", open_generator=different_answers())
    first = read_responses(RunDirectory(tmp_path / "other").responses(1))
    assert [r.example_id for r in first] != parts[0]


def test_parts_of_unequal_size_are_planned(short):
    config = load(short, "irft", "data.chunks=5", "iterations=6", "train.batch_size=1")
    assert [plan.triples for plan in plan_run(config, 12)] == [3, 3, 2, 2, 2, 3]
    with refused("data.chunks", 5, 4):
        plan_run(config, 4)


def log_prob(model, prompt, response):
    """Of one sequence alone, by transformers."""
    ids = torch.tensor([[*prompt, *response]])
    logps = model(ids).logits[0].double().log_softmax(-1)
    at = range(len(prompt) - 1, len(prompt) + len(response) - 1)
    return sum(logps[k, ids[0, k + 1]].item() for k in at)


@pytest.mark.parametrize("reads_from_disk", [False, True])
def test_sharpening_trains_on_the_likeliest_whole_response_to_each_prompt(
    short, tmp_path, monkeypatch, reads_from_disk
):
    """Also where training reads its data from the run directory, as a process of a group does."""
    datasets, notes, original = [], [], tpaw.pipeline.training.team_trainer

    def noting(policy, arguments, dataset, *others):
        datasets.append(dataset)
        return original(policy, arguments, dataset, *others)

    rng = np.random.default_rng(0)

    def answer(prompt, seed):  # whole or truncated; never a whole one to the first prompt
        ids = rng.integers(5, 320, 6).tolist()
        cut = int(rng.integers(1, 9))
        is_first = prompt.tolist() == first_prompt
        return ids if cut > 5 or is_first else [*ids[:cut], 4]

    if reads_from_disk:
        train = Stages._train
        monkeypatch.setattr(Stages, "_train", lambda self, job, triples=None: train(self, job))
    monkeypatch.setattr(tpaw.pipeline.training, "team_trainer", noting)
    monkeypatch.setattr(tpaw.pipeline.stages, "note", notes.append)
    config = RunConfig.load(short, "sharpening", overrides=["train.batch_size=2"])
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    first_prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": sums(N)[0]["question"]}], add_generation_prompt=True
    )["input_ids"]
    run = RunDirectory(tmp_path / "r")
    self_play(config, run.root, open_generator=FakeGenerator(answer).opener)
    examples = read_examples(run.inputs / "train.parquet")
    folders = [config.model.path, run.checkpoint(1)]
    for i, (dataset, folder) in enumerate(zip(datasets, folders, strict=True), start=1):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        responses = read_responses(run.responses(i))
        assert len(responses) == 4 * N
        expected = {}
        with torch.no_grad():
            for row, example in enumerate(examples):
                whole = [responses[k] for k in range(row, 4 * N, N)]
                whole = [r.token_ids.tolist() for r in whole if r.finish_reason == "stop"]
                if whole:
                    prompt = example.prompt_ids.tolist()
                    best = max(whole, key=lambda ids: log_prob(model, prompt, ids))
                    expected[tuple(prompt)] = best
        assert 0 < len(expected) < N
        found = {
            tuple(row["prompt_ids"].tolist()): row["generated_ids"].tolist()
            for row in (dataset[k] for k in range(len(dataset)))
        }
        assert len(dataset) == len(found)
        assert found == expected
        manifest = read_manifest(run.checkpoint(i))
        kept = {"triples": len(expected), "responses": 4 * N}
        assert kept.items() <= manifest.items()
        assert kept.items() <= summarise(run, config)["players"][i]["kept"].items()
        assert (manifest["right_share"], manifest["right_share_of_all"]) == (0.0, 0.0)
        says(next(n for n in notes if f"iteration {i}" in n), len(expected), "likeliest")
        # The report shows the kept response, and the first one where none is kept.
        texts = {(r.example_id, tuple(r.token_ids.tolist())): r.text for r in responses}
        for row, example in enumerate(examples):
            best = expected.get(tuple(example.prompt_ids.tolist()))
            kept = best and {
                "text": texts[example.id, tuple(best)],
                "chosen": "the likeliest of 4",
            }
            first = {"text": responses[row].text, "truncated": True}
            assert shown_responses(run, config)[example.id][i - 1] == (kept or first)
    plans = plan_run(config, N)
    assert all(plan.is_at_most and plan.triples == N for plan in plans)
    # Targets and responses under the newest checkpoint; θ_0's responses are not scored again.
    players = [path.name for path in (run.root / "logprobs").iterdir()]
    counts, _ = scored(run, players)
    assert list(counts.values()) == [5 * N] * 2 == [plan.to_score for plan in plans]


@pytest.mark.parametrize("change", ["team.opponents={last: 2}", "data.chunks=2"])
def test_sharpening_chooses_among_what_the_iteration_plays_with(
    short, tmp_path, monkeypatch, change
):
    """Of two opponents, the responses of both; of two chunks, those to the prompts of one."""
    datasets, original = [], tpaw.pipeline.training.team_trainer
    rng = np.random.default_rng(1)

    def noting(policy, arguments, dataset, *others):
        datasets.append(dataset)
        return original(policy, arguments, dataset, *others)

    def answer(prompt, seed):
        return [*rng.integers(5, 320, int(rng.integers(1, 5))).tolist(), 4]

    monkeypatch.setattr(tpaw.pipeline.training, "team_trainer", noting)
    overrides = ["train.batch_size=2", "generate.samples=2", change]
    config = RunConfig.load(short, "sharpening", overrides=overrides)
    run = RunDirectory(tmp_path / "r")
    self_play(config, run.root, open_generator=FakeGenerator(answer).opener)
    examples = read_examples(run.inputs / "train.parquet")
    prompts = dict(zip(examples.ids, (ids.tolist() for ids in examples.prompt_ids), strict=True))
    candidates = {}  # of each prompt, all responses that the second iteration plays with
    for i in (1, 2) if "opponents" in change else (2,):
        for response in read_responses(run.responses(i)):
            known = candidates.setdefault(tuple(prompts[response.example_id]), [])
            known.append(response.token_ids.tolist())
    assert {len(known) for known in candidates.values()} == {4 if "opponents" in change else 2}
    model = AutoModelForCausalLM.from_pretrained(run.checkpoint(1), dtype=torch.float32).eval()
    with torch.no_grad():
        expected = {
            prompt: max(known, key=lambda ids: log_prob(model, prompt, ids))
            for prompt, known in candidates.items()
        }
    found = [datasets[1][k] for k in range(len(datasets[1]))]
    assert len(found) == (N if "opponents" in change else N // 2)
    assert {
        tuple(row["prompt_ids"].tolist()): row["generated_ids"].tolist() for row in found
    } == expected


def test_the_right_ones_of_the_likeliest_are_counted(short, tmp_path, monkeypatch):
    """Of four responses to each prompt one is right, and it has a single token less."""
    notes, calls, tokenizer = [], [], make_tokenizer()

    def answer(prompt, seed):
        calls.append(0)
        a, b = map(int, re.findall(r"\d+", tokenizer.decode(prompt.tolist()))[:2])
        is_right = len(calls) <= N  # the first response to each prompt
        ids = tokenizer.encode(f"#### {a + b + (not is_right)}")
        return [*ids, *([] if is_right else [7] * 8), 4]

    monkeypatch.setattr(tpaw.pipeline.stages, "note", notes.append)
    short["generate"]["max_new_tokens"] = 30
    config = RunConfig.load(short | {"iterations": 1}, "sharpening")
    self_play(config, tmp_path / "r", open_generator=FakeGenerator(answer).opener)
    manifest = read_manifest(RunDirectory(tmp_path / "r").checkpoint(1))
    # A random model finds each token about as likely, so the shorter response wins.
    assert (manifest["right_share"], manifest["right_share_of_all"]) == (1.0, 0.25)
    says(next(note for note in notes if "likeliest" in note), N, "100.0%", "25.0%")


def test_the_right_ones_are_counted_on_prompts_with_a_whole_response(short, tmp_path):
    """The first prompt has truncated responses alone, the others a right and three wrong ones."""
    calls, tokenizer = [], make_tokenizer()

    def answer(prompt, seed):
        calls.append(0)
        a, b = map(int, re.findall(r"\d+", tokenizer.decode(prompt.tolist()))[:2])
        if len(calls) % N == 1:
            return [7] * 40
        is_right = len(calls) <= N
        return [*tokenizer.encode(f"#### {a + b + (not is_right)}"), *([7] * 8 * (not is_right)), 4]

    short["generate"]["max_new_tokens"] = 30
    config = RunConfig.load(short | {"iterations": 1}, "sharpening")
    self_play(config, tmp_path / "r", open_generator=FakeGenerator(answer).opener)
    manifest = read_manifest(RunDirectory(tmp_path / "r").checkpoint(1))
    assert (manifest["triples"], manifest["responses"]) == (N - 1, 4 * N)
    assert (manifest["right_share"], manifest["right_share_of_all"]) == (1.0, 0.25)


def test_sharpening_with_truncated_responses_alone_is_refused(short, tmp_path):
    config = RunConfig.load(short, "sharpening")
    endless = FakeGenerator(lambda prompt, seed: [7] * 40).opener
    with refused("objective.name", "self_training", "iteration 1", 4 * N, "whole"):
        self_play(config, tmp_path / "r", open_generator=endless)


def test_sharpening_with_one_response_is_refused(short):
    with refused("generate.samples", 1, "self_training", 2):
        RunConfig.load(short, "sharpening", overrides=["generate.samples=1"])


def right_for_even_numbers():
    """Opens a generator that adds correctly if the first number is even."""
    tokenizer = make_tokenizer()

    def answer(prompt, seed):
        a, b = map(int, re.findall(r"\d+", tokenizer.decode(prompt.tolist()))[:2])
        return [*tokenizer.encode(f"#### {a + b + a % 2}"), 4]

    return FakeGenerator(answer).opener


def test_self_training_keeps_the_right_responses_and_counts_them(short, tmp_path, monkeypatch):
    short["generate"]["max_new_tokens"] = 20
    config = RunConfig.load(short, "self_training", overrides=["train.batch_size=2"])
    plans = plan_run(config, N)
    assert all(plan.is_at_most and plan.triples == N for plan in plans)
    console = Console(width=140, file=io.StringIO())
    console.print(plan_table(plans))
    assert console.file.getvalue().count(f"≤ {N}") == 2 * len(plans)  # triples; two epochs of N / 2
    evens = sum(int(re.search(r"\d+", row["question"])[0]) % 2 == 0 for row in sums(N))
    assert 2 < evens < N
    notes = []
    monkeypatch.setattr(tpaw.pipeline.stages, "note", notes.append)
    self_play(config, tmp_path / "r", open_generator=right_for_even_numbers())
    run = RunDirectory(tmp_path / "r")
    says(next(note for note in notes if "right" in note), evens, N, "iteration 1")
    for i in (1, 2):
        manifest = read_manifest(run.checkpoint(i))
        assert (manifest["triples"], manifest["responses"]) == (evens, N)
        lines = [json.loads(line) for line in run.training_log(i).read_text().splitlines()]
        assert lines[-1]["step"] == 2 * -(-evens // 2)
    assert summarise(run, config)["players"][2]["kept"] == {"triples": evens, "responses": N}


def test_self_training_without_a_right_response_says_which_iteration(short, tmp_path):
    config = RunConfig.load(short, "self_training")
    with refused("objective.name", "self_training", "iteration 1", N):
        self_play(config, tmp_path / "r", open_generator=different_answers())


def test_self_training_needs_targets_with_an_answer(short, tmp_path):
    rows = [*sums(N), {"question": "Who?", "answer": "Nobody."}]
    short["data"]["path"] = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    with refused("objective.name", "self_training", "data", "####"):
        self_play(RunConfig.load(short, "self_training"), tmp_path / "r")
    assert not (tmp_path / "r").exists()
    assert load(short, "self_training").objective.needs.responses == "all"


def test_several_responses_to_a_prompt_are_as_many_triples(short, tmp_path):
    config = load(short, "spin", "generate.samples=3", "generate.shard_size=9")
    plans = plan_run(config, N)
    assert [plan.triples for plan in plans] == [3 * N, 2 * 3 * N]
    assert [plan.to_generate for plan in plans] == [3 * N] * 2
    # y and three responses under θ_0; y, three new and three old ones under θ_1.
    assert [plan.to_score for plan in plans] == [4 * N, 7 * N]
    run = RunDirectory(tmp_path / "r")
    self_play(config, run.root)
    ids = [example.id for example in read_examples(run.inputs / "train.parquet")]
    responses = read_responses(run.responses(1))
    assert [r.example_id for r in responses] == 3 * ids
    samples = [[r.token_ids.tobytes() for r in responses[i : i + N]] for i in (0, N, 2 * N)]
    assert all(len({sample[i] for sample in samples}) > 1 for i in range(N))
    # One response is what a run with one alone has, shard by shard.
    alone = load(short, "spin", "generate.shard_size=9", "iterations=1")
    self_play(alone, tmp_path / "alone")
    kept = read_responses(RunDirectory(tmp_path / "alone").responses(1))
    assert [r.token_ids.tobytes() for r in kept][:9] == samples[0][:9]


@pytest.fixture
def guide(tmp_path, monkeypatch):
    """The module and the recipe of the guide, in a package of their own."""
    [module] = re.findall(r"^```python\n(.*?)^```$", GUIDE.read_text(), flags=re.S | re.M)
    [recipe] = re.findall(r"^```yaml\n(.*?)^```$", GUIDE.read_text(), flags=re.S | re.M)
    package = tmp_path / "outside" / "my_package"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "bounded.py").write_text(module)
    monkeypatch.syspath_prepend(str(package.parent))
    importlib.invalidate_caches()
    yield yaml.safe_load(recipe)
    for name in ("my_package", "my_package.bounded"):
        sys.modules.pop(name, None)


def test_the_method_of_the_guide_runs(short, tmp_path, guide):
    config = RunConfig.load(short, guide)
    shown = tmp_path / "shown.yaml"
    shown.write_text(to_yaml(config, comments=True))
    assert "# Where the margin stops, in nats per token." in shown.read_text()
    assert RunConfig.load(str(shown)) == config
    assert self_play(config, tmp_path / "r").index == 2
    assert self_play(RunDirectory(tmp_path / "r").load_config(), tmp_path / "r").index == 2
    changed = RunConfig.load(short, guide, overrides=["objective.bound=3"])
    with refused("objective.bound", 2.0, 3):
        self_play(changed, tmp_path / "r")
    with refused("objective.bound", -1, 0):
        RunConfig.load(short, guide, overrides=["objective.bound=-1"])
    with refused("objective.bond", "objective.bound"):
        RunConfig.load(short, guide, overrides=["objective.bond=1"])
