"""What a person sees while a run goes on: the view, the time left, and the place for both."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from rich.console import Group

import tpaw.runtime.progress
from tpaw.config.plan import plan_run
from tpaw.report.forecast import Running, running_stage, seconds_left
from tpaw.report.live import live_view
from tpaw.runtime.console import TextConsole
from tpaw.runtime.progress import Bar, note, progress, screen
from tpaw.storage.run_directory import RunDirectory

HOSTILE = "\x1b[31mred\x07 [bold]x[/bold] :smile:"


def terminal():
    return TextConsole(file=io.StringIO(), width=100, height=30, force_terminal=True)


def seconds(*entries, method="self_play", ended=None):
    players = [{"iteration": i, "seconds": entry} for i, entry in enumerate(entries)]
    return {"players": players, "method": method, "ended": ended}


def test_the_time_left_by_hand(finished):
    _, config = finished
    plans = plan_run(config, 24)  # epochs 2, 1, 1, 1 of 24, 48, 72, 72 triples in batches of 8
    assert [plan.optimizer_steps for plan in plans] == [6, 6, 9, 9]
    assert [plan.to_score for plan in plans] == [48, 96, 144, 144]
    first = {"generate": 2.0, "score": 4.8, "train": 12.0, "evaluate": 3.0}
    start = {"evaluate": 5.0}
    assert seconds_left(seconds({}, {}, {}, {}, {}), plans) is None
    assert seconds_left(seconds(start, {}, {}, {}, {}), plans) is None
    done = seconds(start, first, {}, {}, {})
    # 3 × 2 to generate, 384 pairs at .1, 24 steps at 2, 3 evaluations at 4
    assert seconds_left(done, plans) == pytest.approx(6 + 38.4 + 48 + 12)
    half = seconds(start, first, {"generate": 4.0, "score": 4.8}, {}, {})
    # 2 × 3; 288 pairs at 9.6/144; 24 steps; 3 evaluations
    assert seconds_left(half, plans) == pytest.approx(6 + 288 * 9.6 / 144 + 48 + 12)
    assert seconds_left(seconds(start, *[first] * 4), plans) == 0
    assert (
        seconds_left(seconds({}, *[{"generate": 1.0, "score": 1.0, "train": 1.0}] * 4), plans) == 0
    )
    assert seconds_left({**done, "ended": "worse"}, plans) == 0


def test_what_a_bar_has_done_is_not_left(finished):
    _, config = finished
    plans = plan_run(config, 24)
    first = {"generate": 2.0, "score": 4.8, "train": 12.0, "evaluate": 3.0}
    start = {"evaluate": 5.0}

    def left(bar, *entries, **others):
        summary = seconds(start, first, *entries, *[{}] * (3 - len(entries)), **others)
        running = running_stage(bar, summary, plans)
        less = seconds_left(summary, plans) - seconds_left(summary, plans, running)
        return running, pytest.approx(less)

    assert plans[1].to_generate == 24
    assert left(Bar(6, 24, "prompts")) == (Running("generate", 6), 0.5)  # a quarter of 2 s
    assert left(Bar(24, 24, "prompts")) == (Running("generate", 24), 2.0)
    # 96 pairs of two players, at .1; the bar of one of them counts what is missing, 40 of it.
    assert left(Bar(10, 40, "sequences"), {"generate": 2.0}) == (Running("score", 10), 1.0)
    # 2 s a step
    scored = {"generate": 2.0, "score": 9.6}
    assert left(Bar(4, 6, "steps"), scored) == (Running("train", 4), 8.0)
    # Work of another kind, and an evaluation, whose bars are parts of it.
    assert left(Bar(4, 6, "bytes"), scored) == (None, 0)
    assert left(None, scored) == (None, 0)
    trained = scored | {"train": 12.0}
    assert left(Bar(5, 10, "prompts"), trained) == (None, 0)
    whole = seconds(start, *[first] * 4)
    assert running_stage(Bar(5, 10, "prompts"), whole, plans) is None
    # A critic counts as one, whatever the number of its steps: half of 7 s.
    critic = seconds(start, first | {"critic": 7.0}, {"generate": 2.0}, {}, {}, method="critic")
    running = running_stage(Bar(50, 100, "steps"), critic, plans)
    assert running == Running("critic", 0.5)
    less = seconds_left(critic, plans) - seconds_left(critic, plans, running)
    assert less == pytest.approx(3.5)


def test_a_critic_that_was_not_fitted_yet_is_not_guessed(finished):
    _, config = finished
    plans = plan_run(config, 24)
    first = {"generate": 2.0, "score": 4.8, "train": 12.0}
    assert seconds_left(seconds({}, first, {}, {}, {}, method="critic"), plans) is None
    with_critic = seconds({}, first | {"critic": 7.0}, {}, {}, {}, method="critic")
    without = seconds({}, first, {}, {}, {})
    assert seconds_left(with_critic, plans) == pytest.approx(seconds_left(without, plans) + 21)


def shown(view):
    console = TextConsole(file=io.StringIO(), width=140)
    console.print(view)
    return console.file.getvalue()


def test_the_view_of_a_run_half_done_and_finished(finished, tmp_path):
    run, config = finished
    text = shown(live_view(run, config, 140)(None))
    assert "finished" in text
    assert "next" not in text
    assert "alarm: " in text
    half = RunDirectory(shutil.copytree(run.root, tmp_path / "run"))
    for i in (3, 4):
        shutil.rmtree(half.iteration(i - 1).folder)
    lines = shown(live_view(half, config, 140)(None)).splitlines()
    assert re.search(r"stages done: \d+, about .* of work left", " ".join(lines[:2]))
    assert any("next  [3/4] generate with θ_2" in line for line in lines)
    assert any("θ_2" in line for line in lines)
    assert not any("│       θ_3" in line for line in lines)


def test_the_time_left_falls_while_a_bar_advances(finished, tmp_path):
    run, config = finished
    half = RunDirectory(shutil.copytree(run.root, tmp_path / "run"))
    for i in (3, 4):
        shutil.rmtree(half.iteration(i - 1).folder)
    view = live_view(half, config, 140)
    lines = [" ".join(shown(view(bar)).split()) for bar in (None, Bar(12, 24, "prompts"))]
    assert "of work left with the whole of this stage" in lines[0]
    assert "of work left next" in lines[1]
    seen, asked = [], []

    def describe():
        asked.append(1)
        number = len(asked)
        return lambda bar: seen.append((number, bar)) or "view"

    with screen(describe, terminal()):
        live = tpaw.runtime.progress._screen.live
        with progress("generate", 24, "prompts") as advance:
            advance(12)
            live.refresh()
            advance(12)
        live.refresh()  # between two bars the work of the first is done
        between = seen[-1]
        with progress("train", 6, "steps"):
            live.refresh()
    assert (1, Bar(12, 24, "prompts")) in seen
    assert between == (1, Bar(24, 24, "prompts"))
    assert (2, Bar(0, 6, "steps")) in seen
    assert {unit for number, (_, _, unit) in seen if number == 1} == {"prompts"}


def test_no_number_is_cut_in_a_narrow_terminal(finished):
    run, config = finished
    console = TextConsole(file=io.StringIO(), width=80)
    console.print(live_view(run, config, console.width)(None))
    text = console.file.getvalue()
    table = [line for line in text.splitlines() if line.startswith(("│", "┃"))]
    assert not any("…" in line for line in table)
    assert len(table) == 6  # each checkpoint has one line
    for entry in json.loads(run.summary_file.read_text())["players"]:
        low, high = entry["evaluation"]["exact_match"]["interval_95"]
        assert f"[{low:.3f}, {high:.3f}]" in text
    assert "A terminal of 126 columns shows more" in " ".join(text.split())


def test_a_note_stands_above_the_view():
    """Read by a terminal's rules: a line that is erased later was not seen."""
    master, slave = os.openpty()
    code = (
        "import time\n"
        "from tpaw.runtime.progress import Bar, note, progress, screen\n"
        "with screen(lambda: lambda bar: 'view\\n' * 3):\n"
        "    for name in ('first', 'second'):\n"
        "        with progress(name, 1, 'rows') as advance:\n"
        "            advance(1)\n"
        "            time.sleep(0.4)\n"
        "        note(f'alarm of {name}')\n"
        "        time.sleep(0.4)\n"
    )
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    with subprocess.Popen([sys.executable, "-c", code], stderr=slave, env=environment) as process:
        os.close(slave)
        data = b""
        with contextlib.suppress(OSError):  # the other end is closed
            while part := os.read(master, 4096):
                data += part
    os.close(master)
    assert process.returncode == 0
    shown = [re.sub(r" in [\d.]+ s", "", line) for line in screen_of(data.decode())[:4]]
    assert shown == ["first: 1 rows", "alarm of first", "second: 1 rows", "alarm of second"]


def screen_of(text):
    """The lines on a terminal that got a text with the few commands that rich uses."""
    lines, row = [""], 0
    for part in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", text):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part == "\x1b[2K":
            lines[row] = ""
        elif found := re.fullmatch(r"\x1b\[(\d+)A", part):
            row -= int(found[1])
        elif part != "\r" and not part.startswith("\x1b"):
            lines[row] += part
    return lines


def test_one_place_for_the_bar_and_the_view(monkeypatch):
    console, asked = terminal(), []
    monkeypatch.setattr("sys.stderr", console.file)

    def describe():
        asked.append(1)
        number = len(asked)
        return lambda bar: Group(f"view {number}", HOSTILE)

    with screen(describe, console):
        for name in ("generate", HOSTILE):
            with progress(name, 3, "prompts") as advance:
                advance(1, HOSTILE)
                advance(2)
        note("a note")
    text = console.file.getvalue()
    assert len(asked) == 2
    assert "generate: 3 prompts in 0.0 s" in text
    assert "view 2" in text
    assert text.count(r"[31mred\x07 [bold]x[/bold] :smile:") >= 2
    assert not set(text) & set("\x07")
    assert "\x1b[31mred" not in text
    assert tpaw.runtime.progress._screen is None
    with progress("alone", 1, "rows", console) as advance:
        advance(1)
    assert len(asked) == 2


def test_a_view_that_fails_costs_nothing_and_an_error_in_the_work_comes_through():
    console = terminal()

    def describe():
        raise RuntimeError("no view")

    with screen(lambda: lambda bar: describe(), console), progress("drawn", 1, "rows") as advance:
        advance(1)
    assert "drawn: 1 rows in" in console.file.getvalue()

    def work():
        with progress("first", 1, "rows") as advance:
            advance(1)
        with progress("second", 1, "rows"):
            raise KeyError("work")

    with pytest.raises(KeyError, match="work"), screen(describe, console):
        work()
    text = console.file.getvalue()
    assert "first: 1 rows in" in text
    assert "second: " not in text
    assert tpaw.runtime.progress._screen is None


def test_without_a_terminal_nothing_changes(capsys):
    here = screen(lambda: pytest.fail("nobody sees it"), TextConsole(file=io.StringIO()))
    with here, progress("work", 2, "rows") as advance:
        advance(2)
    assert "work: 2 rows in 0.0 s" in capsys.readouterr().err
