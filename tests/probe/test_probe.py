"""The probe on the starter from the command line, and what it refuses."""

from __future__ import annotations

import math
import re

import pytest
import torch
import yaml
from messages import refused
from transformers import AutoModelForCausalLM, AutoTokenizer

from tpaw.config.schema import RunConfig
from tpaw.evaluation.exact_match import is_correct
from tpaw.generation.hf import HFGenerator
from tpaw.probe.measure import _Measuring, probe
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
    assert found.step.norm_ratio > 0
    # One epoch of 16 pairs in batches of 8; an iteration of the run has all 24 rows.
    assert (found.margins.steps, found.margins.steps_of_iteration) == (2, 3)
    assert 0 < found.margins.median <= found.margins.high < math.inf


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"method": "sft"}, ["method", "sft", "probe"]),
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
    assert "leave method out" in " ".join(err.split())
