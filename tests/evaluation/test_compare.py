"""`tpaw compare` over copies of a finished run whose outcomes are known."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
from messages import complains, prose, says

from tpaw.cli.main import main
from tpaw.evaluation.items import read_items, write_items
from tpaw.statistics.over_items import mean_interval, wilson_interval
from tpaw.storage.artifacts import publishing, read_manifest, write_json, write_manifest
from tpaw.storage.run_directory import RunDirectory
from tpaw.storage.seals import seal_text


@pytest.fixture
def compare(monkeypatch, capsys, tmp_path):
    """Run `tpaw compare` in this process; gives its JSON, stdout and stderr."""

    def run(*arguments, code=0):
        output = tmp_path / "comparison.json"
        output.unlink(missing_ok=True)
        texts = map(str, (*arguments, "--json", output))
        monkeypatch.setattr(sys, "argv", ["tpaw", "compare", *texts])
        found = 0
        try:
            main()
        except SystemExit as exit_:
            found = exit_.code or 0
        out, err = capsys.readouterr()
        assert found == code, err
        assert "Traceback" not in err
        return json.loads(output.read_text()) if output.exists() else None, out, err

    return run


def republish(folder):
    """Make the manifest say what is there now."""
    meta = read_manifest(folder)
    del meta["files"]
    write_manifest(folder, meta)


def edit(folder, name, change):
    """Change every item of a file; `change` gets its position and returns what is new."""
    items = read_items(folder / name)
    write_items(folder / name, [item | change(i, item) for i, item in enumerate(items)])
    republish(folder)


@pytest.fixture
def copies(finished, tmp_path):
    """The same run twice; θ_4 of each solves the first 2 of 10 items."""
    runs = []
    for name in ("a", "b"):
        shutil.copytree(finished[0].root, tmp_path / name)
        run = RunDirectory(tmp_path / name)
        edit(run.evaluation(4), "exact_match.jsonl", lambda i, item: {"correct": i < 2})
        runs.append(run)
    return runs


def rows_of(comparison, measure):
    return [row for row in comparison["rows"] if row["measure"] == measure]


def test_identical_systems_differ_by_nothing(compare, copies):
    a, b = copies
    found, out, _ = compare(a.root, b.root)
    assert found["systems"] == [f"{a.root}@4", f"{b.root}@4"]
    assert (found["suite"], found["tests"], found["notes"]) == (None, 3, [])
    assert [row["measure"] for row in found["rows"]] == [
        measure for measure in ("accuracy", "target_logp", "gap") for _ in range(2)
    ]
    for row in found["rows"][1::2]:
        assert (row["difference"], row["p_value"], row["holm_p_value"]) == (0.0, 1.0, 1.0)
    assert found["rows"][1]["only_baseline"] == found["rows"][1]["only_system"] == 0
    assert found["rows"][3]["difference_interval_95"] == [0.0, 0.0]
    assert found["rows"][0]["value"] == 0.2
    assert found["rows"][0]["interval_95"] == list(wilson_interval(2, 10))
    assert found["rows"][0]["p_value"] is None
    says(prose(out), 3)
    assert "0 : 0" in out


def test_a_known_shift_is_found(compare, copies):
    a, b = copies
    # Right on items 1 to 9: 0 is lost, 2 to 9 are won. Every target is likelier by 1 to 1.9 nats.
    edit(b.evaluation(4), "exact_match.jsonl", lambda i, item: {"correct": i > 0})
    gains = [1 + i / 10 for i in range(10)]
    edit(
        b.evaluation(4),
        "logps.jsonl",
        lambda i, item: {"target_logp": item["target_logp"] + gains[i]},
    )
    found, out, _ = compare(a.root, f"{b.root}@4", a.evaluation(4))
    _, system, same = rows_of(found, "accuracy")
    assert system["value"] == 0.9
    assert system["difference"] == pytest.approx(0.7)
    assert (system["only_baseline"], system["only_system"]) == (1, 8)
    assert system["p_value"] == pytest.approx(2 * (1 + 9) / 2**9)
    assert "1 : 8" in out
    assert same["system"] == str(a.evaluation(4))
    assert same["p_value"] == 1.0
    for measure in ("target_logp", "gap"):
        _, system, same = rows_of(found, measure)
        assert system["difference"] == pytest.approx(1.45)
        assert system["difference_interval_95"] == pytest.approx(mean_interval(gains))
        assert system["p_value"] == 2 / 2**10  # all of 10 differences have one sign
        assert same["p_value"] == 1.0
    # Of 6 p-values: 6 · 2/1024, 5 · 2/1024, 4 · 20/512, and three of 1.
    assert found["tests"] == 6
    assert [row["holm_p_value"] for row in found["rows"] if row["holm_p_value"]] == pytest.approx(
        [4 * 20 / 512, 1.0, 12 / 1024, 1.0, 12 / 1024, 1.0]
    )


def test_checkpoints_of_one_run_and_its_newest(compare, copies):
    a, _ = copies
    found, _, _ = compare(f"{a.root}@0", f"{a.root}@4", a.root)
    assert found["systems"] == [f"{a.root}@0", f"{a.root}@4", f"{a.root}@4"]
    start = read_items(a.evaluation(0) / "logps.jsonl")
    first = sum(item["target_logp"] for item in start) / 10
    assert rows_of(found, "target_logp")[0]["value"] == pytest.approx(first)
    gap = first - sum(item["initial_answer_logp"] for item in start) / 10
    assert rows_of(found, "gap")[0]["value"] == pytest.approx(gap)


def test_gaps_against_other_answers_are_left_out(compare, copies):
    a, b = copies
    with (b.evaluation(0) / "initial_answers.parquet").open("ab") as file:
        file.write(b" ")
    republish(b.evaluation(0))
    found, out, _ = compare(a.root, b.root)
    assert rows_of(found, "gap") == []
    assert found["tests"] == 2
    [note] = found["notes"]
    says(note, "gap", "θ_0", f"{a.root}@4", f"{b.root}@4")
    assert note in out


def test_items_are_matched_by_id(compare, copies):
    a, b = copies
    expected, _, _ = compare(f"{a.root}@3", b.root)
    for name in ("exact_match.jsonl", "logps.jsonl"):
        items = read_items(b.evaluation(4) / name)
        write_items(b.evaluation(4) / name, items[::-1])
    republish(b.evaluation(4))
    found, _, _ = compare(f"{a.root}@3", b.root)
    for row, before in zip(found["rows"], expected["rows"], strict=True):
        assert row.pop("value") == pytest.approx(before.pop("value"))
        assert row == before


def write_suite(folder, scores, *, binary=True, **changes):
    """What `tpaw evaluate` leaves of a suite of one task or two."""
    facts = {
        "metric": "acc,none",
        "num_fewshot": 5,
        "version": 3.0,
        "items": len(scores),
        "value": 0.5,
        "score": 50.0,
        "data_hash": "d",
    }
    results = {
        "suite": "mini",
        "player": None,
        "name": folder.name,
        "fingerprint": "f",
        "versions": {"lm_eval": "0.4.13", "transformers": "5.23.0"},
        "settings": {"fewshot_seed": 1234},
        "score": changes.pop("average", 50.0),
    }
    tasks = changes.pop("tasks", ["sums"])
    documents = changes.pop("documents", range(len(scores)))
    for key in ("suite", "settings", "versions"):
        results[key] = changes.pop(key, results[key])
    results["tasks"] = dict.fromkeys(tasks, facts | changes)
    with publishing(folder, {}) as temporary:
        (temporary / "items").mkdir()
        for task in tasks:
            items = [
                {"id": i, "doc_hash": f"h{i}", "score": scores[i]}
                | ({"correct": bool(scores[i])} if binary else {})
                for i in documents
            ]
            write_items(temporary / "items" / f"{task}.jsonl", items)
        write_json(temporary / "results.json", results)
    return folder


def test_suites_of_runs_and_of_models(compare, copies, tmp_path):
    a, b = copies
    write_suite(a.suite(4, "mini"), [0] * 8 + [1], tasks=["sums", "words"], average=40.0)
    write_suite(b.suite(2, "mini"), [1] * 9, tasks=["sums", "words"], average=60.0)
    model = write_suite(
        tmp_path / "model", [0] * 9, tasks=["sums", "words"], documents=range(8, -1, -1)
    )
    found, out, _ = compare(a.root, f"{b.root}@2", model, "--suite", "mini")
    assert found["suite"] == "mini"
    assert found["tests"] == 4
    better, worse = rows_of(found, "words")[1:]
    assert (better["only_baseline"], better["only_system"]) == (0, 8)
    assert better["p_value"] == 2 / 2**8
    assert better["holm_p_value"] == pytest.approx(4 * 2 / 2**8)
    assert (worse["only_baseline"], worse["only_system"], worse["p_value"]) == (1, 0, 1.0)
    average = rows_of(found, "average, %")
    assert [row["value"] for row in average] == [40.0, 60.0, 50.0]
    assert [row["difference"] for row in average] == [None, 20.0, 10.0]
    assert all(row["p_value"] is None for row in average)
    says(prose(out), "mini")
    assert compare(a.suite(4, "mini"), model)[0]["suite"] == "mini"  # the folders say so


def test_continuous_tasks_and_other_versions(compare, tmp_path):
    first = write_suite(tmp_path / "a", [0.1, 0.2, 0.4], binary=False)
    second = write_suite(
        tmp_path / "b",
        [0.2, 0.4, 0.8],
        binary=False,
        versions={"lm_eval": "0.4.13", "transformers": "5.24.0"},
    )
    found, out, _ = compare(first, second)
    row = found["rows"][1]
    assert row["difference"] == pytest.approx(0.7 / 3)
    assert row["p_value"] == row["holm_p_value"] == 2 / 2**3
    assert row["only_system"] is None
    [note] = found["notes"]
    says(note, "transformers", "5.23.0", first, "5.24.0", second)
    assert note in out
    assert len(found["rows"]) == 2  # one task's average is the task
    # Scores that happen to be 0 and 1 are compared as what the others are.
    whole = write_suite(tmp_path / "c", [1, 0, 1])
    found, _, _ = compare(whole, first, whole)
    assert [row["only_system"] for row in found["rows"]] == [None] * 3
    assert found["rows"][2]["p_value"] == 1.0


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        pytest.param(changes, parts, id=name)
        for name, changes, *parts in [
            ("shots", {"num_fewshot": 0}, "sums", "num_fewshot", 5, 0, "{a}", "{b}"),
            ("version", {"version": 2.0}, "sums", "version", 3.0, 2.0, "{a}", "{b}"),
            ("metric", {"metric": "f1,none"}, "sums", "metric", "'acc,none'", "'f1,none'"),
            ("harness", {"versions": {"lm_eval": "0.4.9"}}, "lm_eval", "'0.4.13'", "'0.4.9'"),
            ("seed", {"settings": {"fewshot_seed": 1}}, "settings.fewshot_seed", 1234, 1),
            ("limit", {"settings": {"fewshot_seed": 1234, "limit": 3}}, "limit", None, 3),
            ("another task more", {"tasks": ["sums", "words"]}, "words", "{a}", "{b}"),
            ("another task", {"tasks": ["words"]}, "sums", "{a}", "{b}"),
            ("fewer documents", {"documents": [0, 1]}, 3, 2, "{a}", "'2'"),
            ("a document twice", {"documents": [0, 1, 2, 2]}, "{b}", "'2'"),
            ("one document", {"documents": [0]}, "{b}", 1),
            ("no score", {"scores": [1, 1, None]}, "{b}", "'2'", None),
            ("score nan", {"scores": [1, 1, float("nan")]}, "{b}", "'2'", "nan"),
            ("suite", {"suite": "other"}, "{a}", "mini", "{b}", "other", "--suite"),
        ]
    ],
)
def test_suites_that_are_not_comparable(changes, parts, compare, tmp_path):
    a = write_suite(tmp_path / "a", [1, 0, 1])
    b = write_suite(tmp_path / "b", changes.pop("scores", [1, 1, 1]), **changes)
    _, _, err = compare(a, b, code=2)
    complains(err, *(str(part).format(a=a, b=b) for part in parts))


def test_another_document_of_the_same_id(compare, tmp_path):
    a, b = (write_suite(tmp_path / name, [1, 0, 1]) for name in "ab")
    edit(b, "items/sums.jsonl", lambda i, item: {"doc_hash": "x"} if i == 1 else {})
    _, _, err = compare(a, b, code=2)
    complains(err, "sums", "'1'", a, b)


def test_runs_that_are_not_comparable(compare, copies, tmp_path):
    a, b = copies
    _, _, err = compare(a.root, code=2)
    complains(err, 1)
    _, _, err = compare(a.root, b.root, "--suite", "mini", code=2)
    complains(err, f"{a.root}@4", "mini", f"tpaw evaluate {a.root}@4")
    model = write_suite(tmp_path / "model", [1, 0, 1])
    _, _, err = compare(a.root, model, code=2)
    complains(err, f"{a.root}@4", model, "mini")
    _, _, err = compare(model, a.evaluation(4), "--suite", "mini", code=2)
    complains(err, a.evaluation(4), "--suite mini")
    _, _, err = compare(a.root, f"{b.root}@7", code=2)
    complains(err, f"{b.root}@7")
    _, _, err = compare(a.root, tmp_path / "nothing", code=2)
    complains(err, tmp_path / "nothing")
    shutil.copytree(b.evaluation(4), tmp_path / "x" / "y" / "moved")
    _, _, err = compare(a.root, tmp_path / "x" / "y" / "moved", code=2)
    complains(err, tmp_path / "x" / "y" / "moved")
    shutil.rmtree(b.evaluation(4))
    _, _, err = compare(a.root, b.root, code=2)
    complains(err, f"{b.root}@4", f"tpaw run {b.root}")


def test_runs_with_other_items_or_budgets(compare, copies):
    a, b = copies
    edit(b.evaluation(4), "logps.jsonl", lambda i, item: {"id": "9-0"} if i == 9 else {})
    _, _, err = compare(a.root, b.root, code=2)
    complains(err, "target_logp", 10, 9)
    text = b.config_file.read_text().rpartition("# sha256")[0]
    b.config_file.write_text(seal_text(text.replace("max_new_tokens: 12", "max_new_tokens: 13")))
    _, _, err = compare(a.root, b.root, code=2)
    complains(err, "accuracy", "max_new_tokens", 12, f"{a.root}@4", 13, f"{b.root}@4")
    (b.evaluation(4) / "exact_match.jsonl").unlink()
    republish(b.evaluation(4))
    _, _, err = compare(a.root, b.root, code=2)
    complains(err, "accuracy", f"{a.root}@4", f"{b.root}@4")


def test_damaged_outcomes_are_not_compared(compare, copies, tmp_path):
    a, b = copies
    with (b.evaluation(4) / "logps.jsonl").open("a") as file:
        file.write("{}\n")
    _, _, err = compare(a.root, b.root, code=1)
    complains(err, "logps.jsonl")
    republish(b.evaluation(4))
    _, _, err = compare(a.root, b.root, code=2)
    complains(err, b.evaluation(4), "KeyError('target_logp')")


def test_a_json_file_that_cannot_be_written(monkeypatch, capsys, copies, tmp_path):
    a, _ = copies
    target = tmp_path / "none" / "c.json"
    monkeypatch.setattr(sys, "argv", ["tpaw", "compare", str(a.root), "--json", str(target)])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    complains(capsys.readouterr().err, f"--json {target}")


def test_markup_in_a_name_is_text(compare, tmp_path):
    a, b = (write_suite(tmp_path / name, [1, 0, 1]) for name in ("[red]a", "b"))
    _, out, _ = compare(a, b)
    assert "[red]a" in "".join(out.split())
