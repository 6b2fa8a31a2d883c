"""`tpaw new`: what it proposes runs, and why it proposes it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from builders import save_model, sums, write_jsonl
from transformers import AutoConfig

import tpaw.pipeline.proposal
from tpaw.config.schema import RunConfig
from tpaw.data.columns import key_list
from tpaw.data.examples import Example, Examples
from tpaw.pipeline.preflight import read_inputs
from tpaw.pipeline.space import LayerShape, layer_shape, memory_of_tokens
from tpaw.selfplay import self_play

STARTER = "tpaw://starter/model"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def problems(count, **more):
    """Distinct questions, as the starter knows them."""
    return [
        {
            "question": f"Leo has {i} toys and buys {i + 3} more. How many toys are there?",
            "answer": f"There are {i}+{i + 3}={2 * i + 3} toys.\n#### {2 * i + 3}",
            **more,
        }
        for i in range(count)
    ]


def test_what_it_writes_runs(here, tpaw_):
    write_jsonl(here / "data.jsonl", problems(40))
    code, out, err = tpaw_("new", "mine.yaml", "--model", STARTER, "--data", "data.jsonl")
    assert code == 0, err
    assert "Every held-out target ends with `#### answer`" in out
    assert "first example of data:" in out
    config = RunConfig.load("mine.yaml", {"iterations": 1})
    assert config.train.batch_size == 4
    inputs = read_inputs(config)
    assert (len(inputs.examples), len(inputs.heldout)) == (36, 4)
    assert inputs.heldout_prompts_in_training() == 0
    assert inputs.skipped == {"data": {}, "evaluate.data": {}}
    self_play(config, here / "run")
    summary = json.loads((here / "run" / "summary.json").read_text())
    assert summary["iterations_done"] == 1
    assert "exact_match" in summary["players"][1]["evaluation"]


def test_no_record_is_lost_or_changed_and_a_prompt_stays_together(here, tpaw_):
    records = problems(30, note=None) + problems(30)  # every prompt twice
    records += [{"question": "", "answer": "nobody asked"}]
    write_jsonl(here / "data.jsonl", records)
    code, out, err = tpaw_("new", "mine.yaml", "--model", STARTER, "--data", "data.jsonl")
    assert code == 0, err
    train, heldout = lines(here / "mine-train.jsonl"), lines(here / "mine-heldout.jsonl")
    assert len(heldout) == 6
    assert not {r["question"] for r in train} & {r["question"] for r in heldout}
    wanted = [{"question": r["question"], "answer": r["answer"]} for r in records]
    key = lambda record: (record["question"], record["answer"])  # noqa: E731
    assert sorted(train + heldout, key=key) == sorted(wanted, key=key)
    assert "Records: 60 usable, 1 not: 1 (the prompt is empty)." in out
    assert yaml.safe_load((here / "mine.yaml").read_text())["data"]["max_skipped"] >= 1 / 55


def test_lengths_leave_almost_all_records_whole_and_the_long_ones_are_not_held_out(here, tpaw_):
    records = problems(250)
    for i, record in enumerate(records):
        record["answer"] = "toys " * (i % 8 * 4) + record["answer"]
    records[17]["answer"] = "toys " * 130 + "\n#### 5"
    write_jsonl(here / "data.jsonl", records)
    code, _, err = tpaw_("new", "mine.yaml", "--model", STARTER, "--data", "data.jsonl")
    assert code == 0, err
    config = RunConfig.load("mine.yaml")
    inputs = read_inputs(config)  # refuses more than 1 % that are too long
    assert inputs.skipped["evaluate.data"] == {}
    assert sum(inputs.skipped["data"].values()) == 1
    longest = max(len(e.prompt_ids) + len(e.target_ids) for e in inputs.examples)
    assert longest <= config.max_length <= longest + 80
    answers = max(len(e.target_ids) for e in inputs.examples)
    assert answers <= config.generate.max_new_tokens < config.max_length


def test_no_long_record_is_held_out():
    ids = np.arange(1, 60, dtype=np.int32)
    examples = Examples.of(
        Example(f"{i}-x", ids[: 5 + i], ids[: 40 if i % 2 else 3], "p", "t") for i in range(40)
    )
    keys = [bytes(key) for key in key_list(examples.prompt_keys)]
    chosen = tpaw.pipeline.proposal._heldout_prompts(examples, 44)
    assert len(chosen) == 4
    short = {key for key, e in zip(keys, examples, strict=True) if len(e.prompt_ids) + 3 <= 44}
    assert chosen <= short & set(keys[::2])


def test_own_heldout_records_are_used_as_they_are(here, tpaw_):
    write_jsonl(here / "data.jsonl", problems(20))
    texts = [{"prompt": "Say something.", "completion": "Something."}]
    write_jsonl(here / "other.jsonl", texts)
    code, out, err = tpaw_(
        *("new", "mine.yaml", "--model", STARTER, "--data", "data.jsonl"),
        *("--heldout", "other.jsonl"),
    )
    assert code == 0, err
    assert "only log-probs are measured" in out
    assert sorted(p.name for p in here.iterdir()) == ["data.jsonl", "mine.yaml", "other.jsonl"]
    assert RunConfig.load("mine.yaml").evaluate.data.path == "other.jsonl"


@pytest.mark.parametrize("target", ["target", "completion"])
def test_columns_with_unusual_names(here, tpaw_, target):
    records = [{"frage": r["question"], "antwort": r["answer"], "n": 1} for r in problems(20)]
    write_jsonl(here / "data.jsonl", records)
    arguments = ("new", "mine.yaml", "--model", STARTER, "--data", "data.jsonl")
    code, _, err = tpaw_(*arguments)
    assert code == 2
    says = " ".join(err.split())
    assert "has columns antwort, frage, n" in says
    assert "--columns prompt=NAME,target=NAME" in says
    code, _, err = tpaw_(*arguments, "--columns", f"prompt=frage, {target}=antwort")
    assert code == 0, err
    assert "&id" not in (here / "mine.yaml").read_text()  # YAML's way to say: the same again
    inputs = read_inputs(RunConfig.load("mine.yaml"))
    assert (len(inputs.examples), len(inputs.heldout)) == (18, 2)
    parts = lines(here / "mine-train.jsonl") + lines(here / "mine-heldout.jsonl")
    assert sorted(parts, key=str) == sorted(records, key=str)
    texts = {example.target_text for example in (*inputs.examples, *inputs.heldout)}
    assert texts == {r["antwort"] for r in records}


def test_columns_of_conversations(here, tpaw_):
    turns = [
        [{"role": "user", "content": r["question"]}, {"role": "assistant", "content": r["answer"]}]
        for r in problems(20)
    ]
    write_jsonl(here / "data.jsonl", [{"chat": turn} for turn in turns])
    arguments = ("new", "mine.yaml", "--model", STARTER, "--data", "data.jsonl")
    assert tpaw_(*arguments, "--columns", "messages=chat")[0] == 0
    assert len(read_inputs(RunConfig.load("mine.yaml")).examples) == 18


@pytest.mark.parametrize(
    ("columns", "parts"),
    [
        ("text", ["--columns text", "ROLE=NAME"]),
        ("prompt=", ["--columns prompt=", "ROLE=NAME"]),
        ("target=a,completion=b", ["--columns", "each column once"]),
        ("prompt=text", ["--columns prompt=text", "give prompt and target"]),
        ("promt=text,target=label", ["promt: unknown key", "did you mean prompt"]),
        ("prompt=question,target=label", ["has no column 'label'"]),
    ],
)
def test_columns_that_cannot_be_read(here, tpaw_, columns, parts):
    write_jsonl(here / "data.jsonl", problems(20))
    arguments = ("new", "mine.yaml", "--model", STARTER, "--data", "data.jsonl")
    code, _, err = tpaw_(*arguments, "--columns", columns)
    assert code == 2
    assert all(part in " ".join(err.split()) for part in parts), err
    assert [p.name for p in here.iterdir()] == ["data.jsonl"]


@pytest.mark.parametrize(
    ("room", "device", "found"),
    [
        (100.0, "cpu", {}),
        (0.5, "cpu", {"adapter": {"rank": 64}}),
        (100.0, "cuda", {}),
        (10.0, "cuda", {"weights": "split"}),
        (0.1, "cuda", {"adapter": {"rank": 64}, "quantization": "nf4"}),
    ],
)
def test_what_fits_is_trained(here, monkeypatch, room, device, found):
    """Full fine-tuning needs 12 bytes a parameter in fp32 and 14 in bf16, split weights need 8."""
    import torch

    model = save_model(here / "model")
    write_jsonl(here / "data.jsonl", sums(30))
    parameters = sum(p.numel() for p in make_parameters(model))
    free = int(room * parameters / tpaw.pipeline.proposal.MEMORY_SHARE)
    monkeypatch.setattr(tpaw.pipeline.proposal, "free_memory", lambda _: free)
    monkeypatch.setattr(tpaw.pipeline.proposal, "pick_device", lambda _: torch.device(device))
    proposal = tpaw.pipeline.proposal.propose(here / "a.yaml", str(model), "data.jsonl", None)
    tree = yaml.safe_load(proposal.text)
    chosen = {k: v for k, v in tree["model"].items() if k != "path"}
    chosen |= {k: v for k, v in tree["train"].items() if k == "weights"}
    assert chosen == found
    assert tree["precision"] == ("bf16" if device == "cuda" else "fp32")
    [reason] = [r for r in proposal.reasons if r.startswith("Training:")]
    assert ("may not be enough" in reason) == (room < 1)


LLAMA_8B = LayerShape(layers=32, width=4096, inner=14_336, cached=2048, vocabulary=128_256)
QWEN_1_5B = LayerShape(layers=28, width=1536, inner=8960, cached=512, vocabulary=151_936)


@pytest.mark.parametrize(
    ("shape", "bytes_of_weights", "is_recomputed", "gibibytes"),
    [
        (QWEN_1_5B, 14 * 1.5437e9, False, 45.5),
        (LLAMA_8B, 8 * 8.0303e9, True, 66.6),
    ],
)
def test_the_memory_that_was_measured_on_a_gpu(shape, bytes_of_weights, is_recomputed, gibibytes):
    """docs/performance.md: rows of 8,192 tokens in bf16."""
    activations = memory_of_tokens(shape, 8192, 2, is_recomputed=is_recomputed)
    assert (bytes_of_weights + activations) / 2**30 == pytest.approx(gibibytes, rel=0.05)


@pytest.mark.parametrize(
    ("rows", "is_recomputed"), [(8192, False), (4000, False), (1100, False), (400, True)]
)
def test_as_many_tokens_at_a_time_as_fit(here, monkeypatch, rows, is_recomputed):
    """Room for the weights and for the activations of so many tokens."""
    model = save_model(here / "model")
    write_jsonl(here / "data.jsonl", sums(30))
    shape = layer_shape(AutoConfig.from_pretrained(model))
    weights = 12 * sum(p.numel() for p in make_parameters(model))
    needed = weights + memory_of_tokens(shape, rows, 4, is_recomputed=is_recomputed)
    monkeypatch.setattr(tpaw.pipeline.proposal, "free_memory", lambda _: int(needed / 0.9) + 10)
    proposal = tpaw.pipeline.proposal.propose(here / "a.yaml", str(model), "data.jsonl", None)
    config = RunConfig.load(yaml.safe_load(proposal.text))
    kept = 256 * (rows // 256)
    assert config.train.tokens_per_row == config.score.tokens_per_row == kept
    assert config.train.activation_checkpointing is is_recomputed
    [reason] = [r for r in proposal.reasons if r.startswith("Training:")]
    assert f"{kept:,} tokens at a time" in reason
    assert "too much" not in reason


def test_the_cache_of_generation_fits(here, monkeypatch):
    """Keys and values of all layers, for each token, beside the weights."""
    model = save_model(here / "model")
    write_jsonl(here / "data.jsonl", sums(30))
    found = AutoConfig.from_pretrained(model)
    heads = found.num_key_value_heads
    cached = 2 * found.num_hidden_layers * heads * (found.hidden_size // found.num_attention_heads)
    weights = 4 * sum(p.numel() for p in make_parameters(model))
    room = int((weights + 4 * cached * 5000) / 0.9) + 10
    monkeypatch.setattr(tpaw.pipeline.proposal, "free_memory", lambda _: room)
    proposal = tpaw.pipeline.proposal.propose(here / "a.yaml", str(model), "data.jsonl", None)
    assert RunConfig.load(yaml.safe_load(proposal.text)).generate.tokens_per_batch == 4864


def test_a_model_with_experts_has_no_estimate():
    shape = {"num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 16, "vocab_size": 9}
    usual = SimpleNamespace(**shape, num_attention_heads=2)
    assert layer_shape(usual) == LayerShape(2, 8, 16, 16, 9)
    assert layer_shape(SimpleNamespace(**vars(usual), num_experts_per_tok=2)) is None
    assert layer_shape(SimpleNamespace(hidden_size=8)) is None


@pytest.mark.parametrize(
    ("records", "size"), [(10, 4), (100, 4), (400, 16), (1279, 32), (1280, None)]
)
def test_few_records_get_small_batches(records, size):
    assert tpaw.pipeline.proposal._batch_size(records) == size


def make_parameters(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).parameters()


@pytest.mark.parametrize(
    ("records", "part"),
    [
        ([{"a": "b"}] * 3, "must have chosen/rejected"),
        ([{"question": "one", "answer": str(i)} for i in range(3)], "same prompt"),
        ([{"question": "one", "answer": ""}] * 3, "no record is left"),
    ],
)
def test_data_that_cannot_be_used(here, tpaw_, records, part):
    write_jsonl(here / "data.jsonl", records)
    code, _, err = tpaw_("new", "mine.yaml", "--model", STARTER, "--data", "data.jsonl")
    assert code == 2
    assert part in err
    assert [p.name for p in here.iterdir()] == ["data.jsonl"]


def test_nothing_is_overwritten(here, tpaw_):
    write_jsonl(here / "data.jsonl", problems(20))
    for name in ("mine.yaml", "mine-train.jsonl", "mine-heldout.jsonl"):
        (here / name).write_text("mine")
        code, _, err = tpaw_("new", "mine.yaml", "--model", STARTER, "--data", "data.jsonl")
        assert code == 2
        assert f"{name}: exists already" in err
        assert (here / name).read_text() == "mine"
        (here / name).unlink()
    code, _, err = tpaw_("new", "no/mine.yaml", "--model", STARTER, "--data", "data.jsonl")
    assert code == 2
    assert "no such folder" in err
    code, _, err = tpaw_("new", "mine.yaml", "--model", "./gone", "--data", "data.jsonl")
    assert code == 2
    assert "gone" in err


def test_any_part_of_records_that_are_mostly_unusable_may_be_used(here, tpaw_):
    """The probe looks at the first rows alone, which may be worse than all."""
    long = [{**record, "answer": "more " * 300} for record in problems(160)]
    write_jsonl(here / "data.jsonl", [*long[:80], *problems(40), *long[80:]])
    code, out, err = tpaw_("new", "mine.yaml", "--model", STARTER, "--data", "data.jsonl")
    assert code == 0, err
    assert out.startswith("WARNING: ")
    settings = yaml.safe_load((here / "mine.yaml").read_text())["data"]
    assert settings["max_skipped"] == pytest.approx(160 / 196 + 0.1, abs=0.011)
