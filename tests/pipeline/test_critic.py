"""Method critic over a run directory: what it compares, chooses and trains on; stops and kills."""

from __future__ import annotations

import json
import zlib
from types import SimpleNamespace

import best_of
import numpy as np
import pytest
import torch
import yaml
from builders import contents, make_model, make_tokenizer, run_settings
from fork_server import Forked
from messages import refused
from oracles import oracle
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    ModernBertForSequenceClassification,
)

import tpaw.pipeline.training
from tests.report.html.parsed import shown_responses
from tpaw.config.plan import plan_run
from tpaw.config.schema import RunConfig
from tpaw.data.examples import read_examples
from tpaw.generation.responses import read_responses
from tpaw.pipeline import critic_task
from tpaw.pipeline.costs import measure_costs
from tpaw.pipeline.preflight import read_inputs
from tpaw.runtime.interrupt import StopSignal
from tpaw.selfplay import self_play
from tpaw.storage.artifacts import read_manifest
from tpaw.storage.run_directory import RunDirectory
from tpaw.training.triples import TripleDataset

N = 24
SAMPLES = 3


@pytest.fixture(scope="module")
def model_that_ends(tmp_path_factory, data_file):
    """A model that has learned to end most of its responses."""
    tokenizer, model = make_tokenizer(), make_model()
    rows = [json.loads(line) for line in data_file.read_text().splitlines()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    torch.manual_seed(0)
    for step in range(150):
        row = rows[step % len(rows)]
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["question"]}], add_generation_prompt=True
        )["input_ids"]
        target = [*tokenizer(row["answer"]).input_ids, tokenizer.eos_token_id]
        labels = [-100] * len(prompt) + target
        loss = model(torch.tensor([prompt + target]), labels=torch.tensor([labels])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("model") / "ends"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def critic_settings(model_that_ends, data_file, heldout_file):
    settings = run_settings(model_that_ends, data_file, heldout_file)
    settings["generate"] |= {"max_new_tokens": 40, "samples": SAMPLES}
    settings["critic"] = {
        "steps": [12, 8],
        "evaluate_every": 4,
        "batch_size": 8,
        "width": 32,
        "layers": 1,
        "heldout": 0.25,
        "at_chance": "go_on",
    }
    return settings | {"iterations": 2}


def load(settings, *more):
    return RunConfig.load(settings, *more, overrides=["method=critic"])


def test_it_trains_by_sft_on_what_the_critic_likes_best(critic_settings, tmp_path, monkeypatch):
    config = load(critic_settings, {"critic": {"team": 2, "agree": "min"}})
    trained_on = []
    original = tpaw.pipeline.training.sft_trainer

    def watched(policy, arguments, examples, tokenizer):
        trained_on.append([(e.id, e.target_ids.tolist()) for e in examples])
        return original(policy, arguments, examples, tokenizer)

    monkeypatch.setattr(tpaw.pipeline.training, "sft_trainer", watched)
    player = self_play(config, tmp_path / "r")
    assert player.index == 2
    run = RunDirectory(tmp_path / "r")
    examples = read_examples(run.inputs / "train.parquet")
    for t in (0, 1):
        folder = run.iteration(t).critic
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        assert isinstance(model, ModernBertForSequenceClassification)
        scores = np.load(folder / "scores.npy")
        responses = read_responses(run.iteration(t).responses)
        assert len(responses) == SAMPLES * N
        assert scores.shape == (t + 1, SAMPLES * N)  # a team of the critics so far
        end = responses.token_ids[0][-1:].tolist()
        for place in (0, 5, 50):
            row, ids = place % N, responses.token_ids[place].tolist()
            if responses.finish_reasons[place] == "stop":
                ids = ids[:-1]
            read = torch.tensor([[*examples.prompt_ids[row].tolist(), *ids]])
            score = model(input_ids=read).logits.item()
            assert scores[0, place] == pytest.approx(score, abs=1e-4), end
        standard = (scores - scores.mean(1, keepdims=True)) / scores.std(1, keepdims=True)
        least = standard.min(0)
        expected = []
        for row in range(N):
            whole = [
                k * N + row
                for k in range(SAMPLES)
                if responses.finish_reasons[k * N + row] == "stop"
            ]
            if whole:
                best = max(whole, key=lambda place: (least[place], -place))
                expected.append((examples.ids[row], responses.token_ids[best].tolist()))
        assert trained_on[t] == expected
        texts = {(r.example_id, tuple(r.token_ids.tolist())): r.text for r in responses}
        shown = shown_responses(run, config)
        for name, ids in expected:
            found = shown[name][t]
            assert found == {"text": texts[name, tuple(ids)], "chosen": "the critic's best of 3"}
        assert 0 < len(expected) <= N
        facts = json.loads((folder / "results.json").read_text())
        assert (facts["prompts"], facts["chosen"]) == (N, len(expected))
        assert facts["steps"] == (12, 8)[t]
        assert facts["auc"]["prompts"] <= N // 4
    assert not list(run.root.rglob("critic-training"))
    first, second = (run.iteration(t).critic / "model.safetensors" for t in (0, 1))
    assert first.read_bytes() != second.read_bytes()
    [one, two] = plan_run(config, N)
    assert (one.to_generate, one.triples, one.is_at_most) == (SAMPLES * N, N, True)
    assert (one.opponents, two.opponents, two.main_players) == ((0,), (1, 0), ())


def share_of_won_pairs(model, rows, examples, responses):
    """Mean over prompts: how often the target has a higher score than a whole, other response."""
    shares = []
    for row in rows:
        prompt, target = examples.prompt_ids[row].tolist(), examples.target_ids[row].tolist()

        def score(ids, prompt=prompt):
            with torch.no_grad():
                return model(input_ids=torch.tensor([[*prompt, *ids[:-1]]])).logits.item()

        places = [k * N + row for k in range(SAMPLES)]
        whole = [p for p in places if responses.finish_reasons[p] == "stop"]
        others = [ids for p in whole if (ids := responses.token_ids[p].tolist()) != target]
        if others:
            shares.append(np.mean([score(target) > score(ids) for ids in others]))
    return np.mean(shares), len(shares)


def test_it_is_fitted_on_the_history_and_measured_on_prompts_of_its_own(
    critic_settings, tmp_path, monkeypatch
):
    seen, halved = [], []
    compare, halve = critic_task.comparisons, critic_task.halves

    def comparing(examples, parts, encode):
        seen.append([ids.tolist() for part in parts for ids in part.token_ids])
        return compare(examples, parts, encode)

    def halving(*given):
        halved.append(halve(*given))
        return halved[-1]

    monkeypatch.setattr(critic_task, "comparisons", comparing)
    monkeypatch.setattr(critic_task, "halves", halving)
    self_play(load(critic_settings), tmp_path / "r")
    run = RunDirectory(tmp_path / "r")
    examples = read_examples(run.inputs / "train.parquet")
    first, second = (read_responses(run.iteration(t).responses) for t in (0, 1))
    given = [[ids.tolist() for ids in responses.token_ids] for responses in (first, second)]
    assert seen == [given[0], [*given[1], *given[0]]]
    model = AutoModelForSequenceClassification.from_pretrained(run.iteration(0).critic).eval()
    facts = json.loads((run.iteration(0).critic / "results.json").read_text())["auc"]
    watched, measured = halved[0]
    assert (len(watched), len(measured)) == (3, 3)  # a quarter of 24, in two halves
    won = share_of_won_pairs(model, measured, examples, first)
    assert (facts["value"], facts["prompts"]) == (pytest.approx(won[0]), won[1])
    found, expected = choices_without_training(run, examples, first, monkeypatch)
    assert found == pytest.approx(expected)
    assert len(set(expected.values())) > 3  # they choose differently


def choices_without_training(run, examples, responses, monkeypatch):
    """What benchmarks/best_of.py says of a run, and what it should say. Right is arbitrary."""

    def is_right(row, text):
        return zlib.crc32(f"{examples.ids[row]} {text}".encode()) % 2 == 0

    arbitrary = SimpleNamespace(
        is_right=lambda example, text: is_right(examples.ids.index(example.id), text)
    )
    monkeypatch.setattr(best_of, "checker_of", lambda name: arbitrary)
    found = best_of.shares(run, 0)
    del found[best_of.ON_UNSEEN_PROMPTS]
    model = AutoModelForCausalLM.from_pretrained(run.load_config().model.path).eval()
    judged = np.load(run.iteration(0).critic / "scores.npy")[0]
    shares = {arm: [] for arm in found}
    for row in range(N):
        places = [k * N + row for k in range(SAMPLES)]
        whole = [p for p in places if responses.finish_reasons[p] == "stop"]
        if not whole:
            continue
        ids = {p: responses.token_ids[p].tolist() for p in whole}
        with torch.no_grad():
            prompt = examples.prompt_ids[row].tolist()
            logps = {p: oracle(model, prompt, ids[p]).item() for p in whole}
        texts = [responses.texts[p] for p in places]
        scores = {
            "own log-prob": logps,
            "own log-prob per token": {p: logps[p] / len(ids[p]) for p in whole},
            "critic": {p: judged[p] for p in whole},
            "majority": {p: texts.count(responses.texts[p]) for p in whole},
            "any": {p: is_right(row, responses.texts[p]) for p in whole},
        }
        shares["nothing: every response"].append(np.mean([is_right(row, t) for t in texts]))
        for arm, of_place in scores.items():
            top = max(of_place.values())
            best = [p for p in whole if of_place[p] > top - 1e-4]
            shares[arm].append(np.mean([is_right(row, responses.texts[p]) for p in best]))
    return found, {arm: np.mean(of_rows) for arm, of_rows in shares.items()}


@pytest.mark.parametrize("each_iteration", ["continue", "fresh"])
def test_where_a_critic_starts(critic_settings, tmp_path, monkeypatch, each_iteration):
    starts, fit = [], critic_task.fit

    def fitting(model, *given, **named):
        starts.append({name: w.detach().clone() for name, w in model.named_parameters()})
        return fit(model, *given, **named)

    monkeypatch.setattr(critic_task, "fit", fitting)
    critic = {"critic": {"each_iteration": each_iteration}}
    self_play(load(critic_settings, critic), tmp_path / "r")
    fitted = load_file(RunDirectory(tmp_path / "r").iteration(0).critic / "model.safetensors")
    expected = fitted if each_iteration == "continue" else starts[0]
    assert not all(torch.equal(fitted[name], w) for name, w in starts[0].items())
    assert all(torch.equal(expected[name], w) for name, w in starts[1].items())


def test_its_results_are_those_of_the_files(critic_settings, tmp_path, tpaw_, monkeypatch):
    monkeypatch.setattr("tpaw.report.summary.exploited", lambda players: [f"of {len(players)}"])
    self_play(load(critic_settings), tmp_path / "r")
    run = RunDirectory(tmp_path / "r")
    examples = read_examples(run.inputs / "train.parquet")
    folder = run.iteration(0).critic
    facts = json.loads((folder / "results.json").read_text())
    responses = read_responses(run.iteration(0).responses)
    texts = [[responses.texts[k * N + row] for k in range(SAMPLES)] for row in range(N)]
    assert facts["different_share"] == pytest.approx(
        np.mean([len(set(of_prompt)) / SAMPLES for of_prompt in texts])
    )
    right = [
        [
            text.split("#### ")[-1] == examples.target_texts[row].split("#### ")[-1]
            for text in texts[row]
        ]
        for row in range(N)
    ]
    assert facts["right_share"] == pytest.approx(np.mean(right))
    assert facts["any_right_share"] == pytest.approx(np.mean([any(r) for r in right]))
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert summary["players"][1]["critic"]["auc"] == facts["auc"]
    assert "critic" in summary["players"][1]["seconds"]
    assert "of 3" in summary["notes"]  # what is said of an exploited critic
    code, out, _ = tpaw_("run", tmp_path / "r")
    assert code == 0
    assert "of 3" in out
    assert [line for line in out.splitlines() if f" {facts['auc']['value']:.3f} [" in line]
    assert read_manifest(folder)["iteration"] == 1


def test_it_trains_by_an_objective_against_the_other_responses(
    critic_settings, tmp_path, monkeypatch
):
    config = load(
        critic_settings, {"critic": {"train_by": "objective"}, "train": {"tokens_per_row": 512}}
    )
    seen = []
    original = TripleDataset.of.__func__

    def watched(cls, triples, stores):
        seen.append(list(triples))
        return original(cls, triples, stores)

    monkeypatch.setattr(TripleDataset, "of", classmethod(watched))
    self_play(config, tmp_path / "r")
    run = RunDirectory(tmp_path / "r")
    chosen = [{t.example.id: t.example.target_ids.tolist() for t in triples} for triples in seen]
    for t, triples in enumerate(seen):
        newest = read_responses(run.iteration(t).responses)
        of_prompt = {}
        for response in newest:
            of_prompt.setdefault(response.example_id, []).append(response.token_ids.tolist())
        assert {triple.opponent for triple in triples} == set(range(t + 1))
        for triple in triples:
            target = triple.example.target_ids.tolist()
            assert target in of_prompt[triple.example.id]
            assert triple.response.token_ids.tolist() != target
            assert chosen[t][triple.example.id] == target


def test_a_critic_at_chance_ends_the_run(critic_settings, tmp_path, monkeypatch):
    critic_settings["critic"] |= {"at_chance": "stop", "steps": 1, "learning_rate": 1e-9}
    monkeypatch.setattr(
        "tpaw.pipeline.critic_task.scores_of", lambda model, read: np.zeros(len(read))
    )
    with refused("iteration 1", "AUC 0.500", "critic.at_chance", "go_on"):
        self_play(load(critic_settings), tmp_path / "r")
    run = RunDirectory(tmp_path / "r")
    assert not run.checkpoint(1).exists()
    assert run.iteration(0).critic.exists()


def test_a_critic_that_only_counts_tokens_ends_the_run(critic_settings, tmp_path, monkeypatch):
    critic_settings["critic"] |= {"at_chance": "stop", "steps": 1}
    monkeypatch.setattr(
        "tpaw.pipeline.critic_task.scores_of",
        lambda model, read: np.array([len(ids) for ids in read], dtype=float),
    )
    # So the AUC is that of the length; pairs of like length have equal scores or nearly so.
    monkeypatch.setattr("tpaw.critic.comparisons.LIKE_LENGTH", 0.0)
    with refused("iteration 1", "length", "critic.at_chance", "go_on"):
        self_play(load(critic_settings), tmp_path / "r")
    assert not RunDirectory(tmp_path / "r").checkpoint(1).exists()


def test_responses_without_an_end_leave_nothing_to_compare(critic_settings, model_folder, tmp_path):
    critic_settings["model"]["path"] = str(model_folder)  # random weights
    critic_settings["generate"]["max_new_tokens"] = 2
    with refused("iteration 1", "of 24 records", "generate.max_new_tokens", "critic.heldout"):
        self_play(load(critic_settings), tmp_path / "r")


def test_the_sft_model_with_an_adapter_and_a_head_is_a_critic(
    critic_settings, model_that_ends, tmp_path
):
    shape = {key: critic_settings["critic"].pop(key, None) for key in ("layers", "width")}
    assert shape
    critic_settings["critic"] |= {
        "path": str(model_that_ends), "lora_rank": 4, "team": 2, "at_chance": "go_on",
    }  # fmt: skip
    self_play(load(critic_settings), tmp_path / "r")
    run = RunDirectory(tmp_path / "r")
    folders = [run.iteration(t).critic for t in range(2)]
    adapters = []
    for folder in folders:
        assert not (folder / "model.safetensors").exists()
        assert json.loads((folder / "adapter_config.json").read_text())["r"] == 4
        adapters.append((folder / "adapter_model.safetensors").read_bytes())
    assert adapters[0] != adapters[1]
    count = len(read_responses(run.iteration(1).responses))
    assert np.load(folders[1] / "scores.npy").shape == (2, count)  # both critics judged


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["generate.samples=1"], ["generate.samples", 1, "critic", 2]),
        (["generate.temperature=0"], ["generate.samples", 3, "generate.temperature"]),
        (["method=self_play"], ["critic", "self_play"]),
        (["critic.steps=[5]"], ["critic.steps", 5, 2]),
        (["critic.width=40"], ["critic.width", 40, 32]),
        (["critic.heldout=1"], ["critic.heldout", 1]),
        (["critic.path=here"], ["critic.layers", "critic.path"]),
        (["critic.lora_rank=4"], ["critic.lora_rank", 4, "critic.path"]),
        (["objective.eta=2"], ["objective.eta", 2, "critic", "sft"]),
        (["objective.name=space"], ["objective.name", "space", "critic", "sft"]),
        (["data.chunks=2"], ["data.chunks", 2, "critic"]),
        (
            ["critic.train_by=objective", "objective={name: self_training}"],
            ["objective.name", "self_training", "critic.train_by"],
        ),
    ],
)
def test_what_does_not_fit_is_refused(critic_settings, overrides, parts):
    with refused(*parts):
        RunConfig.load(critic_settings, overrides=["method=critic", *overrides])


@pytest.mark.process
@pytest.mark.usefixtures("forks")
def test_killed_in_every_stage(critic_settings, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(critic_settings | {"method": "critic"}))

    def run(folder, *points):
        out, err = (tmp_path / f"{folder}-{name}.txt" for name in ("out", "err"))
        driver = Forked("kill_driver:main", config, tmp_path / folder, *points, out=out, err=err)
        assert driver.wait(timeout=600) == 0, err.read_text()
        lines = out.read_text().split("\n")[:-1]
        assert lines[-1] == "exit 0", err.read_text()
        return lines[:-1]

    points = [
        "generate:30",
        "step:2",  # the critic's, before its first saved step
        "save:1",  # its saved step is half written
        "saved:1",  # and not yet declared whole
        "step:3",  # after a saved step
        "judge:1",  # the critic is fitted and not yet published
        "step:14",  # the policy's
        "evaluate:1",
        "judge:3",  # of the second iteration
    ]
    assert run("whole") == []
    assert run("killed", *points) == ["killed"] * len(points)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert not list((tmp_path / "killed").rglob("critic-training"))


@pytest.mark.parametrize("train_by", ["sft", "objective"])
def test_plan_measures_it(critic_settings, train_by):
    config = load(critic_settings, {"critic": {"train_by": train_by, "team": 2}})
    costs = measure_costs(config, read_inputs(config), StopSignal())
    step, response = costs.critic
    assert step > 0
    assert response > 0
    assert costs.critic_steps == (12, 8)
    assert (costs.sequence > 0) is (train_by == "objective")
    assert all(seconds > 0 for seconds in costs.steps.values())
    for plan, steps in zip(plan_run(config, N), (12, 8), strict=True):
        seconds = costs.of_iteration(plan, 0)
        assert seconds["critic"] == pytest.approx(step * steps + response * N * SAMPLES)
