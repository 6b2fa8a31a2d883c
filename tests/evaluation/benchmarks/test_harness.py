"""Suites through lm-evaluation-harness, on tasks and models made here; no network."""

from __future__ import annotations

import functools
import json
import random
import re
import shutil
import sys
from typing import ClassVar

import pytest
import torch
import yaml
from builders import make_model, save_model, sums, write_jsonl
from fork_server import Forked
from messages import complains, refused, says

pytest.importorskip("lm_eval")  # in the extra "evaluate"

from lm_eval.tasks import TaskManager
from transformers import T5Config

import tpaw.evaluation.benchmarks.harness
import tpaw.evaluation.benchmarks.run
from tpaw.config.schema import DataConfig, RunConfig
from tpaw.data.readers import read_records
from tpaw.errors import ArtifactError
from tpaw.evaluation.benchmarks.harness import HarnessModel, load_tasks
from tpaw.evaluation.benchmarks.run import evaluate_suite
from tpaw.evaluation.benchmarks.suite import load_suite
from tpaw.evaluation.exact_match import is_correct
from tpaw.evaluation.items import read_items
from tpaw.report.tables import suites_of_run
from tpaw.selfplay import self_play
from tpaw.storage.artifacts import is_published, read_json, verify
from tpaw.storage.removal import remove_weights
from tpaw.storage.run_directory import RunDirectory
from tpaw.study.config import Condition
from tpaw.study.results import collect, measures_in
from tpaw.study.runner import StudyRun

GENERATE = {
    "task": "sums",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"train": "train.jsonl", "test": "test.jsonl"}},
    "output_type": "generate_until",
    "training_split": "train",
    "fewshot_split": "train",
    "test_split": "test",
    "doc_to_text": "Q: {{question}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    "generation_kwargs": {"until": ["Q:"], "do_sample": False, "max_gen_toks": 8},
    "metadata": {"version": 2.0},
}
CHOOSE = GENERATE | {
    "task": "parity",
    "output_type": "multiple_choice",
    "doc_to_target": "{{answer.split()[-1] | int % 2}}",
    "doc_to_choice": ["even", "odd"],
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
del CHOOSE["generation_kwargs"]


@pytest.fixture
def suite(tmp_path):
    """Two local tasks, 2-shot and 1-shot, over six rows."""
    write_jsonl(tmp_path / "train.jsonl", sums(9, seed=3))
    write_jsonl(tmp_path / "test.jsonl", sums(6, seed=4))
    for task in (GENERATE, CHOOSE):
        (tmp_path / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    columns = [
        {"name": "Sums", "task": "sums.yaml", "num_fewshot": 2, "metric": "exact_match"},
        {"name": "Parity", "task": "parity.yaml", "num_fewshot": 1, "metric": "acc"},
    ]
    path = tmp_path / "local.yaml"
    path.write_text(yaml.safe_dump({"name": "local", "tasks": columns}))
    return path


def rewrite(path, **changes):
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))


@pytest.fixture
def prompts(monkeypatch):
    """What the harness asks the model, by the kind of question."""
    asked = {}

    def record(kind):
        answer = getattr(HarnessModel, kind)

        def recorded(self, requests, *args, **kwargs):
            asked[kind] = [request.args[0] for request in requests]
            return answer(self, requests, *args, **kwargs)

        monkeypatch.setattr(HarnessModel, kind, recorded)

    record("generate_until")
    record("loglikelihood")
    return asked


def test_a_checkpoint_that_is_an_adapter_is_evaluated_in_its_run_and_alone(
    suite, settings, tmp_path
):
    settings |= {"iterations": 1, "evaluate": {}}
    settings["model"]["adapter"] = {"rank": 4}
    settings["train"]["learning_rate"] = 1e-2
    self_play(RunConfig.load(settings), tmp_path / "run")
    evaluate_suite(str(tmp_path / "run"), str(suite), trust=True)
    run = RunDirectory(tmp_path / "run")
    alone = run.checkpoint(1)
    evaluate_suite(str(alone), str(suite), trust=True, output=tmp_path / "alone")
    start, player, same = (
        read_json(folder / "results.json")
        for folder in (run.suite(0, "local"), run.suite(1, "local"), tmp_path / "alone")
    )
    assert player["fingerprint"] == same["fingerprint"] != start["fingerprint"]
    assert player["tasks"].keys() == same["tasks"].keys()
    for name, facts in player["tasks"].items():
        assert facts["score"] == same["tasks"][name]["score"]


def test_a_run_evaluates_its_checkpoints_on_the_suites_of_its_configuration(
    suite, settings, tmp_path
):
    settings |= {"iterations": 1, "evaluate": settings["evaluate"] | {"suites": [str(suite)]}}
    config = RunConfig.load(settings)
    output = tmp_path / "with"
    self_play(config, output)
    run = RunDirectory(output)

    # As `tpaw evaluate` would have evaluated the same run.
    self_play(RunConfig.load(settings, {"evaluate": {"suites": []}}), tmp_path / "without")
    expected = evaluate_suite(str(tmp_path / "without"), str(suite), trust=True)
    assert len(expected) == 2
    for i, one in enumerate(expected):
        for name in ("items/sums.jsonl", "items/parity.jsonl"):
            found = run.suite(i, "local") / name
            assert found.read_bytes() == (one.folder / name).read_bytes()
        scores = read_json(run.summary_file)["players"][i]["suites"]["local"]
        assert scores["score"] == one.results["score"]
        assert list(scores["benchmarks"]) == ["Sums", "Parity"]

    [table] = suites_of_run(read_json(run.summary_file))
    assert [column.header for column in table.columns] == ["iteration", "Sums", "Parity", "score"]
    assert list(table.columns[0].cells) == ["θ_0", "θ_1"]
    assert list(table.columns[3].cells)[1].startswith(f"{expected[1].results['score']:.1f}")

    # A study finds the scores, and a run without them is not done.
    condition = Condition("tpaw", "tpaw", {}, ())
    done = StudyRun(condition, 0, config, output)
    assert done.is_done()
    measures = collect([done])["tpaw"][0]["iterations"][1]
    assert measures["local"] == expected[1].results["score"]
    assert measures["local: Sums"] == expected[1].results["benchmarks"]["Sums"]["score"]
    assert measures_in(collect([done]))[-3:] == ["local", "local: Sums", "local: Parity"]
    shutil.rmtree(run.suite(1, "local"))
    assert not done.is_done()

    # Resuming evaluates what is missing, and nothing else.
    before = {p: p.stat().st_mtime_ns for p in run.suite(0, "local").rglob("*")}
    self_play(config, output)
    assert done.is_done()
    assert {p: p.stat().st_mtime_ns for p in run.suite(0, "local").rglob("*")} == before


def test_a_suite_of_a_run_is_checked_before_anything_is_written(settings, tmp_path):
    settings |= {"evaluate": settings["evaluate"] | {"suites": ["gsm8"]}}
    with refused("evaluate.suites", "gsm8", "gsm8k"):
        self_play(RunConfig.load(settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_task_files_of_a_runs_suite_need_trust(tpaw_, suite, settings, tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    run = ("run", tmp_path / "c.yaml", "--set", f"evaluate.suites={suite}", "-o", tmp_path / "r")
    code, _, err = tpaw_(*run)
    assert code == 2
    complains(err, "--trust", hide={"SUITE": str(suite)})
    assert not (tmp_path / "r").exists()


def test_a_model_from_the_command_line(tpaw_, suite, model_folder, tmp_path, prompts):
    out_folder = tmp_path / "out"
    code, out, err = tpaw_("evaluate", model_folder, "--suite", suite, "--trust", "-o", out_folder)
    assert code == 0, err
    for text in ("Sums (2-shot)", "Parity (1-shot)", "score", "qwen2", f"Results: {out_folder}"):
        assert text in out
    results = json.loads((out_folder / "results.json").read_text())
    assert results["player"] is None
    assert results["settings"]["chat_template"] is False
    assert results["settings"]["fewshot_seed"] == 1234
    assert set(results["versions"]) == {"lm_eval", "tpaw", "transformers", "torch"}
    sums_, parity = results["tasks"]["sums"], results["tasks"]["parity"]
    assert (sums_["num_fewshot"], parity["num_fewshot"]) == (2, 1)
    assert (sums_["metric"], parity["metric"]) == ("exact_match,none", "acc,none")
    assert sums_["version"] == 2.0
    # Each task had its own number of solved examples before the question.
    assert {text.count("Q: ") for text in prompts["generate_until"]} == {3}
    assert {text.count("Q: ") for text in prompts["loglikelihood"]} == {2}

    items = read_items(out_folder / "items" / "parity.jsonl")
    assert [item["id"] for item in items] == list(range(6))
    assert sum(item["score"] for item in items) / 6 == parity["value"]
    for item in items:
        (even, _), (odd, _) = item["resps"]
        assert item["correct"] == ((odd > even) == item["target"])
    items = read_items(out_folder / "items" / "sums.jsonl")
    assert [item["target"] for item in items] == [row["answer"] for row in sums(6, seed=4)]
    assert all("Q:" not in item["completion"] for item in items)
    assert results["score"] == pytest.approx(50 * (sums_["value"] + parity["value"]))
    verify(out_folder / "manifest.json")


def test_a_run_is_evaluated_checkpoint_by_checkpoint_and_once(
    finished, suite, tmp_path, monkeypatch
):
    root = shutil.copytree(finished[0].root, tmp_path / "run")
    (only,) = evaluate_suite(f"{root}@2", str(suite), trust=True)
    assert only.folder == root / "iterations" / "2" / "suites" / "local"
    all_ = evaluate_suite(str(root), str(suite), trust=True)
    assert [one.results["player"] for one in all_] == [0, 1, 2, 3, 4]
    assert all_[2].results == only.results
    assert len({one.results["fingerprint"] for one in all_}) == 5
    assert len({one.results["tasks"]["sums"]["data_hash"] for one in all_}) == 1
    monkeypatch.setattr(tpaw.evaluation.benchmarks.run, "load_model", lambda *a, **k: 1 / 0)
    assert [one.results for one in evaluate_suite(str(root), str(suite), trust=True)] == [
        one.results for one in all_
    ]
    rewrite(suite, fewshot_seed=5)
    with refused("fewshot_seed", 1234, 5):
        evaluate_suite(str(root), str(suite), trust=True)
    rewrite(suite, fewshot_seed=1234)
    with refused("--output x"):
        evaluate_suite(
            str(root), str(suite), trust=True, output=tmp_path.relative_to(tmp_path) / "x"
        )

    item_file = all_[3].folder / "items" / "sums.jsonl"
    item_file.write_text(item_file.read_text().replace('"id": 0', '"id": 7', 1))
    with refused("suites/local/items/sums.jsonl", error=ArtifactError):
        evaluate_suite(str(root), str(suite), trust=True)
    manifests = finished[0].__class__(root).manifests(4)
    assert all_[3].folder / "manifest.json" in manifests  # tpaw run names it too


def test_a_checkpoint_without_weights_is_left_out_and_a_missing_suite_keeps_them(
    finished, suite, tmp_path, capsys
):
    whole, config = finished
    run = RunDirectory(shutil.copytree(whole.root, tmp_path / "run"))
    (stored,) = evaluate_suite(f"{run.root}@1", str(suite), trust=True)
    for i in (1, 2):
        remove_weights(run.checkpoint(i), "keep: last")
    (again,) = evaluate_suite(f"{run.root}@1", str(suite), trust=True)
    assert again == stored
    with refused(f"{run.root}@2", "keep: last"):
        evaluate_suite(f"{run.root}@2", str(suite), trust=True)
    capsys.readouterr()
    found = evaluate_suite(str(run.root), str(suite), trust=True)
    assert [one.results["player"] for one in found] == [0, 1, 3, 4]
    says(capsys.readouterr().err.partition("\n")[0], f"{run.root}@2", "keep: last")
    evaluated = config.evaluate.model_copy(update={"suites": (str(suite),)})
    config = config.model_copy(update={"evaluate": evaluated, "keep": "last"})
    with refused("evaluate.suites", "local", "θ_2", "keep: last"):
        self_play(config, run.root)
    # Whose weights are there is evaluated first.
    other = RunDirectory(shutil.copytree(whole.root, tmp_path / "other"))
    self_play(config, other.root)
    assert all((other.suite(i, "local") / "results.json").exists() for i in range(5))
    assert [bool(other.weights_removed(i)) for i in range(1, 5)] == [True, True, True, False]


@pytest.mark.process
@pytest.mark.usefixtures("forks")
def test_killed_between_tasks_it_goes_on(suite, model_folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    call, log = "kill_driver:evaluate_one_task", tmp_path / "killed.txt"
    assert Forked(call, model_folder, suite, out, out=log).wait(120) == -9, log.read_text()
    assert not is_published(out)
    (out / "items" / ".tmp-parity.jsonl").write_text("half")  # as if killed a moment later
    ran = []
    run_task = tpaw.evaluation.benchmarks.harness.run_task

    def record(model, task, **options):
        ran.append(task.name)
        return run_task(model, task, **options)

    monkeypatch.setattr(tpaw.evaluation.benchmarks.harness, "run_task", record)
    (resumed,) = evaluate_suite(str(model_folder), str(suite), trust=True, output=out)
    assert ran == ["parity"]
    (whole,) = evaluate_suite(str(model_folder), str(suite), trust=True, output=tmp_path / "whole")
    for task in resumed.results["tasks"].values():
        task["seconds"] = 0
    for task in whole.results["tasks"].values():
        task["seconds"] = 0
    assert resumed.results == whole.results
    for name in ("sums", "parity"):
        files = [one.folder / "items" / f"{name}.jsonl" for one in (resumed, whole)]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert not list(out.rglob(".tmp-*"))


def test_data_that_cannot_be_had_is_reported_before_a_model_is_loaded(
    tpaw_,
    suite,
    model_folder,
    tmp_path,
    monkeypatch,
):
    monkeypatch.setattr(tpaw.evaluation.benchmarks.run, "load_model", lambda *a, **k: 1 / 0)
    rewrite(tmp_path / "sums.yaml", dataset_path="nobody/nothing", dataset_kwargs=None)
    rewrite(tmp_path / "parity.yaml", dataset_kwargs={"data_files": {"test": "none.jsonl"}})
    code, _, err = tpaw_(
        "evaluate", model_folder, "--suite", suite, "--trust", "-o", tmp_path / "out"
    )
    assert code == 2
    parts = [f"Sums ({tmp_path}/sums.yaml): ", "nobody/nothing"]
    parts += [f"Parity ({tmp_path}/parity.yaml): ", "none.jsonl"]
    complains(err, *parts, hide={"reason": re.compile(r"(?<=yaml\): ).*")})
    assert not (tmp_path / "out").exists()


def test_what_a_suite_asks_for_must_exist(suite, tmp_path, monkeypatch):
    tree = yaml.safe_load(suite.read_text())
    tree["tasks"][0]["metric"] = "exact_match,strict"
    suite.write_text(yaml.safe_dump(tree))
    with refused("Sums: metric", "'exact_match,strict'"):
        load_tasks(load_suite(str(suite), trust=True))
    few = TaskManager(include_path=tmp_path, include_defaults=False)  # all take seconds to read
    with monkeypatch.context() as patched:
        patched.setattr(tpaw.evaluation.benchmarks.harness, "TaskManager", lambda **options: few)
        tree["tasks"][0] |= {"metric": "exact_match", "task": "sumz"}
        suite.write_text(yaml.safe_dump(tree))
        with refused("'sumz'", "sums"):
            load_tasks(load_suite(str(suite), trust=True))
    tree["tasks"][0] |= {"task": "parity.yaml", "metric": "acc"}
    suite.write_text(yaml.safe_dump(tree))
    with refused("local", "parity"):
        load_tasks(load_suite(str(suite), trust=True))
    rewrite(suite, apply_chat_template=True)
    plain = save_model(tmp_path / "plain", chat=False)
    with refused("apply_chat_template", "plain"):
        evaluate_suite(str(plain), str(suite), trust=True)


def test_the_chat_template_where_there_is_one(suite, model_folder, tmp_path, prompts):
    rewrite(suite, apply_chat_template="auto", tasks=yaml.safe_load(suite.read_text())["tasks"][:1])
    (chat,) = evaluate_suite(str(model_folder), str(suite), trust=True, output=tmp_path / "chat")
    assert chat.results["settings"]["chat_template"] is True
    assert all(text.count("<|user|>Q: ") == 3 for text in prompts["generate_until"])
    assert all(text.endswith("<|assistant|>") for text in prompts["generate_until"])
    plain = save_model(tmp_path / "plain", chat=False)
    (text,) = evaluate_suite(str(plain), str(suite), trust=True, output=tmp_path / "text")
    assert text.results["settings"]["chat_template"] is False


def test_a_task_file_is_code_and_needs_trust(tpaw_, suite, model_folder, tmp_path):
    ran = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(ran)!r}, 'w')\ndef docs(rows): return rows\n")
    with (tmp_path / "sums.yaml").open("a") as file:
        file.write("process_docs: !function evil.docs\n")
    command = ("evaluate", model_folder, "--suite", suite, "-o", tmp_path / "out")
    code, _, err = tpaw_(*command)
    assert code == 2
    complains(err, "Sums", tmp_path / "sums.yaml", "--trust")
    assert not ran.exists()
    assert not (tmp_path / "out").exists()
    assert tpaw_(*command, "--trust")[0] == 0
    assert ran.exists()


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("edit", "part"),
    [
        (lambda at: edit_json(at / "model" / "config.json", rms_norm_eps=0.5), "fingerprint"),
        (lambda at: (at / "model" / "chat_template.jinja").write_text("hi"), "fingerprint"),
        (lambda at: write_jsonl(at / "test.jsonl", sums(6, seed=9)), "task of Sums"),
        (lambda at: rewrite(at / "parity.yaml", doc_to_text="{{question}}"), "task of Parity"),
    ],
    ids=["config", "template", "data", "task"],
)
def test_results_are_of_the_model_and_the_data_that_they_were_computed_with(
    suite, tmp_path, edit, part
):
    save_model(tmp_path / "model")
    work = functools.partial(
        evaluate_suite, str(tmp_path / "model"), str(suite), tmp_path / "out", trust=True
    )
    (before,) = work()
    assert work()[0].results == before.results
    edit(tmp_path)
    with refused(tmp_path / "out", part):
        work()


def test_hub_data_is_known_by_its_commit(suite, model_folder, tmp_path, monkeypatch):
    class Split:
        cache_files: ClassVar = [{"filename": f"/c/org___name/x/0.0.0/{'ab' * 20}/name-test.arrow"}]

    class OfTheHub:
        dataset: ClassVar = {"test": Split, "train": Split}

    harness = tpaw.evaluation.benchmarks.harness
    assert harness.data_commits(OfTheHub) == ["ab" * 20]
    work = functools.partial(
        evaluate_suite, str(model_folder), str(suite), tmp_path / "out", trust=True
    )
    (loaded, _) = load_tasks(load_suite(str(suite), trust=True))
    assert harness.data_commits(loaded.task) == []
    with monkeypatch.context() as patched:  # stopped after the first of two tasks
        patched.setattr(harness, "data_commits", lambda task: ["ab"])
        run_task, stopped = harness.run_task, [False, True]
        patched.setattr(
            harness, "run_task", lambda *a, **k: 1 / 0 if stopped.pop(0) else run_task(*a, **k)
        )
        with pytest.raises(ZeroDivisionError):
            work()
    monkeypatch.setattr(harness, "data_commits", lambda task: ["cd"])
    with refused(tmp_path / "out", "sums", "ab", "cd"):
        work()
    monkeypatch.setattr(harness, "data_commits", lambda task: ["ab"])
    assert work()[0].results["tasks"]["sums"]["data_commits"] == ["ab"]


def not_a_model(folder, kind):
    save_model(folder)
    if kind == "t5":
        T5Config(architectures=["T5ForConditionalGeneration"]).save_pretrained(folder)
    elif kind == "classifier":
        edit_json(folder / "config.json", architectures=["Qwen2ForSequenceClassification"])
    elif kind == "list":
        (folder / "config.json").write_text("[]")
    elif kind == "unknown":
        edit_json(folder / "config.json", model_type="nosuchmodel")
    elif kind == "vocabulary":
        make_model(vocab_size=100).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["t5", "classifier", "list", "unknown", "vocabulary"])
def test_what_cannot_be_evaluated_is_refused_before_it_is_loaded(
    tpaw_, suite, tmp_path, monkeypatch, kind
):
    monkeypatch.setattr(tpaw.evaluation.benchmarks.run, "load_model", lambda *a, **k: 1 / 0)
    model = not_a_model(tmp_path / "model", kind)
    code, _, err = tpaw_("evaluate", model, "--suite", suite, "--trust", "-o", tmp_path / "out")
    assert code == 2
    complains(err, "model.path", model, hide={"reason": re.compile(r"(?<=json \().*(?=\))")})
    assert not (tmp_path / "out").exists()


def test_a_model_that_computes_nan_has_no_score(tpaw_, suite, tmp_path):
    model = make_model(seed=3)
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    model.save_pretrained(save_model(tmp_path / "broken"))
    out = tmp_path / "out"
    columns = yaml.safe_load(suite.read_text())["tasks"]
    for order in (columns, columns[::-1]):  # answers first, then choices first
        rewrite(suite, tasks=order)
        code, _, err = tpaw_(
            "evaluate", tmp_path / "broken", "--suite", suite, "--trust", "-o", out
        )
        assert code == 1
        complains(err, "broken", "NaN", "model.norm.weight")
        assert not is_published(out)


def test_a_task_with_a_name_that_is_no_file_name(tpaw_, suite, model_folder, tmp_path):
    rewrite(tmp_path / "sums.yaml", task="sums_(general)")
    rewrite(tmp_path / "parity.yaml", task="sums__general_")  # the same letters in a file name
    for name in "ab":
        evaluate_suite(str(model_folder), str(suite), tmp_path / name, trust=True)
    names = {path.name for path in (tmp_path / "a" / "items").iterdir()}
    assert len(names) == 2
    assert all(re.fullmatch(r"[\w.-]+", name) for name in names)
    code, out, err = tpaw_("compare", tmp_path / "a", tmp_path / "b")
    assert code == 0, err
    assert "sums_(general)" in out


def test_a_metric_that_is_no_share_is_refused(suite, tmp_path, model_folder):
    rolling = GENERATE | {
        "task": "rolling",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "word_perplexity"}],
    }
    del rolling["generation_kwargs"]
    (tmp_path / "sums.yaml").write_text(yaml.safe_dump(rolling))
    tree = yaml.safe_load(suite.read_text())
    tree["tasks"][0] |= {"metric": "word_perplexity", "num_fewshot": 0}
    suite.write_text(yaml.safe_dump(tree))
    with refused("Sums: metric", "word_perplexity"):
        load_tasks(load_suite(str(suite), trust=True))
    # A metric of the user's own shows what it is only when it is computed.
    (tmp_path / "mine.py").write_text("def score(doc, results): return {'points': 13.7}\n")
    mine = yaml.safe_dump(GENERATE | {"metric_list": [{"metric": "points", "aggregation": "mean"}]})
    (tmp_path / "sums.yaml").write_text(mine + "process_results: !function mine.score\n")
    tree["tasks"][0] |= {"metric": "points"}
    suite.write_text(yaml.safe_dump(tree))
    with refused("sums: metric", "points", 13.7):
        evaluate_suite(str(model_folder), str(suite), tmp_path / "out", trust=True)


def test_without_the_harness_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    monkeypatch.delitem(sys.modules, "tpaw.evaluation.benchmarks.harness")
    with refused("pip install 'tpaw[evaluate]'"):
        import tpaw.evaluation.benchmarks.harness  # noqa: F401


def test_the_starter_is_evaluated_from_the_readme_line(tpaw_, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = functools.partial(tpaw.evaluation.benchmarks.harness.evaluate, limit=40)
    monkeypatch.setattr(tpaw.evaluation.benchmarks.harness, "evaluate", few)
    random.seed(7)
    before = random.getstate()
    code, out, err = tpaw_("evaluate", "tpaw://starter/model", "--suite", "starter")
    assert code == 0, err
    assert random.getstate() == before  # the harness seeds it
    folder = tmp_path / "evaluations" / "model" / "starter"
    assert "Results: evaluations/model/starter" in out
    rows = read_records(DataConfig(path="tpaw://starter/heldout.jsonl"), "data")
    items = read_items(folder / "items" / "starter.jsonl")
    assert [item["target"] for item in items] == [row["answer"] for row in list(rows)[:40]]
    assert 0.3 < sum(item["correct"] for item in items) / 40 < 0.9
    for item in items:
        assert item["correct"] == is_correct(item["completion"], item["target"])
