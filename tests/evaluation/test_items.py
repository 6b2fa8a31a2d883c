"""Files of items."""

from __future__ import annotations

import re

from tpaw.evaluation.items import items_file, read_items, write_items


def test_every_task_has_a_file_of_its_own():
    assert items_file("mmlu_pro-5.shot") == "items/mmlu_pro-5.shot.jsonl"
    names = ["a_b", "a/b", "a:b", "../b", "ä_b", "a b"]
    files = [items_file(name) for name in names]
    assert len(set(files)) == len(names)
    assert all(re.fullmatch(r"items/[\w.-]+\.jsonl", file, re.ASCII) for file in files)


def test_items_survive_the_disk(tmp_path):
    items = [{"id": 1, "text": "θ\u2028\n"}, {"id": 2, "score": None}]
    write_items(tmp_path / "a.jsonl", items)
    assert read_items(tmp_path / "a.jsonl") == items
