"""Suites: what may stand in one, and scores against numbers worked out by hand."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
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
from tpaw.evaluation.benchmarks.task_file import content_hash


def task(benchmark, score, stderr=1.0, **facts):
    known = {"score": score, "value": score / 100, "stderr": stderr, "lower_bound": 0.0}
    return {"benchmark": benchmark, "items": 100, **known, **facts}


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


def test_gpqa_and_math_are_scored_over_all_their_items_as_on_the_leaderboard():
    """Hugging Face's notebook normalises the group's value; sizes are those of the datasets."""
    gpqa = {"diamond": (198, 0.30), "extended": (546, 0.24), "main": (448, 0.27)}
    sizes = [307, 123, 132, 280, 154, 193, 135]
    values = [0.12, 0.03, 0.02, 0.01, 0.05, 0.2, 0.0]
    tasks = {
        f"leaderboard_gpqa_{name}": task("GPQA", 0.0, items=n, value=value, lower_bound=0.25)
        for name, (n, value) in gpqa.items()
    }
    tasks |= {
        f"leaderboard_math_{i}_hard": task("MATH", 100 * value, items=n)
        for i, (n, value) in enumerate(zip(sizes, values, strict=True))
    }
    others = {"IFEval": 32.0, "BBH": 25.01, "MuSR": 14.30, "MMLU-Pro": 17.38}
    tasks |= {name: task(name, score) for name, score in others.items()}
    columns = benchmark_scores(load_suite("open-llm-v2"), tasks)
    # (198 · 0.30 + 546 · 0.24 + 448 · 0.27) / 1192 = 0.261242; (0.261242 − 1/4) / (3/4) = 0.014989
    assert columns["GPQA"]["value"] == pytest.approx(311.4 / 1192)
    assert columns["GPQA"]["score"] == pytest.approx(1.4989, abs=1e-4)
    assert columns["MATH"]["score"] == pytest.approx(100 * 92.27 / 1324)
    assert round(columns["MATH"]["score"], 2) == 6.97
    assert round(suite_score(columns)["score"], 2) == 16.19


def test_the_error_of_a_pooled_group_is_that_of_the_harness():
    """The variance within subtasks, from the items themselves, over all items."""
    rng = np.random.default_rng(0)
    items = [rng.random(n) < p for n, p in [(40, 0.2), (7, 0.5), (90, 0.9)]]
    bound = 0.25
    tasks = {
        str(i): task(
            "GPQA",
            0.0,
            stderr=100 * one.std(ddof=1) / np.sqrt(len(one)) / (1 - bound),
            items=len(one),
            value=one.mean(),
            lower_bound=bound,
        )
        for i, one in enumerate(items)
    }
    suite = load_suite("open-llm-v2")
    suite = suite.model_copy(update={"tasks": [t for t in suite.tasks if t.name == "GPQA"]})
    found = benchmark_scores(suite, tasks)["GPQA"]
    total = sum(map(len, items))
    variance = sum(((one - one.mean()) ** 2).sum() for one in items) / (total - len(items))
    expected = 100 * np.sqrt(variance / total) / (1 - bound)
    assert found["stderr"] == pytest.approx(expected)
    assert found["value"] == pytest.approx(np.concatenate(items).mean())
    metrics = pytest.importorskip("lm_eval.api.metrics")
    errors = [one.std(ddof=1) / np.sqrt(len(one)) for one in items]
    theirs = metrics.pooled_sample_stderr(errors, [len(one) for one in items])
    assert found["stderr"] == pytest.approx(100 * theirs / (1 - bound))
    tasks["1"]["stderr"] = None
    assert benchmark_scores(suite, tasks)["GPQA"]["stderr"] is None


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
    path = one_task(tmp_path, task="x.yaml", lower_bound="1/3")
    with refused("mine.yaml", tmp_path / "x.yaml", "--trust"):
        load_suite(path)
    suite = load_suite(path, trust=True)
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
            ("pool", "yes", "'yes'"),
        ]
    ],
)
def test_a_bad_task_is_named(tmp_path, changes, parts):
    [key] = changes
    with refused("mine.yaml", f"tasks[0].{key}", *parts):
        load_suite(one_task(tmp_path, **changes))


def test_a_pooled_group_has_one_bound(tmp_path):
    with refused("mine.yaml", "tasks[0]", "lower_bound", "pool"):
        load_suite(one_task(tmp_path, pool=True, lower_bound={"b": "1/2"}))


def task_folder(folder):
    """A task with an include, a function, and data in two places."""
    files = {
        "task.yaml": "include: base.yaml\ntask: t\nprocess_docs: !function utils.docs\n"
        "dataset_path: json\n"
        "dataset_kwargs: {data_files: {test: [data/a.jsonl, 'data/b*.jsonl']}}\n",
        "base.yaml": "doc_to_text: '{{x}}'\nprocess_results: !function more/code.score\n",
        "utils.py": "def docs(rows): return rows\n",
        "more/code.py": "def score(*x): return 1\n",
        "data/a.jsonl": '{"x": 1}\n',
        "data/b1.jsonl": '{"x": 2}\n',
        "data/c.jsonl": '{"x": 3}\n',
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return files


def test_a_task_file_is_known_by_every_local_file_that_it_names(tmp_path):
    files = task_folder(tmp_path / "a")
    task_folder(tmp_path / "copy")
    before = content_hash(tmp_path / "a" / "task.yaml")
    assert content_hash(tmp_path / "copy" / "task.yaml") == before
    decisive = set()
    for name, text in files.items():
        (tmp_path / "a" / name).write_text(text + "# edited\n")
        if content_hash(tmp_path / "a" / "task.yaml") != before:
            decisive.add(name)
        (tmp_path / "a" / name).write_text(text)
    assert decisive == set(files) - {"data/c.jsonl"}


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
