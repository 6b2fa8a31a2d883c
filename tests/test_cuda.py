"""What runs on a GPU alone, on a pretended GPU: wrong devices and dtypes show on a CPU.

Each test calls a function of cuda_driver.py, in a process of its own. No GPU takes part: what CUDA
kernels compute, memory and speed are not tested here.
"""

from __future__ import annotations

import json

import pytest
import torch
from builders import PAPER, SAMPLING, make_model, save_adapter, save_model, score, team_rows
from fork_server import Forked
from oracles import ragged
from transformers import TrainingArguments

from tpaw.config.schema import AdapterConfig
from tpaw.generation.hf import HFGenerator
from tpaw.models.adapters import AdaptedBase
from tpaw.objectives.tpaw import TeamObjective
from tpaw.training.trainer import TeamTrainer

pytestmark = [pytest.mark.process, pytest.mark.cpu, pytest.mark.usefixtures("forks")]

ARGUMENTS = {
    "per_device_train_batch_size": 4,
    "num_train_epochs": 1,
    "learning_rate": 1e-4,
    "optim": "rmsprop",
    "lr_scheduler_type": "constant",
    "max_grad_norm": 1.0,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
    "seed": 1,
}


def on_gpu(name, folder, *arguments):
    """Call a function of the driver; returns what it printed."""
    process = Forked("cuda_driver:main", name, *arguments, out=folder / f"{name}.txt")
    code = process.wait()
    printed = process.out.read_text()
    assert code == 0, printed
    return printed


@pytest.mark.parametrize(
    "name", ["logprobs", "head", "attention", "scoring", "top_p", "gpus", "freed"]
)
def test_on_a_pretended_gpu(name, tmp_path):
    on_gpu(name, tmp_path)


def steps_on_cpu(policy, folder):
    """Train a policy here; returns how, its losses, and the change of what it trains."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    start = torch.cat([p.detach().flatten().clone() for p in trained])
    trainer = TeamTrainer(
        model=policy,
        args=TrainingArguments(str(folder / "cpu"), **ARGUMENTS),
        train_dataset=team_rows(6, 2),
        processing_class=None,
        objective=TeamObjective(**PAPER),
        tokens_per_row=80,
    )
    trainer.train()
    moved = torch.cat([p.detach().flatten() for p in trained]) - start
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return {"arguments": ARGUMENTS, "losses": losses, "moved": moved.tolist()}


def test_training_takes_the_steps_of_a_cpu(tmp_path):
    known = steps_on_cpu(make_model(seed=1), tmp_path)
    (tmp_path / "cpu.json").write_text(json.dumps(known))
    on_gpu("training", tmp_path, tmp_path)


def test_adapters_score_and_train_as_on_a_cpu(tmp_path):
    adapter = str(save_adapter(tmp_path / "adapter", save_model(tmp_path / "base")))
    host = AdaptedBase(make_model())
    scores = score(host.put_on(adapter), ragged(12, seed=2))
    known = steps_on_cpu(host.policy(adapter, AdapterConfig(rank=4), seed=0), tmp_path)
    (tmp_path / "cpu.json").write_text(json.dumps(known | {"scores": scores.tolist()}))
    on_gpu("adapters", tmp_path, tmp_path)


def test_generation_gives_the_responses_of_a_cpu(tmp_path):
    prompts = [prompt for prompt, _ in ragged(6, seed=5, longest=20)]
    known = {}
    for kind in ("qwen2", "gpt2"):
        model = make_model(kind)
        known[kind] = {}
        for temperature in (0.0, 1.0):
            params = SAMPLING._replace(temperature=temperature, top_k=50)
            found = HFGenerator(model, 100).generate(prompts, params, 7, lambda count: None)
            known[kind][temperature] = [c.token_ids.tolist() for c in found]
    (tmp_path / "cpu.json").write_text(json.dumps(known))
    on_gpu("generation", tmp_path, tmp_path)
