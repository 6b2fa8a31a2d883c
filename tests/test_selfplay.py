"""Algorithm 1, from a configuration to θ_T, on a random model."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_logprobs import oracle
from transformers import AutoModelForCausalLM, AutoTokenizer

import tpaw.stages
from tpaw.artifacts import read_manifest
from tpaw.config_file import validate
from tpaw.data import read_examples
from tpaw.errors import ArtifactError, PolicyMismatchError
from tpaw.generation.responses import read_responses
from tpaw.logprob_store import LogprobStore, sequence_key
from tpaw.model import fingerprint
from tpaw.plan import plan_run
from tpaw.rundir import RunDirectory
from tpaw.selfplay import self_play

N = 24


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model_folder, data_file, heldout_file):
    """A run of four iterations, and its configuration."""
    config = validate(
        {
            "model": {"path": str(model_folder)},
            "data": {"path": str(data_file)},
            "max_length": 128,
            "generate": {"max_new_tokens": 12, "batch_size": 8, "shard_size": 16},
            "objective": {"lambda": [0.1, 0.1, 0.1, 5.0]},
            "train": {
                "learning_rate": 1e-3,
                "epochs": [2, 1, 1, 1],
                "batch_size": 8,
                "micro_batch_size": 4,
                "log_every": 2,
            },
            "evaluate": {"data": {"path": str(heldout_file)}},
            "precision": "fp32",
            "device": "cpu",
        }
    )
    folder = tmp_path_factory.mktemp("runs") / "run"
    last = self_play(config, folder)
    assert last.index == 4
    return RunDirectory(folder), config


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
        # θ is the newest player before the first update.
        assert lines[0]["rewards/target/player_0"] == pytest.approx(0, abs=1e-4)
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


def test_training_raises_the_targets_of_the_training_rows(finished, model_folder):
    run, _ = finished
    examples = read_examples(run.inputs / "train.parquet")[:8]

    def mean_logp(folder):
        model = AutoModelForCausalLM.from_pretrained(folder).double()
        with torch.no_grad():
            return np.mean([oracle(model, e.prompt_ids, e.target_ids).item() for e in examples])

    assert mean_logp(run.checkpoint(4)) > mean_logp(run.checkpoint(1)) > mean_logp(model_folder)


def test_a_finished_run_comes_back_at_once_from_anywhere(finished, tmp_path, monkeypatch):
    run, config = finished
    moved = tmp_path / "elsewhere" / "run"
    shutil.copytree(run.root, moved)

    def load_model(*args, **kwargs):
        raise AssertionError("a finished run needs no model")

    monkeypatch.setattr(tpaw.stages, "load_model", load_model)
    before = {p: p.read_bytes() for p in moved.rglob("*.safetensors")}
    assert self_play(config, moved).path == str(moved / "iterations" / "4" / "checkpoint")
    assert before == {p: p.read_bytes() for p in moved.rglob("*.safetensors")}
    private = str(run.root).encode()
    for path in moved.rglob("*"):
        if path.is_file():
            assert private not in path.read_bytes(), f"{path} names the run's own folder"


@pytest.mark.parametrize(
    "name",
    [
        "inputs/train.parquet",
        "iterations/1/responses/shard-00001.parquet",
        "iterations/2/checkpoint/model.safetensors",
        "iterations/3/evaluation/exact_match.jsonl",
        "logprobs/*/iteration-1-00000.parquet",
    ],
)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_artifact_is_named_and_refused_and_not_redone(finished, tmp_path, name, damage):
    run, config = finished
    shutil.copytree(run.root, tmp_path / "run")
    path = next((tmp_path / "run").glob(name))
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "truncate":
        path.write_bytes(content[:-1])
    else:
        path.unlink()
    damaged = path.read_bytes() if path.exists() else None
    with pytest.raises(ArtifactError, match=path.name):
        self_play(config, tmp_path / "run")
    assert (path.read_bytes() if path.exists() else None) == damaged


def test_a_saved_step_that_is_damaged_is_refused_too(settings, tmp_path):
    from tpaw.errors import Interrupted
    from tpaw.interrupt import StopSignal

    config, stop = validate(settings), StopSignal()

    original = tpaw.stages.train_iteration

    def stopping(*args, on_step, **kwargs):
        def step(count, note):
            on_step(count, note)
            stop.signal_number = 15

        return original(*args, on_step=step, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tpaw.stages, "train_iteration", stopping)
        with pytest.raises(Interrupted) as caught:
            self_play(config, tmp_path / "r", stop)
    assert caught.value.exit_code == 143
    saved = tmp_path / "r" / "iterations" / "1" / "training" / "checkpoint-1"
    stop.signal_number = None
    state = saved / "optimizer.pt"
    content = bytearray(state.read_bytes())
    content[100] ^= 1
    state.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"checkpoint-1/optimizer.pt: damaged"):
        self_play(config, tmp_path / "r", stop)


def test_a_policy_that_is_not_its_newest_player_stops_the_run(settings, tmp_path, monkeypatch):
    original = tpaw.stages.Stages._train

    def other_weights(self, policy, triples, team, t, folder):
        store = self._store(team.main_players[0])
        store._logps = {key: value - 3.0 for key, value in store._logps.items()}
        return original(self, policy, triples, team, t, folder)

    monkeypatch.setattr(tpaw.stages.Stages, "_train", other_weights)
    with pytest.raises(PolicyMismatchError, match="before the first update"):
        self_play(validate(settings), tmp_path / "r")
    assert not (tmp_path / "r" / "iterations" / "1" / "checkpoint").exists()


def test_variants_run(settings, tmp_path):
    from tpaw.config_file import load_config

    for variant in ("spin", "no_team"):
        tree = load_config(["starter", variant]).model_dump(by_alias=True)
        config = validate(
            settings | {"team": tree["team"], "objective": tree["objective"], "iterations": 2}
        )
        self_play(config, tmp_path / variant)
        counts = scored_per_iteration(RunDirectory(tmp_path / variant))
        # spin: y, g1 and g0 under θ_1 alone; no_team: y and g1 under θ_1.
        assert counts[2] <= (3 * N if variant == "spin" else 2 * N)


def test_without_held_out_rows_nothing_is_evaluated(settings, tmp_path):
    settings.pop("evaluate")
    settings["iterations"] = 1
    self_play(validate(settings), tmp_path / "r")
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert "evaluation" not in summary["players"][1]
    assert "training" in summary["players"][1]


def test_data_without_answers_is_evaluated_by_its_log_probs(settings, tmp_path, heldout_file):
    rows = [json.loads(line) for line in heldout_file.read_text().splitlines()]
    free = tmp_path / "free.jsonl"
    free.write_text(
        "".join(
            json.dumps({"question": r["question"], "answer": "It depends."}) + "\n" for r in rows
        )
    )
    settings |= {"evaluate": {"data": {"path": str(free)}}, "iterations": 1}
    self_play(validate(settings), tmp_path / "r")
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert set(summary["players"][1]["evaluation"]) >= {"logps"}
    assert "exact_match" not in summary["players"][1]["evaluation"]


def test_bf16_and_activation_checkpointing_run_through(settings, tmp_path):
    settings |= {"precision": "bf16", "iterations": 2, "deterministic": False}
    settings["train"] |= {"activation_checkpointing": True}
    self_play(validate(settings), tmp_path / "r")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "r" / "iterations" / "2" / "checkpoint")
    assert next(model.parameters()).dtype == torch.float32


def test_algorithm_1_imports_no_torch_and_fits_one_screen():
    imports = "import sys, tpaw.selfplay, tpaw.cli, tpaw.plan, tpaw.report.status"
    subprocess.run(
        [sys.executable, "-c", f"{imports}; assert 'torch' not in sys.modules"], check=True
    )
    source = Path(tpaw.selfplay.__file__).read_text()
    assert len(source.splitlines()) <= 60
    loop = source.partition("def algorithm_1")[2].partition("\ndef ")[0]
    assert len(loop.splitlines()) <= 25
