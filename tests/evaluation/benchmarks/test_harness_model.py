"""The harness's model class with our generator under it, against the harness's own loop."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from builders import make_model, make_tokenizer, sums
from messages import refused

pytest.importorskip("lm_eval")  # in the extra "evaluate"

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.config.task import TaskConfig
from lm_eval.models.huggingface import HFLM

import tpaw.evaluation.benchmarks.harness
from tpaw.errors import MemoryShortageError, NonFiniteError
from tpaw.evaluation.benchmarks.harness import HarnessModel
from tpaw.generation.continuous_batching import ASK_EVERY


def make_ours(model, tokenizer=None):
    return HarnessModel(
        model,
        tokenizer or make_tokenizer(),
        stop_ids=(4,),
        tokens_per_row=300,
        tokens_per_batch=1000,
    )


def requests(until, count=12, **settings):
    settings = {"until": until, "do_sample": False, "max_gen_toks": 40} | settings
    rows = sums(count, seed=5)
    texts = [row["question"] * (1 + i % 3) for i, row in enumerate(rows)]
    return [
        Instance("generate_until", {}, (text, dict(settings)), 0, metadata=("t", i, 1))
        for i, text in enumerate(texts)
    ]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_answers_are_those_of_the_harness_own_loop(kind):
    model = make_model(kind, seed=3)
    stock = HFLM(pretrained=model, tokenizer=make_tokenizer(), batch_size=1)
    whole = stock.generate_until(requests([]), disable_tqdm=True)
    assert len(set(whole)) > 3
    # Strings that do come up, one of several tokens, and one that only this row has.
    until = [whole[0][9:13], whole[5][20:22], whole[7][-3:], "never seen"]
    expected = stock.generate_until(requests(until), disable_tqdm=True)
    assert expected != whole
    assert make_ours(make_model(kind, seed=3)).generate_until(requests(until)) == expected
    assert make_ours(make_model(kind, seed=3)).generate_until(requests([])) == whole


def test_a_row_ends_soon_after_a_stop_string_and_never_before(monkeypatch):
    model = make_model("gpt2", seed=3)
    whole = make_ours(model).generate_until(requests([]))
    rng = np.random.default_rng(0)
    emitted = []
    real = tpaw.evaluation.benchmarks.harness.HFGenerator.generate

    def record(self, *args):
        found = real(self, *args)
        emitted.append([completion.token_ids.tolist() for completion in found])
        return found

    monkeypatch.setattr(tpaw.evaluation.benchmarks.harness.HFGenerator, "generate", record)
    tokenizer = make_tokenizer()
    for _ in range(20):
        text = whole[rng.integers(len(whole))]
        start = int(rng.integers(len(text) - 4))
        stop = text[start : start + int(rng.integers(1, 5))]
        if not stop.strip("\ufffd"):
            continue
        # The oracle: generate to the end, then cut at the first occurrence.
        assert make_ours(model).generate_until(requests([stop])) == [
            one.split(stop)[0] for one in whole
        ]
        for ids in emitted[-1]:
            texts = [tokenizer.decode(ids[:n], skip_special_tokens=True) for n in range(41)]
            first = next((n for n, text in enumerate(texts) if stop in text), 40)
            assert len(ids) < first + ASK_EVERY


def test_a_special_token_among_the_stop_strings_ends_an_answer():
    tokenizer = make_tokenizer()
    stock = HFLM(pretrained=make_model("gpt2", seed=3), tokenizer=tokenizer, batch_size=1)
    whole = stock.generate_until(requests([]), disable_tqdm=True)
    # A token that comes up becomes special, so that no text shows it.
    stop = tokenizer.decode(tokenizer.encode(whole[0])[7])
    tokenizer.add_special_tokens({"extra_special_tokens": [stop]})
    expected = stock.generate_until(requests([stop]), disable_tqdm=True)
    assert expected[0] != whole[0].replace(stop, "")
    ours = make_ours(make_model("gpt2", seed=3), tokenizer=tokenizer)
    assert ours.generate_until(requests([stop])) == expected


def test_sampling_tasks_go_through_the_harness_own_loop(monkeypatch):
    called = []
    monkeypatch.setattr(
        HFLM,
        "generate_until",
        lambda self, rows, **k: called.append(len(rows)) or ["x"] * len(rows),
    )
    ours = make_ours(make_model(seed=3))
    mixed = [*requests([], 3), *requests([], 2, do_sample=True, temperature=0.7)]
    answers = ours.generate_until(mixed)
    assert called == [2]
    assert answers[3:] == ["x", "x"]
    assert "x" not in answers[:3]
    assert ours.model.generation_config.eos_token_id == [4]


def generation_arguments():
    """Generation arguments of the installed harness's task files, one for each set of settings."""
    written = {"null"}
    paths = Path(next(iter(lm_eval.__path__)), "tasks").rglob("*yaml*")
    for path in (path for path in paths if path.suffix != ".pyc"):
        text = path.read_text(encoding="utf-8", errors="replace") + "\n"
        for found in re.findall(r"^generation_kwargs:.*\n(?:[ \t-].*\n|\n)*", text, re.MULTILINE):
            written.add(json.dumps(yaml.safe_load(found)["generation_kwargs"]))
    by_settings = {}
    for text in sorted(written):
        # The harness gives every task stop strings, and reads any of four names of the limit.
        kwargs = TaskConfig(generation_kwargs=json.loads(text)).generation_kwargs
        kwargs = {k: v for k, v in kwargs.items() if not k.startswith("max_")}
        settings = {k: v for k, v in kwargs.items() if k != "until"} | {"any": any(kwargs["until"])}
        by_settings[json.dumps(settings, sort_keys=True)] = kwargs | {"max_gen_toks": 4}
    return list(by_settings.values())


def test_the_generation_arguments_of_every_task_of_the_harness():
    model = make_model("llama", seed=3)
    stock = HFLM(pretrained=model, tokenizer=make_tokenizer(), batch_size=1)
    ours = make_ours(make_model("llama", seed=3))
    found = generation_arguments()
    assert {"until", "max_gen_toks"} in [set(kwargs) for kwargs in found]
    assert len(found) >= 15
    for kwargs in found:
        asked = [Instance("generate_until", {}, ("What is 3 + 4?", kwargs), 0)]
        torch.manual_seed(0)
        expected = stock.generate_until(asked, disable_tqdm=True)
        torch.manual_seed(0)
        assert ours.generate_until(asked) == expected, kwargs


def test_a_limit_that_leaves_no_room_for_a_prompt_is_refused():
    with refused("max_gen_toks", 256):
        make_ours(make_model(seed=3)).generate_until(requests([], max_gen_toks=256))


def test_log_likelihoods_are_those_of_the_harness():
    rows = sums(9, seed=6)
    asked = [
        Instance("loglikelihood", {}, (row["question"] * (1 + i % 3), row["answer"]), 0)
        for i, row in enumerate(rows)
    ]
    stock = HFLM(pretrained=make_model(seed=3), tokenizer=make_tokenizer(), batch_size=1)
    expected = stock.loglikelihood(asked, disable_tqdm=True)
    found = make_ours(make_model(seed=3)).loglikelihood(asked)
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]
    np.testing.assert_allclose([a for a, _ in found], [a for a, _ in expected], atol=1e-4)


def test_the_benchmark_compares_the_two(tmp_path, capsys):
    import exact_match

    file = tmp_path / "out.json"
    options = ["--items", "12", "--repeats", "1", "--batch", "5", "--device", "cpu"]
    assert exact_match.main([*options, "--json", str(file)]) == 0
    assert "harness, 5 at a time" in capsys.readouterr().out
    results = json.loads(file.read_text())["results"]
    assert set(results["seconds"]) == {"harness, 5 at a time", "tpaw"}
    assert 0 < results["correct"] < 12


def test_log_likelihoods_are_computed_in_batches(monkeypatch):
    ours = make_ours(make_model(seed=3))
    shapes = []
    monkeypatch.setattr(
        ours, "_model_call", lambda inps: shapes.append(inps.shape) or HFLM._model_call(ours, inps)
    )
    counted = []
    ours.bar = lambda *what: contextlib.nullcontext(counted.append)
    text = "What is 3 + 4?"
    lines = [Instance("loglikelihood", {}, (text, f" {i}{i + 1}"), 0) for i in range(40)]
    choices = ours.loglikelihood(lines)
    longest = max(length for _, length in shapes) + 1
    assert len(shapes) == -(-40 // (300 // longest))
    assert max(rows for rows, _ in shapes) == 300 // longest
    assert sum(counted) == 40

    # A rolling log-likelihood is that of each window given its first token.
    shapes.clear()
    counted.clear()
    texts = [text * (1 + i % 5) for i in range(30)]
    asked = [Instance("loglikelihood_rolling", {}, (one,), 0) for one in texts]
    stock = HFLM(pretrained=make_model(seed=3), tokenizer=make_tokenizer(), batch_size=1)
    expected = stock.loglikelihood_rolling(asked, disable_tqdm=True)
    np.testing.assert_allclose(ours.loglikelihood_rolling(asked), expected, atol=1e-3)
    assert len(shapes) < 20
    assert all(rows * (length + 1) <= 300 for rows, length in shapes)
    assert sum(counted) == 30
    assert len(choices) == 40


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("loglikelihood", ("What is", " 4?")),
        ("loglikelihood_rolling", ("What is 4?",)),
        ("generate_until", ("What is", {"until": ["\n"]})),
        ("generate_until", ("What is", {"until": [], "do_sample": True, "temperature": 0.8})),
        ("generate_until", ("What is", {"until": [], "num_beams": 2})),
    ],
    ids=["choices", "rolling", "greedy", "sampling", "beams"],
)
def test_a_model_that_computes_nan_is_named(kind, arguments):
    model = make_model(seed=3)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    model.name_or_path = "broken"
    if kind == "generate_until":
        arguments[1]["max_gen_toks"] = 8
    with refused("broken", "NaN", "layers.1.mlp.up_proj", error=NonFiniteError):
        getattr(make_ours(model), kind)([Instance(kind, {}, arguments, 0)])


def test_a_broken_model_has_no_score():
    model = make_model(seed=3)
    with torch.no_grad():
        model.model.norm.weight[5] = torch.nan
    model.name_or_path = "runs/x/iterations/1/checkpoint"
    ours = make_ours(model)
    with refused("runs/x/iterations/1/checkpoint", "model.norm.weight", error=NonFiniteError):
        ours.generate_until(requests([]))
    choices = [
        Instance("loglikelihood", {}, (row["question"], " 5"), 0, metadata=("t", i, 1))
        for i, row in enumerate(sums(3))
    ]
    with refused("runs/x/iterations/1/checkpoint", "model.norm.weight", error=NonFiniteError):
        ours.loglikelihood(choices)


def test_memory_that_runs_out_for_log_likelihoods_names_the_budget_of_a_row():
    model = make_model(seed=3)
    ours = make_ours(model)

    def starved(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    model.forward = starved
    choices = [Instance("loglikelihood", {}, ("1 + 1 =", " 2"), 0, metadata=("t", 0, 1))]
    with refused("score.tokens_per_row", 300, error=MemoryShortageError):
        ours.loglikelihood(choices)
