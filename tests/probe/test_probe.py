"""The probe on the starter from the command line, and what it refuses."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from builders import write_jsonl
from messages import refused
from oracles import expected_logps, oracle
from transformers import AutoModelForCausalLM, AutoTokenizer

from tpaw.config.schema import RunConfig
from tpaw.evaluation.exact_match import is_correct
from tpaw.generation.hf import HFGenerator
from tpaw.generation.responses import read_responses
from tpaw.pipeline.stages import Stages
from tpaw.probe import measure
from tpaw.probe.gradients import FirstStep
from tpaw.probe.measure import _Measuring, ending, probe
from tpaw.probe.verdict import verdict
from tpaw.runtime.interrupt import StopSignal


def right_share_of_the_likeliest(path, examples, parts, kept, number):
    """Of the responses with the highest log-prob, each alone in a pass of transformers' model."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    right = []
    for row, example in enumerate(examples):
        prompt = example.prompt_ids.tolist()
        logps = {}
        for part in parts:
            if part.finish_reasons[row] == "stop":
                ids = torch.tensor([[*prompt, *part.token_ids[row].tolist()]])
                with torch.no_grad():
                    found = model(ids).logits[0].double().log_softmax(-1)
                at = torch.arange(len(prompt) - 1, ids.shape[1] - 1)
                logps[part.texts[row]] = found[at, ids[0, at + 1]].sum().item()
        if logps:
            best = max(logps, key=logps.__getitem__)
            right.append(is_correct(best, example.target_text))
            assert parts[number[kept.tolist().index(row)]].texts[row] == best
    assert len(right) == len(kept)
    return sum(right) / len(examples)


def noted(function, results):
    def called(*given, **named):
        results.append(function(*given, **named))
        return results[-1]

    return called


def what_the_critic_tells(calls, examples, parts):
    """AUC, share of right responses and of the critic's best, on prompts that it has not seen."""
    ((watched, measured),) = calls["halves"]
    (pairs,) = calls["comparisons"]
    targets, responses = calls["scores_of"]
    responses = pairs.matrix(responses)
    assert not set(watched) & set(measured)
    shares, right, best_right = [], [], []
    for row in measured:
        whole = [k for k, part in enumerate(parts) if part.finish_reasons[row] == "stop"]
        target_text, texts = examples[row].target_text, [part.texts[row] for part in parts]
        right += [is_correct(text, target_text) for text in texts]
        if whole:
            best = max(whole, key=lambda k: responses[row, k])
            best_right.append(is_correct(texts[best], target_text))
        wins = [
            (targets[row] > responses[row, k]) + 0.5 * (targets[row] == responses[row, k])
            for k in whole
            if parts[k].token_ids[row].tolist() != examples[row].target_ids.tolist()
        ]
        if wins:
            shares.append(sum(wins) / len(wins))
    assert 1 < len(shares) < 64 * 0.3
    return tuple(sum(found) / len(found) for found in (shares, right, best_right))


def test_it_measures_speaks_and_leaves_nothing_behind(tpaw_, tmp_path, monkeypatch):
    # TRL imports it; it makes temporary folders at import, and removes them when Python ends.
    pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    for module in ("measure", "verdict"):
        monkeypatch.setattr(f"tpaw.probe.{module}.RECORDS_FOR_CRITIC", 64)
    seen, original = [], _Measuring._likeliest

    def noting(self, start, parts):
        kept, number = original(self, start, parts)
        seen.append((start.path, self.examples, parts, kept, number))
        return kept, number

    monkeypatch.setattr(_Measuring, "_likeliest", noting)
    calls = {}
    for name in ("halves", "comparisons", "scores_of"):
        monkeypatch.setattr(
            f"tpaw.probe.measure.{name}",
            noted(getattr(measure, name), calls.setdefault(name, [])),
        )
    asked, generate = [], HFGenerator.generate

    def asking(self, prompts, params, *others):
        found = generate(self, prompts, params, *others)
        asked.append((params, [c.token_ids.tolist() for c in found]))
        return found

    monkeypatch.setattr(HFGenerator, "generate", asking)
    code, out, _ = tpaw_("probe", "starter", "--rows", 64)
    assert code == 0
    likeliest_right = right_share_of_the_likeliest(*seen[0])
    assert re.search(rf"the likeliest of 4 +│ +{likeliest_right:.1%} ", out)
    assert not list(tmp_path.iterdir())
    for line in ("share that is signal", "right responses", "small critic: AUC", "margin"):
        assert line in out
    text = " ".join(out.split())
    # So few records cannot tell it; see docs/how-to/probe.md for more of them.
    assert text.startswith("SFT has converged, as far as 64 of 1,500 records can show")
    assert "different ones of 4" in text
    assert "try the 1500 of the data with --rows" in text
    assert "A lower temperature alone raises the share of right responses" in text
    shares = re.findall(r"(at T = [\d.]+|greedy) +│ +([\d.]+)% ", out)
    assert [name for name, _ in shares] == ["at T = 1", "at T = 0.5", "at T = 0.2", "greedy"]
    auc, right, best = what_the_critic_tells(calls, *seen[0][1:3])
    assert re.search(rf"small critic: AUC +│ +{auc:.3f} ", out)
    assert re.search(rf"its best of 4 +│ +{right:.1%}, {best:.1%} ", out)
    lower, examples = asked[-3:], seen[0][1]
    tokenizer = AutoTokenizer.from_pretrained(seen[0][0])
    assert [params.temperature for params, _ in lower] == [0.5, 0.2, 0.0]
    for (params, completions), (_, shown) in zip(lower, shares[1:], strict=True):
        assert (params.top_p, params.top_k) == (1, 0)
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in completions]
        are_right = map(is_correct, texts, [example.target_text for example in examples])
        assert f"{sum(are_right) / 64:.1%}" == f"{shown}%"


def test_a_critic_is_not_tried_on_few_rows(settings):
    settings["generate"] |= {"temperature": 1.0}
    found = probe(RunConfig.load(settings), 16, StopSignal())
    assert found.critic is None
    assert found.answers.samples == 2
    assert "a critic needs 1,000 records or more, and a run would use 24." in " ".join(
        verdict(*found)
    )


def test_what_it_measures(settings):
    """Random weights: responses are long and never right, and greedy ones are all truncated."""
    settings["generate"] |= {"temperature": 0.0, "top_k": 0}
    found = probe(RunConfig.load(settings), 16, StopSignal())
    answers = found.answers
    assert (answers.prompts, answers.samples, answers.temperature) == (16, 1, 0.0)
    assert not answers.is_plain
    assert answers.is_covered
    assert answers.records_of_data == 24
    assert answers.truncated_share == 1
    assert answers.right_shares == {0.0: 0.0}  # no temperature is below that of the responses
    assert answers.response_tokens == 12  # generate.max_new_tokens
    assert answers.different_share == 1
    assert found.critic is None  # whole responses alone are compared
    assert found.step.sft.batches == 16
    # One epoch of 16 pairs in batches of 8; an iteration of the run has all 24 rows.
    assert (found.margins.steps, found.margins.steps_of_iteration) == (2, 3)
    assert 0 < found.margins.median <= found.margins.high < math.inf


def test_margins_and_gradients_are_those_of_plain_logits(settings, monkeypatch):
    settings["generate"] |= {"temperature": 1.0, "top_k": 0}
    settings["objective"] = {"lambda": 3.0, "eta": 4.0}
    steps, expected, measured, train = [], [], _Measuring._margins, Stages.train

    def first_step(*given):
        steps.append(given)
        return FirstStep(*[None] * 6)

    def training(self, *given):
        trained = train(self, *given)
        expected.append(trained.path)
        return trained

    def logps(model, sequences):
        with torch.no_grad():
            return expected_logps(model, list(sequences)).numpy()

    def margins(self, start):
        found = measured(self, start)  # its folder is removed afterwards
        models = [
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
            for path in (expected.pop(), start.path)
        ]
        parts = read_responses(self.run.responses(1)).in_parts_of(len(self.examples))
        prompts = [example.prompt_ids for example in self.examples]
        targets, *generated = (
            np.subtract(*(logps(model, zip(prompts, ids, strict=True)) for model in models))
            for ids in (self.examples.target_ids, *(part.token_ids for part in parts))
        )
        for gains in generated:
            expected.append(3.0 * np.abs([targets - gains, targets, gains]))
        model = models[1]
        logp = oracle(model, prompts[0], self.examples.target_ids[0])
        logp.backward()
        grad = torch.cat([w.grad.flatten() for w in model.parameters()])
        expected.append(grad.norm().item())
        return found

    monkeypatch.setattr("tpaw.probe.measure.first_step", first_step)
    monkeypatch.setattr(Stages, "train", training)
    monkeypatch.setattr(_Measuring, "_margins", margins)
    found = probe(RunConfig.load(settings), 16, StopSignal()).margins
    gradient = expected.pop()
    margin, target, response = np.concatenate(expected, axis=1)
    assert margin.size == 32
    assert found.median == pytest.approx(np.median(margin), rel=1e-3)
    assert found.high == pytest.approx(np.quantile(margin, 0.95), rel=1e-3)
    assert found.high_of_targets == pytest.approx(np.quantile(target, 0.95), rel=1e-3)
    assert found.high_of_responses == pytest.approx(np.quantile(response, 0.95), rel=1e-3)
    assert len({round(x, 6) for x in found[2:]}) == 4
    ((targets, _, eta),) = steps
    assert eta == 4
    assert np.linalg.norm(targets[0]) == pytest.approx(gradient, rel=1e-4)  # 16 batches of one


def test_all_records_are_counted_and_only_the_first_ones_tokenized(settings, monkeypatch, tmp_path):
    """An unusable one among the first is not one of a run's; the later ones are not looked at."""
    path = Path(settings["data"]["path"])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[3]["answer"] = rows[20]["answer"] = ""
    settings["data"] = {
        "path": str(write_jsonl(tmp_path / "some-empty.jsonl", rows)),
        "max_skipped": 0.2,
    }
    monkeypatch.setattr(_Measuring, "all", lambda self: (self.records_of_data, self.examples))
    count, examples = probe(RunConfig.load(settings), 16, StopSignal())
    assert (count, len(examples)) == (len(rows) - 1, 15)
    count, examples = probe(RunConfig.load(settings), 64, StopSignal())
    assert count == len(examples) == len(rows) - 2


def test_how_texts_end():
    found = ending(["one. ", "two.", "three!"], ["four.", "", "five?", "six"])
    assert found == (".", pytest.approx(2 / 3), 0.25)
    assert ending(["", "a"], ["b"]).of_responses == 0


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"method": "sft"}, ["method", "sft", "self_play"]),
        ({"launch": {"engine": "ray"}}, ["launch.engine", "ray", "in_process"]),
    ],
)
def test_what_cannot_be_probed_is_refused(settings, changes, parts):
    with refused(*parts):
        probe(RunConfig.load(settings | changes), 64, StopSignal())


def test_a_critic_has_its_own_method(tpaw_, settings, tmp_path):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(settings))
    code, _, err = tpaw_("probe", tmp_path / "mine.yaml", "critic")
    assert code != 0
    assert "leave out the recipe that sets method" in " ".join(err.split())
