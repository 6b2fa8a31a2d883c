"""SFT and DPO over the run directory, against plain torch on the same ids."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from builders import make_model, make_tokenizer, sums, write_jsonl
from messages import by_first, refused, says
from safetensors.torch import load_file
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

from tpaw.config.schema import AdapterConfig, RunConfig
from tpaw.data.examples import read_examples
from tpaw.pipeline.preflight import read_inputs
from tpaw.report.status import done_and_next
from tpaw.report.summary import summarise
from tpaw.selfplay import self_play
from tpaw.storage.run_directory import RunDirectory
from tpaw.training.batching import BatchedTriples
from tpaw.training.trl import sft_arguments

ROWS = 8
LEARNING_RATE = 0.5


def rows_of_all_lengths():
    """Targets from 2 to some 60 tokens, so that a mean of means would not be the mean."""
    return [row | {"answer": "so " * 3 * i + row["answer"]} for i, row in enumerate(sums(ROWS))]


def pairs():
    return [
        {
            "prompt": r["question"],
            "chosen": r["answer"],
            "rejected": "I do not know. " * (i % 3 + 1),
        }
        for i, r in enumerate(rows_of_all_lengths())
    ]


@pytest.fixture
def one_batch(settings, tmp_path):
    """Settings under which an epoch is one step of plain gradient descent."""

    def make(method, rows, **train):
        settings["data"] = {"path": str(write_jsonl(tmp_path / "rows.jsonl", rows))}
        settings["train"] |= {
            "batch_size": ROWS,
            "optimizer": "sgd",
            "schedule": "constant",
            "warmup": 0.0,
            "learning_rate": LEARNING_RATE,
            "training_arguments": {"max_grad_norm": 0.0},
            **train,
        }
        settings["evaluate"] = {}
        return RunConfig.load(settings | {"method": method, "iterations": 1})

    return make


def double(folder):
    return AutoModelForCausalLM.from_pretrained(folder).double()


def token_logps(model, prompt, response):
    """log-prob of each response token, [R]."""
    ids = torch.tensor([[*prompt.tolist(), *response.tolist()]])
    logps = model(input_ids=ids).logits[0].log_softmax(-1)
    return logps[:-1].gather(1, ids[0, 1:, None])[len(prompt) - 1 :, 0]


def descend(model, loss):
    model.zero_grad()
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= LEARNING_RATE * parameter.grad


def assert_same_weights(found, expected, start):
    moved = 0.0
    for (name, a), b, c in zip(
        found.named_parameters(), expected.parameters(), start.parameters(), strict=True
    ):
        assert torch.allclose(a, b, atol=2e-6), name
        moved = max(moved, (b - c).abs().max().item())
    assert moved > 1e-3


def log_of(run, i=1):
    return [json.loads(line) for line in run.training_log(i).read_text().splitlines()]


def test_an_sft_step_is_the_gradient_of_the_mean_over_target_tokens(one_batch, tmp_path):
    config = one_batch("sft", rows_of_all_lengths())
    player = self_play(config, tmp_path / "r")
    run = RunDirectory(tmp_path / "r")
    examples = read_examples(run.inputs / "train.parquet")
    assert len({len(e.target_ids) for e in examples}) > 4
    # 256 tokens a forward at a longest row of 128: four micro-batches, of very unequal lengths.
    assert sft_arguments(config)[1]["gradient_accumulation_steps"] == 4
    model = double(config.model.path)
    logps = torch.cat([token_logps(model, e.prompt_ids, e.target_ids) for e in examples])
    loss = -logps.mean()
    descend(model, loss)
    assert log_of(run)[0]["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert_same_weights(double(player.path), model, double(config.model.path))


def test_dpo_starts_at_log_2_and_goes_down_the_papers_loss(one_batch, tmp_path):
    config = one_batch("dpo", pairs(), epochs=2)
    player = self_play(config, tmp_path / "r")
    run = RunDirectory(tmp_path / "r")
    examples = read_examples(run.inputs / "train.parquet")
    model, reference = double(config.model.path), double(config.model.path)

    def dpo_loss():  # equation 7 of arXiv 2305.18290
        terms = []
        for e in examples:
            gains = [
                token_logps(model, e.prompt_ids, ids).sum()
                - token_logps(reference, e.prompt_ids, ids).sum().detach()
                for ids in (e.target_ids, e.rejected_ids)
            ]
            terms.append(-logsigmoid(0.1 * (gains[0] - gains[1])))
        return torch.stack(terms).mean()

    losses = []
    for _ in range(2):
        losses.append(dpo_loss())
        descend(model, losses[-1])
    first, second = log_of(run)
    assert losses[0].item() == pytest.approx(0.6931472, abs=1e-7)
    assert first["loss"] == pytest.approx(0.6931472, abs=1e-5)
    assert losses[1].item() < 0.68
    assert second["loss"] == pytest.approx(losses[1].item(), abs=1e-4)
    assert second["rewards/target"] > 0 > second["rewards/generated"]
    assert_same_weights(double(player.path), model, reference)


def test_dpo_trains_an_adapter_down_the_gradient_of_its_base(one_batch, tmp_path):
    """After a step, B is −rate·s·G·Aᵀ, with G the gradient of W. A has none, because B was 0."""
    config = one_batch("dpo", pairs())
    adapter = AdapterConfig(rank=4, alpha=12)
    config = config.model_copy(
        update={"model": config.model.model_copy(update={"adapter": adapter})}
    )
    player = self_play(config, tmp_path / "r")
    run = RunDirectory(tmp_path / "r")
    model = double(config.model.path)
    terms = []
    for e in read_examples(run.inputs / "train.parquet"):
        gain, loss = (
            token_logps(model, e.prompt_ids, ids).sum() for ids in (e.target_ids, e.rejected_ids)
        )
        # The reference is the model itself, so the difference is 0 and has the gradient of this.
        terms.append(-logsigmoid(0.1 * ((gain - gain.detach()) - (loss - loss.detach()))))
    torch.stack(terms).mean().backward()
    assert log_of(run)[0]["loss"] == pytest.approx(0.6931472, abs=1e-5)
    weights = load_file(f"{player.path}/adapter_model.safetensors")
    layers = [n.removesuffix(".lora_B.weight") for n in weights if n.endswith(".lora_B.weight")]
    assert len(layers) == 14
    largest = 0.0
    for layer in layers:
        a, b = (weights[f"{layer}.lora_{x}.weight"].double() for x in "AB")
        gradient = model.get_parameter(layer.removeprefix("base_model.model.") + ".weight").grad
        expected = -LEARNING_RATE * 12 / 4 * gradient @ a.T
        assert torch.allclose(b, expected, atol=2e-6), layer
        largest = max(largest, b.abs().max().item())
    assert largest > 1e-3


def test_the_ids_that_are_trained_on_are_those_of_the_inputs(one_batch, tmp_path, monkeypatch):
    import trl

    seen = []
    original = trl.SFTTrainer.get_train_dataloader

    def loader(self):
        for batch in (found := original(self)):
            seen.extend(_rows(batch))
        return found

    monkeypatch.setattr(trl.SFTTrainer, "get_train_dataloader", loader)
    self_play(one_batch("sft", rows_of_all_lengths()), tmp_path / "sft")
    examples = read_examples(RunDirectory(tmp_path / "sft").inputs / "train.parquet")
    expected = [(*e.prompt_ids, *e.target_ids) for e in examples]
    assert sorted(seen) == sorted(expected)
    assert {row[-1] for row in seen} == {4}  # <|end|>


def test_the_ids_that_dpo_trains_on_are_those_of_the_inputs(one_batch, tmp_path, monkeypatch):
    seen, original = [], BatchedTriples.__getitems__

    def record(self, part):
        seen.extend(self.dataset[i] for triples in part.micro_batches for i in triples)
        return original(self, part)

    monkeypatch.setattr(BatchedTriples, "__getitems__", record)
    self_play(one_batch("dpo", pairs()), tmp_path / "dpo")
    examples = read_examples(RunDirectory(tmp_path / "dpo").inputs / "train.parquet")
    ids = ("prompt_ids", "target_ids", "generated_ids")
    assert sorted(tuple(tuple(row[name]) for name in ids) for row in seen) == sorted(
        (tuple(e.prompt_ids), tuple(e.target_ids), tuple(e.rejected_ids)) for e in examples
    )


def _rows(batch):
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        yield tuple(ids[mask.bool()].tolist())


def test_more_sft_has_the_run_directory_of_self_play(settings, tmp_path):
    settings |= {"method": "sft", "iterations": 2}
    config = RunConfig.load(settings)
    run = RunDirectory(tmp_path / "r")
    done, coming = done_and_next(run, config)
    assert done == []
    says(coming, "1/2", "θ_1")
    self_play(config, run.root)
    done, then = done_and_next(run, config)
    assert then is None
    assert done[1] == coming
    assert [step.split()[0] for step in done] == ["[0/2]", "[1/2]", "[1/2]", "[2/2]", "[2/2]"]
    assert [step.split()[-1] for step in done] == ["θ_0", "θ_1", "θ_1", "θ_2", "θ_2"]
    says("\n".join(done))
    assert sorted(p.name for p in run.iteration(1).folder.iterdir()) == [
        "checkpoint",
        "evaluation",
        "training.jsonl",
    ]
    assert not (run.root / "logprobs").exists()
    summary = json.loads(run.summary_file.read_text())
    assert (summary["method"], summary["iterations_done"]) == ("sft", 2)
    for player in summary["players"]:
        assert player["evaluation"]["exact_match"]["items"] == 10
    losses = [player["training"]["loss"] for player in summary["players"][1:]]
    assert losses[1] < losses[0]
    assert set(summary["players"][1]["seconds"]) == {"train", "evaluate"}
    # What TRL counts anew after an interruption is not in the log.
    assert all("num_tokens" not in line for line in log_of(run))
    saved = AutoModelForCausalLM.from_pretrained(run.checkpoint(2))
    assert saved.generation_config.eos_token_id == [4]


def test_a_reference_is_scored_once_and_by_the_store(settings, tmp_path):
    rows = [row | {"rejected": "no"} for row in pairs()] + pairs()  # each chosen twice
    settings["data"] = {"path": str(write_jsonl(tmp_path / "pairs.jsonl", rows))}
    settings |= {"method": "dpo", "iterations": 2, "evaluate": {}}
    settings["train"]["epochs"] = 2
    config = RunConfig.load(settings)
    self_play(config, tmp_path / "r")
    summary = summarise(RunDirectory(tmp_path / "r"), config)
    assert [p.get("sequences_scored") for p in summary["players"]] == [None, 24, 24]
    assert summary["players"][1]["training"]["rewards/margins"] != 0


@by_first(
    ("override", "method", "key"),
    [
        ("objective.eta=2.0", "sft", "objective.eta"),
        ("objective.lambda=0.2", "sft", "objective.lambda"),
        ("objective.gamma=0.1", "dpo", "objective.gamma"),
        ("team.opponents.last=1", "dpo", "team.opponents"),
        ("train.group_by_prompt=true", "sft", "train.group_by_prompt"),
        ("seed=1", "kto", "method"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(method, override, key):
    with refused(key, method):
        RunConfig.load("starter", overrides=[f"method={method}", override])


def test_split_weights_are_of_self_play():
    overrides = ["method=sft", "train.weights=split", "precision=bf16"]
    with refused("train.weights", "sft"):
        RunConfig.load("starter", overrides=overrides)


@pytest.mark.parametrize("method", ["self_play", "dpo", "sft"])
def test_trl_is_asked_for_before_anything_is_read(settings, tmp_path, monkeypatch, method):
    monkeypatch.setitem(sys.modules, "trl", None)
    settings |= {"method": method, "data": {"path": str(tmp_path / "none.jsonl")}}
    trl = ["method", "sft", "pip install 'tpaw[baselines]'"]
    with refused(*(trl if method == "sft" else ["data.path", tmp_path / "none.jsonl"])):
        read_inputs(RunConfig.load(settings))


def test_dpo_needs_pairs(settings):
    with refused("dpo", "chosen", "rejected"):
        read_inputs(RunConfig.load(settings | {"method": "dpo"}))


@pytest.mark.parametrize(("tokens", "size"), [(256, 2), (512, 4), (100, 1), (10**6, 12)])
def test_micro_batches_divide_the_batch(settings, tokens, size):
    settings["train"] |= {"batch_size": 12, "tokens_per_row": tokens}
    own = sft_arguments(RunConfig.load(settings | {"method": "sft"}))[1]
    assert own["per_device_train_batch_size"] == size
    assert size * own["gradient_accumulation_steps"] == 12


def test_a_model_without_a_padding_token(settings, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    make_model().save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    settings |= {"method": "sft", "iterations": 1, "model": {"path": str(tmp_path / "m")}}
    self_play(RunConfig.load(settings), tmp_path / "r")
    assert RunDirectory(tmp_path / "r").evaluation(1).exists()
