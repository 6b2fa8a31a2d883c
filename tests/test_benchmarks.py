"""Each benchmark runs, on a tiny model; the gate refuses; the FLOP formula counts as torch does."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import shlex
import shutil
import subprocess
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

pytest.importorskip("trl")  # in the extra "dev"

import best_of
import common
import first_gradient
import flops
import gate
import memory_driver
import ours
import row_files
import rows
import temperatures
import tokenise
import train_step
from contender import Training
from memory import peak_bytes
from workload import SHAPES, make_model, make_triples, useful_tokens

from tpaw.objectives.tpaw import team_loss

ROOT = Path(__file__).parents[1]
ONE_STEP = ["--triples", "4", "--batch", "4", "--length-scale", "0.1", "--no-memory"]
SMOKE = {
    "train_step": ONE_STEP,
    "team_step": ["--prompts", "2", "--batch", "4", "--length-scale", "0.1"],
    "whole_iteration": ["--prompts", "2", "--batch", "4", "--length-scale", "0.1"],
    "ceiling": ["--triples", "4", "--batch", "2", "--length-scale", "0.1", "--checkpointing"],
    "scaling": [
        *("--prompts", "2", "1", "--teams", "1", "3", "--vocabs", "512", "700"),
        *("--length-scales", "0.1", "--batch", "2"),
    ],
    "steps_per_second": ["--batch", "2", "--steps", "2", "--length-scale", "0.1"],
    "exactness": ["--triples", "4", "--batch", "2", "--length-scale", "0.1"],
}


def vllm_check():
    """The script, which is in no package."""
    source = importlib.util.spec_from_file_location("vllm_check", ROOT / "checks" / "vllm.py")
    script = importlib.util.module_from_spec(source)
    source.loader.exec_module(script)
    return script


def run(name, folder, capsys):
    options = ["--size", "tiny", "--repeats", "1", "--device", "cpu"]
    file = folder / f"{name}.json"
    code = importlib.import_module(name).main([*options, *SMOKE[name], "--json", str(file)])
    printed = capsys.readouterr()
    return code, printed, json.loads(file.read_text())["results"] if file.exists() else None


def test_rows_go_through_all_stages_and_tokenising_is_compared(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(row_files, "VOCABULARY", 400)
    sent = []
    rows.measure(SimpleNamespace(send=sent.append), 30, read=True, iterations=1)
    [found] = sent
    assert list(found["stages"]) == ["read", "inputs", "generate", "triples", "score", "train"]
    assert all(stage["anonymous"] > 0 for stage in found["stages"].values())
    options = ["--rows", "20", "--repeats", "1"]
    assert tokenise.main([*options, "--json", str(tmp_path / "tokenise.json")]) == 0
    assert "÷ tokenizers" in capsys.readouterr().out


@pytest.mark.process
@pytest.mark.parametrize("name", SMOKE)
def test_it_runs_and_writes_what_it_measured(name, tmp_path, capsys):
    code, printed, results = run(name, tmp_path, capsys)
    assert code == 0, printed.err
    assert "tiny" in printed.out
    assert results
    if name == "whole_iteration":
        counts = {k: [i["sequences"] / 2 for i in runs[0]] for k, runs in results.items()}
        assert counts == {"store": [2, 4, 6, 6], "no store": [2, 8, 18, 18]}


@pytest.mark.parametrize("small", ["", "1"], ids=["whole", "small"])
def test_every_piece_for_a_gpu_calls_a_benchmark_that_takes_its_options(
    small, tmp_path, monkeypatch
):
    """With `echo` in place of Python, the script prints its commands."""
    script = ROOT / "benchmarks" / "gpu.sh"
    env = os.environ | {"OUT": str(tmp_path), "SMALL": small, "DEVICE": "cpu"}
    env |= {"PYTHON": "echo", "PYTHON_OF_VLLM": "echo"}
    done = subprocess.run([script, "all"], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    pieces = subprocess.run([script, "list"], capture_output=True, text=True).stdout.split()
    assert sorted(pieces) == sorted(path.stem for path in tmp_path.glob("*.log"))
    commands = [shlex.split(x) for x in done.stdout.splitlines() if x.startswith("benchmarks/")]
    assert len(commands) > 10
    for file, *options in commands:
        module = importlib.import_module(Path(file).stem)
        if module.__name__ == "generation":
            continue  # it parses its options itself; the next test runs it
        seen = []

        def parse(parser, argv, seen=seen):
            seen.append(parser.parse_args(argv))
            raise SystemExit

        monkeypatch.setattr(module, "parse", parse)
        with pytest.raises(SystemExit):
            module.main(options)
        assert seen, (file, options)
        assert seen[0].device == "cpu"
        assert (seen[0].size == "tiny") == bool(small)
    checks = [shlex.split(x) for x in done.stdout.splitlines() if x.startswith("checks/vllm.py")]
    sizes = [vllm_check().parse(options).size for _, *options in checks]
    assert sizes == [None, "39m" if small else "100m"]


def test_a_piece_that_is_unknown_or_fails_ends_with_1(tmp_path):
    script = ROOT / "benchmarks" / "gpu.sh"
    env = os.environ | {"PYTHON": "false", "OUT": str(tmp_path)}
    done = subprocess.run([script, "facts", "wrong"], env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "failed: facts wrong"
    assert "no such piece" in (tmp_path / "wrong.log").read_text()


def test_a_piece_of_vllm_fails_without_vllm(tmp_path):
    script = ROOT / "benchmarks" / "gpu.sh"
    env = os.environ | {"PYTHON": "true", "PYTHON_OF_VLLM": "not/there", "OUT": str(tmp_path)}
    done = subprocess.run([script, "vllm", "vllm-100m"], env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "failed: vllm vllm-100m"
    assert "not run: there is no not/there" in (tmp_path / "vllm.log").read_text()
    assert json.loads((tmp_path / "vllm-100m.json").read_text()) == {"run": False}


@pytest.mark.parametrize("broken", ["lambda", "last token"])
def test_nothing_is_timed_when_the_contenders_differ(broken, tmp_path, capsys, monkeypatch):
    train = ours.train

    def differently(model, triples, logps, settings, **variant):
        if broken == "lambda":
            object.__setattr__(settings, "objective", dict(settings.objective, lambda_=0.101))
        else:
            triples = [t._replace(target=t.target[:-1]) for t in triples]
        return train(model, triples, logps, settings, **variant)

    monkeypatch.setattr(ours, "train", differently)
    monkeypatch.setattr(train_step, "interleaved", lambda *_, **__: pytest.fail("timed"))
    code, printed, results = run("train_step", tmp_path, capsys)
    assert code == 1
    assert "REFUSED" in printed.err
    assert results is None


@pytest.mark.parametrize("what", ["losses", "gradient", "weights"])
@pytest.mark.parametrize("by", [0.01, math.nan])
def test_the_gate_looks_at_losses_gradient_and_weights(what, by):
    def training(**changes):
        values = {"losses": [0.6], "gradient": torch.ones(3), "weights": torch.ones(3)} | changes
        return Training(seconds=0.0, step_seconds=[], **values)

    start = torch.zeros(3)
    gate.check_equal("the same", training(), training(), start, gate.FP32)
    other = training(**{what: [0.6 + by] if what == "losses" else torch.ones(3) + by})
    with pytest.raises(
        gate.GateError, match={"losses": "loss", "weights": "update"}.get(what, what)
    ):
        gate.check_equal("the other", training(), other, start, gate.FP32)
    with pytest.raises(gate.GateError, match="loss"):
        gate.check_equal("a longer", training(losses=[0.6, 0.6]), training(), start, gate.FP32)


@pytest.mark.parametrize("name", ["tiny", "untied"])
def test_flops_are_those_that_torch_counts(name):
    shape = SHAPES["tiny"]
    if name == "untied":
        shape = type(shape)(96, 3, 4, 1, 160, 700, tied=False, family="llama")
    model = make_model(shape).train()
    P, R = 30, 40
    rows = [(P, [R])]
    ids = torch.arange(P + R)[None]

    def counted(backward, checkpointing=False):
        model.set_attn_implementation("eager")
        if checkpointing:
            model.activation_checkpointing_enable()
        with FlopCounterMode(display=False) as counter:
            # Its last R positions are as many as those that predict the response.
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=R).logits
            if backward:
                logits.sum().backward()
        return counter.get_total_flops()

    # Torch computes every pair of a query and a key, and masks half of them.
    all_pairs, visible = (
        flops.attention_flops(shape, n) for n in ((P + R) ** 2, flops.visible_keys(P, [R]))
    )
    masked = all_pairs - visible
    # Beside the formula's, torch counts the table of rotary angles.
    close = {"rel": 1e-3}
    forward = flops.forward_flops(shape, rows)
    assert counted(False) == pytest.approx(forward + masked, **close)
    training = flops.training_flops(shape, rows)
    assert counted(True) == pytest.approx(training + 3 * masked, **close)
    hardware = flops.training_flops(shape, rows, recomputed=True)
    assert counted(True, checkpointing=True) == pytest.approx(hardware + 4 * masked, **close)


def test_visible_keys_are_those_of_the_mask():
    P, lengths = 5, [3, 4]
    separate = sum(torch.ones(P + R, P + R).tril().sum() for R in lengths)
    prompt_again = torch.ones(P, P).tril().sum()
    assert flops.visible_keys(P, lengths) == separate - prompt_again


def test_sizes_and_lengths_are_those_that_are_stated():
    tiny = SHAPES["tiny"]
    weights = [p for p in make_model(tiny).parameters() if p.dim() == 2]
    assert sum(p.numel() for p in weights) == tiny.parameters
    assert SHAPES["qwen2.5-1.5b"].parameters == pytest.approx(1.54e9, rel=0.01)
    assert SHAPES["llama-3.1-8b"].parameters == pytest.approx(8.03e9, rel=0.01)
    triples = make_triples(3000, 1, 100)
    assert useful_tokens(triples) / 3000 == pytest.approx(120 + 280 + 240, rel=0.02)
    assert max(len(t.prompt) + max(len(t.target), len(t.generated)) for t in triples) <= 1024


def test_contenders_alternate_and_ratios_are_within_a_repeat():
    order = []

    def named(name):
        return lambda work: order.append((name, work)) or len(order)

    found = common.interleaved({n: named(n) for n in "ab"}, "all", warm_up="few", repeats=3)
    assert order[:2] == [("a", "few"), ("b", "few")]
    assert "".join(name for name, _ in order[2:]) == "abbaab"
    assert found == {"a": [3, 6, 7], "b": [4, 5, 8]}
    assert common.ratios([2.0, 30.0, 8.0], [1.0, 10.0, 8.0]) == common.Spread(2.0, 1.0, 3.0)


@pytest.mark.process
def test_peak_memory_is_that_of_the_work_alone():
    # The kernel adds up what its cores count some 64 pages at a time.
    assert 63 <= peak_bytes(memory_driver.keeps_little, 64) / 2**20 < 80


@pytest.mark.process
def test_peak_memory_of_training_holds_gradients_and_optimizer_state():
    shape = replace(SHAPES["tiny"], vocab=50_000)
    weights_bytes = 4 * shape.parameters
    assert 2 <= peak_bytes(memory_driver.trains, shape) / weights_bytes < 8


def test_no_file_has_grown_past_350_lines():
    files = list(Path(common.__file__).parent.glob("*.py"))
    assert len(files) > 10
    assert all(len(file.read_text().splitlines()) <= 350 for file in files)


def test_the_first_step_is_eta_times_sft_and_the_answers(finished, capsys):
    run, config = finished
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float64).eval()
    prompt, target, answer = (np.array(ids) for ids in ([5, 6, 7], [8, 9], [9, 8, 10]))

    def logp(response):
        ids = torch.tensor([[*prompt, *response]])
        logps = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        return logps[range(len(response)), response].sum()[None]

    of_target, of_answer = logp(target), logp(answer)
    loss = team_loss(
        of_target, of_answer, of_target.detach()[:, None], of_answer.detach()[:, None],
        lambda_=0.1, eta=6.0, gamma=0.5,
    ).loss_B.sum()  # fmt: skip
    of_loss = torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*model.parameters()])])
    parts = [first_gradient.gradient(model, [(prompt, ids)]) for ids in (target, answer)]
    torch.testing.assert_close(of_loss, -0.1 / 2 * (6 * parts[0] - parts[1]))

    assert first_gradient.main([str(run.root), "--batch", "4", "--eta", "1", "1e9"]) == 0
    last = [line for line in capsys.readouterr().out.splitlines() if "1e+09" in line]
    assert last
    assert "1.00 " in last[0]


def test_a_choice_among_responses_by_hand():
    votes = best_of.votes([["a", "b"], ["a", "c"], ["x", "b"]])
    assert votes.tolist() == [[2, 2], [2, 1], [1, 2]]
    scores = np.array([[1.0, 0.0], [1.0, 5.0], [0.0, 9.0]])
    right = np.array([[True, False], [False, True], [True, False]])
    is_whole = np.array([[True, True], [True, True], [True, False]])
    both, first = np.array([True, True]), np.array([True, False])
    # Two are best for the first prompt, one of them right; for the second the truncated one is out.
    assert best_of._share(scores, right, is_whole, both) == 0.75
    assert best_of._share(scores, right, is_whole, first) == 0.5


def test_decoding_at_temperature_0_gives_the_greedy_responses_of_the_run(
    finished, monkeypatch, tmp_path, capsys
):
    """What is right is arbitrary; four equal responses count as one."""

    def is_right(example_id, text):
        return zlib.crc32(f"{example_id} {text}".encode()) % 2 == 0

    run, _ = finished
    study = tmp_path / "study"
    for seed in (1, 2):
        (study / "runs" / "tpaw").mkdir(parents=True, exist_ok=True)
        shutil.copytree(run.root, study / "runs" / "tpaw" / f"seed-{seed}")
    arbitrary = SimpleNamespace(
        is_right=lambda example, text: is_right(example.id, text),
        details=lambda example, text: {},
    )
    monkeypatch.setattr(temperatures, "checker_of", lambda name: arbitrary)
    monkeypatch.setattr(temperatures, "TEMPERATURES", (0.0, 1.0))
    assert temperatures.main([str(study), "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found) == ["tpaw", "θ_0"]
    for name, i in (("tpaw", 4), ("θ_0", 0)):
        lines = (run.evaluation(i) / "exact_match.jsonl").read_text().splitlines()
        right = [is_right(item["id"], item["completion"]) for item in map(json.loads, lines)]
        share = sum(right) / len(right)
        assert 0 < share < 1
        assert [of_run["0"] for of_run in found[name].values()] == [[share, share]] * 2
        assert all(of_run["1"] != [share, share] for of_run in found[name].values())
    assert "│ tpaw │" in capsys.readouterr().out
