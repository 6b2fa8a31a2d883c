"""Work in copies of this process gives what the same work gives here."""

from __future__ import annotations

import os
import signal
import time

import pytest
from builders import make_tokenizer, sums, write_jsonl
from messages import refused

from tpaw.config.schema import DataConfig
from tpaw.data import examples as examples_module
from tpaw.data.examples import prepare_examples
from tpaw.errors import InputError, MemoryShortageError
from tpaw.runtime.copies import map_in_copies

pytestmark = pytest.mark.process


def work(item):
    if item == "wrong":
        raise InputError("data.path: x: wrong")
    if item == "bug":
        raise ZeroDivisionError("a bug")
    if item == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    return os.getpid(), item


@pytest.mark.parametrize("count", [0, 1, 2, 11])
def test_results_come_in_order_from_all_copies(count):
    found = list(map_in_copies(work, range(count), 3))
    assert [item for _, item in found] == list(range(count))
    pids = {pid for pid, _ in found}
    assert len(pids) == min(count, 3)
    assert os.getpid() not in pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_results_and_items_may_be_larger_than_a_pipe():
    items = [bytes(1 << 20)] * 5
    assert [item for _, item in map_in_copies(work, items, 2)] == items


def test_errors_arrive_in_their_place():
    results = map_in_copies(work, ["a", "wrong", "b"], 2)
    assert next(results)[1] == "a"
    with refused("data.path", "x", error=InputError):
        next(results)
    with pytest.raises(RuntimeError, match=r"(?s)in work.*ZeroDivisionError: a bug"):
        list(map_in_copies(work, ["bug"], 1))
    with refused(error=MemoryShortageError):
        list(map_in_copies(work, ["killed"], 2))


def test_the_copies_end_when_nobody_wants_their_results():
    results = map_in_copies(work, range(100), 2)
    pids = {next(results)[0], next(results)[0]}
    results.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_the_copies_end_with_the_process_that_made_them():
    """Also if it is killed."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        results = map_in_copies(work, range(10**9), 2)
        os.write(write, b"%d %d\n" % (next(results)[0], next(results)[0]))
        os.kill(os.getpid(), signal.SIGKILL)
    pids = [int(pid) for pid in os.read(read, 100).split()]
    os.waitpid(child, 0)
    deadline = time.monotonic() + 10
    while any(_runs(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(_runs(pid) for pid in pids)


def _runs(pid):
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_examples_are_the_same_from_one_process_and_from_several(tmp_path, monkeypatch):
    rows = [*sums(700), {"question": "", "answer": "a"}, *sums(100, seed=1)]
    config = DataConfig(path=str(write_jsonl(tmp_path / "a.jsonl", rows)), max_skipped=0.5)
    tokenizer = make_tokenizer()
    found = []
    for copies in (1, 3):
        monkeypatch.setattr(examples_module, "_BATCHES_FOR_COPIES", 2)
        monkeypatch.setattr(examples_module, "copies_to_use", lambda copies=copies: copies)
        counts = []
        prepared = prepare_examples(config, "data", tokenizer, (4,), 128, counts.append)
        rows = [(e.id, e.prompt_ids.tolist(), e.target_ids.tolist()) for e in prepared.examples]
        found.append((rows, prepared.skipped, list(prepared.instructions), counts))
    assert found[0] == found[1]
    assert len(found[0][0]) == 800
