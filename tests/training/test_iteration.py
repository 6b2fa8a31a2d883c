"""One iteration's training: settings, saved steps, going on, stopping."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from messages import refused

import tpaw.pipeline.training
import tpaw.training.callbacks
import tpaw.training.iteration
from tpaw.config.schema import RunConfig
from tpaw.data.examples import Example
from tpaw.data.token_ids import token_ids
from tpaw.errors import Interrupted
from tpaw.generation.responses import Response
from tpaw.objectives.tpaw import TeamObjective
from tpaw.runtime.interrupt import StopSignal
from tpaw.selfplay import self_play
from tpaw.storage.artifacts import is_published, read_manifest, write_manifest
from tpaw.storage.run_directory import RunDirectory
from tpaw.training.callbacks import Recorder, _json_line
from tpaw.training.iteration import team_objective, team_trainer, train_iteration
from tpaw.training.trainer import TeamTrainer
from tpaw.training.triples import TripleDataset, Triples

NO_DEFAULTS = {
    "iterations": 2,
    "precision": "bf16",
    "seed": 3,
    "objective": {
        "lambda": [0.2, 0.3],
        "eta": 2.0,
        "gamma": 0.7,
        "min_player_weight": 0.05,
        "target_weight": "one",
        "player_weight": "uniform",
    },
    "train": {
        "learning_rate": [1e-3, 1e-4],
        "epochs": [1, 3],
        "batch_size": 8,
        "tokens_per_row": 50,
        "group_by_prompt": True,
        "optimizer": "sgd",
        "schedule": "constant_with_warmup",
        "warmup": 0.25,
        "activation_checkpointing": True,
        "log_every": 7,
        "save_every": 9,
        "training_arguments": {"weight_decay": 0.5},
    },
}


def arguments_of(config, t, folder, monkeypatch):
    """What `train_iteration` gives to the trainer."""

    class Seen(Exception):
        pass

    def trainer(**arguments):
        raise Seen(arguments)

    inputs = SimpleNamespace(
        stop_ids=(4,), tokenizer=SimpleNamespace(pad_token_id=0, bos_token_id=None)
    )
    objective = team_objective(config.objective, t)

    def build(policy, arguments):
        return team_trainer(policy, arguments, None, inputs, config, objective, 1)

    monkeypatch.setattr(tpaw.training.iteration, "TeamTrainer", trainer)
    with pytest.raises(Seen) as seen:
        train_iteration(
            SimpleNamespace(),
            build,
            inputs,
            config,
            RunDirectory(folder).iteration(t),
            publish_to=folder,
            advance=lambda count, note="": None,
            stop=StopSignal(),
        )
    return seen.value.args[0]


def test_rows_hold_each_triple_with_its_own_references():
    example = Example("0-x", token_ids([1, 2]), token_ids([3]), "p", "t")
    responses = [
        Response("0-x", token_ids([4]), "r", "stop"),
        Response("0-x", token_ids([5]), "r", "length"),
    ]
    target, generated = np.array([[-1.0, -2.0], [-3.0, -4.0]]), np.array([[-5.0, -6.0], [-7, -8]])
    triples = Triples([example], [(1, responses[:1]), (0, responses[1:])])
    rows = TripleDataset(triples, target, generated)
    found = [rows[i] for i in range(len(rows))]
    assert [row["is_truncated"] for row in found] == [False, True]
    assert [row["generated_ids"].tolist() for row in found] == [[4], [5]]
    assert [row["target_ids"].tolist() for row in found] == [[3], [3]]
    assert [row["player_target_logps"].tolist() for row in found] == target.tolist()
    assert [row["player_generated_logps"].tolist() for row in found] == generated.tolist()


def test_every_setting_reaches_the_trainer(settings, tmp_path, monkeypatch):
    config = RunConfig.load(settings | NO_DEFAULTS)
    found = arguments_of(config, 1, tmp_path, monkeypatch)
    objective = dict(NO_DEFAULTS["objective"])
    objective["lambda_"] = objective.pop("lambda")[1]
    assert found["objective"] == TeamObjective(**objective)
    assert found["start_column"] == 1
    assert (found["tokens_per_row"], found["group_by_prompt"]) == (50, True)
    expected = {
        "learning_rate": 1e-4,
        "num_train_epochs": 3,
        "per_device_train_batch_size": 8,
        "optim": "sgd",
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 0.25,
        "activation_checkpointing": True,
        "bf16": True,
        "logging_steps": 7,
        "save_steps": 9,
        "weight_decay": 0.5,
        "run_name": "theta_2",
    }
    assert {name: getattr(found["args"], name) for name in expected} == expected


def test_every_iteration_of_every_seed_shuffles_otherwise(settings, tmp_path, monkeypatch):
    seeds = {
        arguments_of(RunConfig.load(settings | {"seed": seed}), t, tmp_path, monkeypatch)[
            "args"
        ].seed
        for seed in (0, 1)
        for t in (0, 1)
    }
    assert len(seeds) == 4


def test_the_newest_saved_step_that_is_whole_counts(tmp_path):
    run = RunDirectory(tmp_path)
    assert run.last_saved_step(1) is None
    for step in (8, 9, 10, 11):
        (run.training(1) / f"checkpoint-{step}").mkdir(parents=True)
    for step in (9, 10, 8):
        write_manifest(run.training(1) / f"checkpoint-{step}", {"seconds": 1.0})
    assert run.last_saved_step(1).name == "checkpoint-10"


def test_an_older_saved_step_goes_only_when_the_newer_is_whole(tmp_path, monkeypatch):
    run = RunDirectory(tmp_path)
    folder = run.training(1)
    recorder = Recorder(folder, tmp_path / "log", lambda count, note: None, StopSignal(), 0.0)
    for step in (2, 4):
        (folder / f"checkpoint-{step}").mkdir(parents=True)
    recorder_state = SimpleNamespace(global_step=4)
    write_manifest(folder / "checkpoint-2", {"seconds": 1.0})

    def die(folder, meta):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tpaw.training.callbacks, "write_manifest", die)
        with pytest.raises(KeyboardInterrupt):
            recorder.on_save(None, recorder_state, None)
    assert run.last_saved_step(1).name == "checkpoint-2"
    recorder.on_save(None, recorder_state, None)
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-4"]


def stopped_in_step(number, config, folder, monkeypatch):
    """A run that is asked to stop while the first iteration is in step `number` of 3."""
    stop, original, steps = StopSignal(), tpaw.pipeline.training.train_iteration, 0

    def stopping(*args, advance, **kwargs):
        def step(count, note=""):
            nonlocal steps
            steps += count
            advance(count, note)
            # Steps are counted after the look at the signal, so this one is seen in the next.
            if steps == number - 1:
                stop.signal_number = 15

        return original(*args, advance=step, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(tpaw.pipeline.training, "train_iteration", stopping)
        with pytest.raises(Interrupted):
            self_play(config, folder, stop)
    return RunDirectory(folder)


def test_what_is_not_finite_is_still_there_to_see_in_the_log():
    line = _json_line({"loss": 0.5, "grad_norm": math.nan, "margin": -math.inf, "step": 3})

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    found = json.loads(line, parse_constant=refuse)
    assert found == {"loss": 0.5, "grad_norm": "nan", "margin": "-inf", "step": 3}


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_training_goes_on_from_the_saved_step_and_logs_each_step_once(
    settings, tmp_path, monkeypatch
):
    config = RunConfig.load(settings | {"iterations": 1})
    run = stopped_in_step(2, config, tmp_path / "r", monkeypatch)
    saved = run.last_saved_step(1)
    assert saved.name == "checkpoint-2"
    before = run.training_log(1).read_bytes()
    # As after a kill: a step was logged that no saved step knows of, and training took long.
    with run.training_log(1).open("a") as file:
        file.write(json.dumps({"step": 3, "loss": 9.0}) + "\n")
    manifest = read_manifest(saved)
    (saved / "manifest.json").write_text(json.dumps(manifest | {"seconds": 1000.0}))

    micro_batches, original = [], TeamTrainer.compute_loss

    def counting(*args, **kwargs):
        micro_batches.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(TeamTrainer, "compute_loss", counting)
    self_play(config, tmp_path / "r")
    assert len(micro_batches) == 2  # the third step's
    lines = lines_of(run.training_log(1))
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert run.training_log(1).read_bytes().startswith(before)
    assert lines[2]["loss"] != 9.0
    assert 1000 < read_manifest(run.checkpoint(1))["seconds"] < 1100


def test_a_step_that_fsdp2_saved_is_not_loaded_by_one_process(settings, tmp_path, monkeypatch):
    config = RunConfig.load(settings | {"iterations": 1})
    run = stopped_in_step(2, config, tmp_path / "r", monkeypatch)
    saved = run.last_saved_step(1)
    (saved / "pytorch_model_fsdp_0").mkdir()
    (saved / "pytorch_model_fsdp_0" / "__0_0.distcp").write_bytes(b"weights")
    with refused(saved, "fsdp2", "--restart-iteration 1"):
        self_play(config, tmp_path / "r")
    assert saved.is_dir()


def test_a_stop_in_the_last_step_does_not_cost_the_training(settings, tmp_path, monkeypatch):
    config = RunConfig.load(settings | {"iterations": 1})
    run = stopped_in_step(3, config, tmp_path / "r", monkeypatch)
    assert is_published(run.checkpoint(1))
