"""Algorithm 1, from a configuration to θ_T, on a random model."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from messages import DIFFERENCE, refused
from oracles import oracle
from transformers import AutoModelForCausalLM, AutoTokenizer

import tpaw.pipeline.stages
import tpaw.pipeline.training
import tpaw.training.iteration
from tpaw.config.plan import plan_run
from tpaw.config.schema import RunConfig
from tpaw.data.examples import read_examples
from tpaw.data.token_ids import read_table
from tpaw.errors import NonFiniteError, PolicyMismatchError
from tpaw.evaluation.items import write_items
from tpaw.generation.generator import FakeGenerator, SamplingParams
from tpaw.generation.responses import read_responses
from tpaw.models.fingerprint import fingerprint
from tpaw.scoring.store import LogprobStore, sequence_key
from tpaw.selfplay import self_play
from tpaw.storage.artifacts import read_manifest, write_manifest
from tpaw.storage.run_directory import RunDirectory
from tpaw.training.trainer import TeamTrainer

N = 24


def test_every_checkpoint_is_a_model_of_its_own_that_loads(finished):
    run, _ = finished
    prints = set()
    for i in range(1, 5):
        model = AutoModelForCausalLM.from_pretrained(run.checkpoint(i))
        assert AutoTokenizer.from_pretrained(run.checkpoint(i)).chat_template
        assert all(p.dtype == torch.float32 for p in model.parameters())
        prints.add(read_manifest(run.checkpoint(i))["fingerprint"])
        assert fingerprint(run.checkpoint(i)) in prints
        assert not list(run.checkpoint(i).glob("*.bin"))
    assert len(prints) == 4


def scored_per_iteration(run):
    counts = dict.fromkeys(range(1, 5), 0)
    for manifest in (run.root / "logprobs").glob("*/manifest.json"):
        for shard in json.loads(manifest.read_text())["files"]:
            counts[int(shard["stage"].removeprefix("iteration-"))] += shard["sequences"]
    return counts


def test_six_n_sequences_are_scored_from_the_third_iteration_on_and_not_18_n(finished):
    run, config = finished
    counts = scored_per_iteration(run)
    planned = [p.to_score for p in plan_run(config, N)]
    assert planned == [2 * N, 4 * N, 6 * N, 6 * N]
    # A random model repeats itself at times; equal sequences are scored once.
    for i, most in enumerate(planned, start=1):
        assert 0.9 * most <= counts[i] <= most
    texts = {
        sequence_key((e.prompt_ids, e.target_ids))
        for e in read_examples(run.inputs / "train.parquet")
    }
    assert len(texts) == N


def test_responses_are_one_per_prompt_and_player(finished):
    run, _ = finished
    examples = read_examples(run.inputs / "train.parquet")
    for i in range(1, 5):
        responses = read_responses(run.responses(i))
        assert [r.example_id for r in responses] == [e.id for e in examples]
        for response in responses:
            assert (response.finish_reason == "stop") == (response.token_ids[-1] == 4)
            assert 4 not in response.token_ids[:-1]
            assert len(response.token_ids) <= 12


def test_the_stored_log_probs_are_the_players_own(finished, model_folder):
    run, _ = finished
    examples = read_examples(run.inputs / "train.parquet")
    responses = read_responses(run.responses(2))
    for folder in (model_folder, run.checkpoint(1)):
        model = AutoModelForCausalLM.from_pretrained(folder).double()
        store = LogprobStore(run.logprobs(fingerprint(Path(folder))))
        for example, response in list(zip(examples, responses, strict=True))[:4]:
            sequence = (example.prompt_ids, response.token_ids)
            with torch.no_grad():
                expected = oracle(model, *sequence).item()
            assert store.logps([sequence_key(sequence)])[0] == pytest.approx(expected, abs=1e-4)


def test_each_triple_is_trained_on_with_the_log_probs_of_its_own_under_every_player(
    settings, tmp_path, monkeypatch, model_folder
):
    class Seen(Exception):
        pass

    original = tpaw.pipeline.training.team_trainer

    def second(model, arguments, dataset, inputs, config, objective, start_column):
        if objective.lambda_ == 0.2:
            raise Seen(dataset)
        assert start_column == 0
        return original(model, arguments, dataset, inputs, config, objective, start_column)

    settings["objective"] = {"lambda": [0.1, 0.2, 0.1]}
    monkeypatch.setattr(tpaw.pipeline.training, "team_trainer", second)
    with pytest.raises(Seen) as seen:
        self_play(RunConfig.load(settings), tmp_path / "r")
    rows, run = seen.value.args[0], RunDirectory(tmp_path / "r")
    assert [triple.opponent for triple in rows.triples] == [1] * N + [0] * N
    answers = {opponent: read_responses(run.responses(opponent + 1)) for opponent in (0, 1)}
    # Newest first: θ_1, then θ_0.
    players = [
        AutoModelForCausalLM.from_pretrained(folder).double()
        for folder in (run.checkpoint(1), model_folder)
    ]
    for n in (0, 5, N, N + 5):
        triple, row = rows.triples[n], rows[n]
        assert row["generated_ids"].tolist() == (answers[triple.opponent][n % N].token_ids.tolist())
        for kind in ("target", "generated"):
            with torch.no_grad():
                expected = [
                    oracle(model, row["prompt_ids"], row[f"{kind}_ids"]).item() for model in players
                ]
            assert row[f"player_{kind}_logps"].tolist() == pytest.approx(expected, abs=1e-4)
            assert abs(expected[0] - expected[1]) > 0.01


def test_the_log_starts_as_the_method_says_and_has_every_metric(finished):
    run, config = finished
    for i, plan in enumerate(plan_run(config, N), start=1):
        lines = [json.loads(line) for line in run.training_log(i).read_text().splitlines()]
        assert lines[-1]["step"] == plan.optimizer_steps
        players = min(i, 3)
        for name in (
            "rewards/target",
            "rewards/generated",
            "rewards/margins",
            "rewards/accuracies",
        ):
            for line in lines:
                mean = np.mean([line[f"{name}/player_{k}"] for k in range(players)])
                assert line[name] == pytest.approx(mean, abs=1e-9)
        assert sum(lines[0][f"weights/player_{k}"] for k in range(players)) == pytest.approx(1)
        assert f"weights/player_{players}" not in lines[0]
        # θ is the newest player before the first update: rewards of exactly 0, weights of η.
        assert lines[0]["rewards/target/player_0"] == 0
        assert lines[0]["weights/target"] >= 1 / players
        for name in (
            "loss",
            "grad_norm",
            "learning_rate",
            "share/identical",
            "share/truncated",
            "weights/target",
        ):
            assert math.isfinite(lines[0][name])
    first = json.loads(run.training_log(1).read_text().splitlines()[0])
    assert first["weights/target"] == 1.0
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)


def test_evaluation_keeps_every_item_and_the_summary_adds_up(finished):
    run, _ = finished
    summary = json.loads(run.summary_file.read_text())
    assert summary["iterations_done"] == 4
    for i, entry in enumerate(summary["players"]):
        results = json.loads((run.evaluation(i) / "results.json").read_text())
        assert entry["evaluation"] == results
        items = [
            json.loads(x)
            for x in (run.evaluation(i) / "exact_match.jsonl").read_text().splitlines()
        ]
        assert len(items) == 10 == results["exact_match"]["items"]
        assert results["exact_match"]["correct"] == sum(item["correct"] for item in items)
        logps = [
            json.loads(x) for x in (run.evaluation(i) / "logps.jsonl").read_text().splitlines()
        ]
        assert results["logps"]["target_logp"] == pytest.approx(
            np.mean([x["target_logp"] for x in logps])
        )
        assert set(entry["seconds"]) == (
            {"evaluate"} if i == 0 else {"generate", "score", "train", "evaluate"}
        )
    assert summary["players"][0]["evaluation"]["logps"]["margin"] == 0.0


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_held_out_log_probs_are_the_players_own_and_the_margin_is_against_the_start(
    finished, model_folder
):
    run, _ = finished
    heldout = read_examples(run.inputs / "heldout.parquet")
    answers = read_table(run.evaluation(0) / "initial_answers.parquet")["token_ids"]
    gaps = {}
    for i, folder in ((0, model_folder), (2, run.checkpoint(2))):
        model = AutoModelForCausalLM.from_pretrained(folder).double()
        items = read_lines(run.evaluation(i) / "logps.jsonl")
        with torch.no_grad():
            targets = [oracle(model, e.prompt_ids, e.target_ids).item() for e in heldout]
            initial = [
                oracle(model, e.prompt_ids, answer).item()
                for e, answer in zip(heldout, answers, strict=True)
            ]
        assert [x["target_logp"] for x in items] == pytest.approx(targets, abs=1e-4)
        assert [x["initial_answer_logp"] for x in items] == pytest.approx(initial, abs=1e-4)
        gaps[i] = np.mean(targets) - np.mean(initial)
    results = json.loads((run.evaluation(2) / "results.json").read_text())
    assert results["logps"]["margin"] == pytest.approx(gaps[2] - gaps[0], abs=1e-4)
    assert abs(gaps[2] - gaps[0]) > 0.01


def test_exact_match_is_compared_with_the_starts_own_outcomes(finished, tmp_path):
    run, config = finished
    shutil.copytree(run.root, tmp_path / "run")
    run = RunDirectory(tmp_path / "run")
    # A start that got everything right, which a random model does not.
    start = run.evaluation(0) / "exact_match.jsonl"
    write_items(start, [item | {"correct": True} for item in read_lines(start)])
    meta = read_manifest(run.evaluation(0))
    meta.pop("files")
    write_manifest(run.evaluation(0), meta)
    shutil.rmtree(run.evaluation(4))
    self_play(config, run.root)
    found = json.loads((run.evaluation(4) / "results.json").read_text())["exact_match"]
    assert found["correct"] == 0
    assert found["versus_start"] == {
        "only_first": 10,
        "only_second": 0,
        "p_value": pytest.approx(2 / 2**10),
    }


def test_every_setting_reaches_the_generator(settings, tmp_path, monkeypatch):
    calls = []

    class Recording(FakeGenerator):
        def __init__(self, model, tokens_per_batch):
            super().__init__(lambda prompt, seed: [10, 11, 4])
            assert tokens_per_batch == 256
            self.dtype = model.dtype

        def generate(self, prompts, sampling, seed, on_done, first=0):
            calls.append((sampling, seed, self.dtype))
            return super().generate(prompts, sampling, seed, on_done)

    monkeypatch.setattr(tpaw.generation.hf, "HFGenerator", Recording)
    settings |= {"iterations": 1, "precision": "bf16", "deterministic": False}
    settings["generate"] |= {"temperature": 0.7, "top_p": 0.8, "top_k": 9}
    settings["evaluate"] |= {"max_new_tokens": 6}
    for seed in (5, 6):
        self_play(RunConfig.load(settings | {"seed": seed}), tmp_path / str(seed))
    # θ_0 answers and solves the held-out rows, three shards of answers, θ_1 solves.
    sampled, greedy = [calls[i] for i in (0, 2, 3, 4)], [calls[i] for i in (1, 5)]
    expected = SamplingParams(0.7, 0.8, 9, 12, 128, (4,))
    assert all(sampling == expected for sampling, _, _ in sampled)
    for sampling, _, _ in greedy:
        assert (sampling.temperature, sampling.max_new_tokens) == (0, 6)
        assert sampling.stop_token_ids == (4,)
    assert {dtype for _, _, dtype in calls} == {torch.bfloat16}
    assert len({calls[i + k][1] for i in (0, 6) for k in (0, 2, 3, 4)}) == 8
    responses = read_responses(RunDirectory(tmp_path / "5").responses(1))
    assert all("<|end|>" not in response.text for response in responses)


def test_held_out_prompts_are_answered_at_other_temperatures_too(
    settings, finished, tmp_path, monkeypatch
):
    """The answers are right at temperature 0.5 alone, and none is stored for another one."""
    heldout = read_examples(finished[0].inputs / "heldout.parquet")
    right = {tuple(e.prompt_ids.tolist()): e.target_ids for e in heldout}
    calls = []

    class RightAtOneTemperature(FakeGenerator):
        def __init__(self, model, tokens_per_batch):
            super().__init__(lambda prompt, seed: [10, 11, 4])

        def generate(self, prompts, sampling, seed, on_done, first=0):
            calls.append((sampling, seed))
            found = super().generate(prompts, sampling, seed, on_done)
            if sampling.temperature != 0.5:
                return found
            targets = [right[tuple(prompt.tolist())] for prompt in prompts]
            return [c._replace(token_ids=ids) for c, ids in zip(found, targets, strict=True)]

    monkeypatch.setattr(tpaw.generation.hf, "HFGenerator", RightAtOneTemperature)
    settings["generate"] |= {"top_p": 0.8, "top_k": 9}
    settings["evaluate"] |= {"temperatures": [1.0, 0.5], "max_new_tokens": 6}
    settings |= {"iterations": 1, "seed": 7}
    self_play(RunConfig.load(settings), tmp_path / "r")
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    for i, entry in enumerate(summary["players"]):
        found = entry["evaluation"]
        assert found["exact_match"]["correct"] == 0
        sampled = found["sampled_exact_match"]
        assert [(t, e["correct"], e["items"]) for t, e in sampled.items()] == [
            ("1", 0, 10),
            ("0.5", 10, 10),
        ]
        # Against θ_0 at the same temperature.
        assert sampled["0.5"]["versus_start"]["p_value"] == 1
        folder = RunDirectory(tmp_path / "r").evaluation(i)
        items = read_lines(folder / "exact_match_at_0.5.jsonl")
        assert [item["id"] for item in items] == [e.id for e in heldout]
        assert all(item["correct"] for item in items)
    at = {
        t: [(s, seed) for s, seed in calls if s.temperature == t and s.top_k == 9] for t in (1, 0.5)
    }
    assert [(s.top_p, s.max_new_tokens, seed) for s, seed in at[0.5]] == [(0.8, 6, 9)] * 2
    # The same random numbers; none that a training prompt or θ_0's first answers have.
    assert [seed for s, seed in at[1] if s.max_new_tokens == 6] == [9, 9]
    assert 9 not in {seed for s, seed in calls if s.max_new_tokens == 12}


@pytest.mark.parametrize("wanted", [True, False])
def test_kernels_that_vary_are_refused_where_that_is_asked(settings, tmp_path, monkeypatch, wanted):
    seen, original = set(), TeamTrainer.compute_loss

    def look(*args, **kwargs):
        seen.add(torch.are_deterministic_algorithms_enabled())
        return original(*args, **kwargs)

    monkeypatch.setattr(TeamTrainer, "compute_loss", look)
    settings |= {"iterations": 1, "deterministic": wanted}
    self_play(RunConfig.load(settings), tmp_path / "r")
    assert seen == {wanted}


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_library_call_leaves_the_callers_process_as_it_was(
    settings, tmp_path, monkeypatch, deterministic
):
    """Its torch flags, random states and working directory."""
    monkeypatch.chdir(tmp_path)
    settings |= {"iterations": 1, "deterministic": deterministic}
    torch.use_deterministic_algorithms(not deterministic, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    random.seed(1)
    np.random.seed(2)  # noqa: NPY002
    torch.manual_seed(3)

    def state():
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
            torch.get_float32_matmul_precision(),
            torch.get_num_threads(),
            random.getstate(),
            np.random.get_state()[1].tolist(),  # noqa: NPY002
            torch.get_rng_state().tolist(),
            os.getcwd(),
            os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        )

    try:
        before = state()
        self_play(RunConfig.load(settings), tmp_path / "r")
        assert state() == before
    finally:
        torch.use_deterministic_algorithms(False)


def test_training_raises_the_targets_of_the_training_rows(finished, model_folder):
    run, _ = finished
    examples = read_examples(run.inputs / "train.parquet")[:8]

    def mean_logp(folder):
        model = AutoModelForCausalLM.from_pretrained(folder).double()
        with torch.no_grad():
            return np.mean([oracle(model, e.prompt_ids, e.target_ids).item() for e in examples])

    assert mean_logp(run.checkpoint(4)) > mean_logp(run.checkpoint(1)) > mean_logp(model_folder)


def test_a_policy_that_is_not_its_newest_player_stops_the_run(settings, tmp_path, monkeypatch):
    original = LogprobStore.logps
    monkeypatch.setattr(LogprobStore, "logps", lambda store, keys: original(store, keys) - 3.0)
    with refused(error=PolicyMismatchError, hide=DIFFERENCE):
        self_play(RunConfig.load(settings), tmp_path / "r")
    assert not (tmp_path / "r" / "iterations" / "1" / "checkpoint").exists()


def test_variants_run(settings, tmp_path):
    from tpaw.config.schema import RunConfig

    for variant in ("spin", "no_team"):
        tree = RunConfig.load("starter", variant).model_dump(by_alias=True)
        config = RunConfig.load(
            settings
            | {"team": tree["team"], "objective": tree["objective"], "iterations": 2}
            | {"evaluate": {}}  # nothing is counted there
        )
        self_play(config, tmp_path / variant)
        counts = scored_per_iteration(RunDirectory(tmp_path / variant))
        # spin: y, g1 and g0 under θ_1 alone; no_team: y and g1 under θ_1.
        assert counts[2] <= (3 * N if variant == "spin" else 2 * N)


def test_whoever_loads_a_checkpoint_stops_where_the_self_play_did(settings, tmp_path):
    settings.pop("evaluate")
    settings["model"]["eos_token"] = "<|bos|>"
    player = self_play(RunConfig.load(settings | {"iterations": 1}), tmp_path / "r")
    model = AutoModelForCausalLM.from_pretrained(player.path)
    assert model.generation_config.eos_token_id == [5, 4]
    assert AutoTokenizer.from_pretrained(player.path).eos_token == "<|bos|>"


def test_without_held_out_rows_nothing_is_evaluated(settings, tmp_path):
    settings.pop("evaluate")
    settings["iterations"] = 1
    self_play(RunConfig.load(settings), tmp_path / "r")
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert "evaluation" not in summary["players"][1]
    assert "training" in summary["players"][1]


def test_a_checker_of_the_users_decides_what_is_right(settings, tmp_path, monkeypatch):
    """Several answers at a temperature, and self-training on the right ones."""
    (tmp_path / "of_mine").mkdir()
    (tmp_path / "of_mine" / "even.py").write_text(
        "def is_right(prompt, target, response):\n    return len(response) % 2 == 0\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    settings["evaluate"] |= {"temperatures": [1.0], "samples": 3}
    settings |= {"checker": "of_mine.even", "iterations": 1, "objective": {"name": "self_training"}}
    self_play(RunConfig.load(settings), tmp_path / "r")
    run = RunDirectory(tmp_path / "r")
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    for i, entry in enumerate(summary["players"]):
        greedy = read_lines(run.evaluation(i) / "exact_match.jsonl")
        assert all(item["correct"] == (len(item["completion"]) % 2 == 0) for item in greedy)
        assert "no_answer" not in entry["evaluation"]["exact_match"]
        sampled = read_lines(run.evaluation(i) / "exact_match_at_1.jsonl")
        by_id = {}
        for item in sampled:
            by_id.setdefault(item["id"], []).append(item["completion"])
        assert list(by_id) == [item["id"] for item in greedy]
        assert {len(texts) for texts in by_id.values()} == {3}
        right = [len({t for t in texts if len(t) % 2 == 0}) for texts in by_id.values()]
        found = entry["evaluation"]["sampled_exact_match"]["1"]
        assert found["distinct_correct"] == pytest.approx(sum(right) / 10)
    responses = read_responses(run.responses(1))
    even = sum(len(response.text) % 2 == 0 for response in responses)
    assert summary["players"][1]["kept"] == {"triples": even, "responses": len(responses)}


def test_exact_match_can_be_switched_off(settings, tmp_path):
    settings["evaluate"]["exact_match"] = False
    self_play(RunConfig.load(settings | {"iterations": 1}), tmp_path / "r")
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert "exact_match" not in summary["players"][1]["evaluation"]


def test_data_without_answers_is_evaluated_by_its_log_probs(settings, tmp_path, heldout_file):
    rows = [json.loads(line) for line in heldout_file.read_text().splitlines()]
    free = tmp_path / "free.jsonl"
    free.write_text(
        "".join(
            json.dumps({"question": r["question"], "answer": "It depends."}) + "\n" for r in rows
        )
    )
    settings |= {"evaluate": {"data": {"path": str(free)}}, "iterations": 1}
    self_play(RunConfig.load(settings), tmp_path / "r")
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert set(summary["players"][1]["evaluation"]) >= {"logps"}
    assert "exact_match" not in summary["players"][1]["evaluation"]


def test_bf16_and_activation_checkpointing_run_through(settings, tmp_path):
    settings |= {"precision": "bf16", "iterations": 2, "deterministic": False}
    settings["train"] |= {"activation_checkpointing": True}
    self_play(RunConfig.load(settings), tmp_path / "r")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "r" / "iterations" / "2" / "checkpoint")
    assert next(model.parameters()).dtype == torch.float32


@pytest.mark.process
def test_algorithm_1_imports_no_torch_and_fits_one_screen():
    imports = "import sys, tpaw.selfplay, tpaw.cli.main, tpaw.config.plan, tpaw.report.status"
    subprocess.run(
        [sys.executable, "-c", f"{imports}; assert 'torch' not in sys.modules"], check=True
    )
    source = Path(tpaw.selfplay.__file__).read_text()
    assert len(source.splitlines()) <= 60
    loop = source.partition("def algorithm_1")[2].partition("\ndef ")[0]
    assert len(loop.splitlines()) <= 25


def test_a_start_with_a_broken_weight_is_an_error_and_not_a_result(settings, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(settings["model"]["path"])
    with torch.no_grad():
        model.model.norm.weight[5] = torch.nan
    folder = shutil.copytree(settings["model"]["path"], tmp_path / "broken")
    model.save_pretrained(folder)
    settings["model"] = {"path": str(folder)}
    with refused(folder, "model.norm.weight", error=NonFiniteError):
        self_play(RunConfig.load(settings), tmp_path / "run")
    published = {path.parent.name for path in (tmp_path / "run").rglob("*.parquet")}
    assert published == {"inputs"}


def test_sampling_defaults_of_the_model_are_not_handed_on(settings, tmp_path, model_folder):
    """Llama-2-chat's cannot even be saved: a temperature without do_sample."""
    shutil.copytree(model_folder, tmp_path / "m")
    published = {
        "temperature": 0.6,
        "top_p": 0.9,
        "repetition_penalty": 1.3,
        "eos_token_id": [4, 3],
    }
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps(published))
    settings |= {"model": {"path": str(tmp_path / "m")}, "iterations": 1}
    self_play(RunConfig.load(settings), tmp_path / "r")
    folder = tmp_path / "r" / "iterations" / "1" / "checkpoint"
    saved = json.loads((folder / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [4, 3]
    assert not {"temperature", "top_p", "repetition_penalty"} & saved.keys()
