"""Suites: what may stand in one, and scores against numbers worked out by hand."""

from __future__ import annotations

from fractions import Fraction

import pytest
import yaml
from builders import write_jsonl
from messages import refused

from tpaw.evaluation.benchmarks.suite import (
    benchmark_scores,
    load_suite,
    suite_names,
    suite_score,
    task_score,
)


def task(benchmark, score, stderr=1.0, **facts):
    return {"benchmark": benchmark, "score": score, "stderr": stderr, "lower_bound": 0.0, **facts}


def write_suite(folder, **changes):
    tree = {
        "name": "mine",
        "tasks": [{"name": "a", "task": "x", "num_fewshot": 0, "metric": "acc"}],
    }
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(tree | changes))
    return str(path)


def one_task(folder, **changes):
    task = {"name": "a", "task": "x", "num_fewshot": 0, "metric": "acc"} | changes
    return write_suite(folder, tasks=[{k: v for k, v in task.items() if v is not None}])


@pytest.mark.parametrize(
    ("value", "bound", "score"),
    [(0.75, 0.5, 50.0), (0.5, 0.0, 50.0), (0.1, 0.2, 0.0), (0.2, 0.2, 0.0), (1.0, 1 / 19, 100.0)],
)
def test_a_score_is_the_way_from_the_bound_to_one(value, bound, score):
    assert task_score(value, bound) == pytest.approx(score)


def test_open_llm_v1_as_the_paper_has_it():
    suite = load_suite("open-llm-v1")
    assert [(t.task, t.num_fewshot, *t.metric_keys) for t in suite.tasks] == [
        ("arc_challenge", 25, "acc_norm,none"),
        ("hellaswag", 10, "acc_norm,none"),
        ("mmlu", 5, "acc,none"),
        ("truthfulqa_mc2", 0, "acc,none"),
        ("winogrande", 5, "acc,none"),
        ("gsm8k", 5, "exact_match,strict-match"),
    ]
    assert suite.apply_chat_template is False


def test_a_group_is_the_plain_mean_of_its_subtasks_and_a_suite_of_its_columns():
    suite = load_suite("open-llm-v1")
    others = {name: task(name, 40.0) for name in ("ARC-C", "HellaSwag", "TruthfulQA", "Winogrande")}
    subjects = {
        "mmlu_large": task("MMLU", 50.0, stderr=3.0, items=1000),
        "mmlu_small": task("MMLU", 90.0, stderr=4.0, items=100),
    }
    columns = benchmark_scores(suite, others | subjects | {"gsm8k": task("GSM8K", 70.0)})
    # (50 + 90) / 2; weighted by size it would be 53.6. Errors: √(3² + 4²) / 2.
    assert columns["MMLU"] == {"score": 70.0, "stderr": 2.5}
    assert suite_score(columns)["score"] == pytest.approx((4 * 40 + 70 + 70) / 6)
    assert list(columns) == [t.name for t in suite.tasks]


def test_subtasks_are_floored_one_by_one():
    suite = load_suite("open-llm-v2")
    musr = next(t for t in suite.tasks if t.name == "MuSR")
    # 2, 5 and 3 choices: (0.6 − 1/2)/(1/2), below 1/5, (1/2 − 1/3)/(2/3).
    values = {"murder_mysteries": 0.6, "object_placements": 0.1, "team_allocation": 0.5}
    scores = {
        name: task_score(value, musr.lower_bound_of(f"leaderboard_musr_{name}"))
        for name, value in values.items()
    }
    assert scores == pytest.approx(
        {"murder_mysteries": 20.0, "object_placements": 0.0, "team_allocation": 25.0}
    )
    others = {t.name: task(t.name, 0.0) for t in suite.tasks if t is not musr}
    columns = benchmark_scores(
        suite, others | {name: task("MuSR", score) for name, score in scores.items()}
    )
    assert columns["MuSR"]["score"] == pytest.approx(15.0)
    assert suite_score(columns)["score"] == pytest.approx(15.0 / 6)


def test_an_interval_only_where_the_score_is_a_share():
    suite = load_suite("gsm8k")
    whole = {"gsm8k": task("GSM8K", 50.0, interval_95=[0.4, 0.6])}
    assert benchmark_scores(suite, whole)["GSM8K"]["interval_95"] == [40.0, 60.0]
    bounded = {"gsm8k": task("GSM8K", 50.0, interval_95=[0.4, 0.6]) | {"lower_bound": 0.25}}
    assert "interval_95" not in benchmark_scores(suite, bounded)["GSM8K"]
    unknown = {"gsm8k": task("GSM8K", 50.0, stderr=None)}
    assert benchmark_scores(suite, unknown)["GSM8K"] == {"score": 50.0, "stderr": None}


def test_bounds_are_one_over_the_choices_that_the_harness_offers():
    lm_eval = pytest.importorskip("lm_eval")

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    root = next(iter(lm_eval.__path__)) + "/tasks/leaderboard"

    def read(name):
        with open(f"{root}/{name}", encoding="utf-8") as file:
            return yaml.load(file, Loader)

    columns = {t.name: t for t in load_suite("open-llm-v2").tasks}
    group = read("bbh_mc/_leaderboard_bbh.yaml")
    expected = {}
    for name in group["task"]:
        choices = read(f"bbh_mc/{name.removeprefix('leaderboard_bbh_')}.yaml")["doc_to_choice"]
        expected[name] = float(Fraction(1, len(choices)))
    assert len(expected) == 24
    assert dict(columns["BBH"].lower_bound) == expected
    assert 1 / columns["GPQA"].lower_bound == len(read("gpqa/_template_yaml")["doc_to_choice"])
    assert set(columns["MuSR"].lower_bound) == set(read("musr/_musr.yaml")["task"])
    # Few-shot counts of the leaderboard are those of the harness's own files.
    for name, file in [
        ("IFEval", "ifeval/ifeval.yaml"),
        ("BBH", "bbh_mc/_fewshot_template_yaml"),
        ("MATH", "math/_template_yaml"),
        ("GPQA", "gpqa/_template_yaml"),
        ("MMLU-Pro", "mmlu_pro/mmlu_pro.yaml"),
    ]:
        assert columns[name].num_fewshot == read(file)["num_fewshot"], name
    assert columns["MuSR"].num_fewshot == read("musr/_template_yaml").get("num_fewshot", 0)


def test_every_suite_of_the_package_can_be_read():
    assert suite_names() == ["gsm8k", "open-llm-v1", "open-llm-v2", "starter"]
    for name in suite_names():
        assert load_suite(name).name == name


def test_a_file_of_the_users(tmp_path):
    write_jsonl(tmp_path / "x.yaml", [])
    suite = load_suite(one_task(tmp_path, task="x.yaml", lower_bound="1/3"))
    (task,) = suite.tasks
    assert task.task == str(tmp_path / "x.yaml")
    assert task.lower_bound == pytest.approx(1 / 3)
    assert task.metric_keys == ["acc,none"]
    assert str(tmp_path) not in str(task.definition())


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        pytest.param({key: value}, [key, *parts], id=f"{key}-{value}")
        for key, value, *parts in [
            ("num_fewshot", None),
            ("num_fewshots", 3, "num_fewshot"),
            ("num_fewshot", -1, -1),
            ("lower_bound", "1/0", "'1/0'"),
            ("lower_bound", 1.0, 1.0),
            ("lower_bound", {"b": "one"}, "one"),
            ("metric", []),
            ("name", "../a", "'../a'"),
        ]
    ],
)
def test_a_bad_task_is_named(tmp_path, changes, parts):
    [key] = changes
    with refused("mine.yaml", f"tasks[0].{key}", *parts):
        load_suite(one_task(tmp_path, **changes))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with refused("a", "task", tmp_path / "none.yaml"):
        load_suite(one_task(tmp_path, task="none.yaml"))


def test_a_bad_suite_is_named(tmp_path):
    with refused("--suite", "'gsm8'", "gsm8k"):
        load_suite("gsm8")
    with refused("other.yaml"):
        load_suite("other.yaml")
    with refused("mine.yaml", "shots"):
        load_suite(write_suite(tmp_path, shots=3))
    with refused("mine.yaml", "tasks"):
        load_suite(write_suite(tmp_path, tasks=[]))
    twice = [{"name": "a", "task": t, "num_fewshot": 0, "metric": "acc"} for t in "xy"]
    with refused("mine.yaml", "a, a"):
        load_suite(write_suite(tmp_path, tasks=twice))


def test_a_subtask_without_a_bound_is_refused(tmp_path):
    (task,) = load_suite(one_task(tmp_path, lower_bound={"b": "1/2"})).tasks
    assert task.lower_bound_of("b") == 0.5
    with refused("a: lower_bound", "c"):
        task.lower_bound_of("c")
