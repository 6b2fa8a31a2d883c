"""A study before a judge: who answers, what is asked, what is made of it."""

from __future__ import annotations

import functools
import json

import pytest
import yaml
from builders import Ended
from judge_server import longer
from messages import says

import tpaw.study.judging
import tpaw.study.runner
from tpaw.study.judging import judge_study
from tpaw.study.runner import run_study


@pytest.fixture
def study(tmp_path, settings, tpaw_, monkeypatch):
    """Runs the same study again and again, its processes in this one; keeps what they are."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    tree = {
        "recipe": "recipe.yaml",
        "methods": {
            "tpaw": "tpaw",
            "faster": {"train": {"learning_rate": 1e-2}},
            "hopeless": {"train": {"learning_rate": 1e6}},
        },
        "seeds": 2,
        "baseline": "tpaw",
        "set": {"iterations": 1, "train": {"epochs": 2}},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(tree))
    started = []

    def launch(*arguments, log, threads):
        started.append(arguments)
        code, out, err = tpaw_(*arguments)
        log.write_text(out + err)
        return Ended(code)

    for module, function in ((tpaw.study.runner, run_study), (tpaw.study.judging, judge_study)):
        patched = functools.partial(function, launch=launch)
        monkeypatch.setattr(module, function.__name__, patched)

    def study(*options):
        started.clear()
        found = tpaw_("study", tmp_path / "study.yaml", "-o", tmp_path / "out", *options)
        return *found, [arguments[0] for arguments in started]

    return study


def outputs(folder, condition, seed):
    rows = json.loads((folder / "answers" / condition / f"seed-{seed}/outputs.json").read_text())
    return [row["output"] for row in rows]


def test_a_study_has_win_rates_against_its_baseline(study, serve, tmp_path):
    server = serve(longer)
    judge = ("--judge-endpoint", server.url, "--judge-model", "longest")
    code, text, _, started = study(*judge)
    assert code == 1  # two runs failed, which does not stop the judge
    assert started.count("answer") == 4
    folder = tmp_path / "out"
    found = json.loads((folder / "study.json").read_text())["win_rates"]
    assert found["measure"].startswith("pairwise win rate, judge = longest, prompt = ")
    assert found["baseline"] == "tpaw"
    assert list(found["conditions"]) == ["faster"]
    faster = found["conditions"]["faster"]
    rates, different = [], 0
    for seed in (0, 1):
        texts = [outputs(folder, name, seed) for name in ("faster", "tpaw")]
        texts = list(zip(*texts, strict=True))
        lengths = [(len(a), len(b)) for a, b in texts]
        wins, losses = sum(a > b for a, b in lengths), sum(a < b for a, b in lengths)
        kept = faster["by_seed"][str(seed)]
        assert (kept["wins"], kept["losses"], kept["pairs"]) == (wins, losses, 10)
        assert kept["ties"] == 10 - wins - losses
        different += sum(a != b for a, b in texts)
        rates.append((wins + kept["ties"] / 2) / 10)
    assert sum(rates) > 0
    assert faster["win_rate"]["mean"] == pytest.approx(sum(rates) / 2)
    assert faster["against_half"]["difference"] == pytest.approx(sum(rates) / 2 - 0.5)
    report = (folder / "report.md").read_text()
    assert f"**{found['measure']}: against tpaw, seed by seed**" in report
    assert "| faster | 2 | " in report.rpartition("win rate")[2]
    assert "longest" in text

    asked = len(server.requests)
    assert asked
    again = study(*judge)
    assert len(server.requests) == asked  # nothing is asked twice, and nobody answers again
    assert again[3].count("answer") == 0
    says(next(line for line in again[2].splitlines() if "hopeless, seed 1: not" in line))
    assert json.loads((folder / "study.json").read_text())["win_rates"] == found

    # A judge that says nothing gives no rate; it is another judge, so it is asked anew.
    mute = serve(lambda question: "I cannot tell.")
    code, *_, started = study("--judge-endpoint", mute.url, "--judge-model", "mute")
    assert "answer" not in started
    faster = json.loads((folder / "study.json").read_text())["win_rates"]["conditions"]["faster"]
    assert faster["win_rate"] is None
    invalid = sum(seed["invalid"] for seed in faster["by_seed"].values())
    assert invalid == different > 0
    assert f"| {invalid} |" in (folder / "report.md").read_text()

    # Greedily, as for exact match.
    settings = json.loads((folder / "answers/faster/seed-0/settings.json").read_text())
    assert "'temperature': 0.0" in str(settings)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--judge-endpoint", "http://127.0.0.1:1/v1"), ["--judge-model"]),
        (("--judge-model", "m"), ["--judge-endpoint"]),
        (("--judge-endpoint", "nowhere", "--judge-model", "m"), ["--judge-endpoint nowhere"]),
        (
            ("--judge-endpoint", "http://h/v1", "--judge-model", "m", "--judge-key-env", "NO_KEY_"),
            ["--judge-key-env NO_KEY_"],
        ),
    ],
)
def test_a_judge_that_cannot_be_asked_is_refused_before_anything_runs(study, options, parts):
    code, _, err, started = study(*options)
    assert code == 2
    says(err, *parts)
    assert started == []
