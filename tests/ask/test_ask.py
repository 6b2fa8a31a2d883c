"""`tpaw ask`: prompts that a person types, answered by one or two checkpoints."""

from __future__ import annotations

import io
import json
import os
import signal
from types import SimpleNamespace

import pytest
from builders import make_tokenizer, save_model, starter_rows, sums, write_jsonl

from tpaw.ask.speaker import load_speaker
from tpaw.ask.terminal import answer_lines, talk
from tpaw.data.chat_template import ChatFormat, is_templated
from tpaw.data.examples import read_examples
from tpaw.data.formats import Dialogue
from tpaw.errors import InputError
from tpaw.generation.batching import Batching, BatchingChoice
from tpaw.models.references import find_checkpoint
from tpaw.runtime.console import TextConsole

MODEL = "tpaw://starter/model"
QUESTIONS = [row["question"] for row in starter_rows(8)]


def speaker(reference, *overrides, greedy=True, max_new_tokens=None):
    return load_speaker(
        find_checkpoint(str(reference)),
        greedy=greedy,
        max_new_tokens=max_new_tokens,
        overrides=overrides,
    )


def said(speaker, prompt):
    answer = speaker.answer(prompt)
    while answer.advance():
        pass
    return answer.text


def answered(tpaw_, reference, rows, tmp_path, *more):
    """What `tpaw answer` says to the rows."""
    data = write_jsonl(tmp_path / "prompts.jsonl", rows)
    folder = tmp_path / "answers"
    arguments = ("answer", reference, "--data", data, "--greedy", "-o", folder, *more)
    assert tpaw_(*arguments)[0] == 0
    return [entry["output"] for entry in json.loads((folder / "outputs.json").read_text())]


@pytest.mark.parametrize("i", [0, 1])
def test_it_says_greedily_what_answer_says(tpaw_, adapted, tmp_path, i):
    """Of a run with plain prompts and an adapter."""
    rows = [{"prompt": question, "completion": "x"} for question in QUESTIONS]
    expected = answered(tpaw_, f"{adapted.root}@{i}", rows, tmp_path)
    assert len(set(expected)) > 4
    found = speaker(f"{adapted.root}@{i}")
    assert [said(found, question) for question in QUESTIONS] == expected
    # A chat template would make other answers.
    chat = speaker(f"{adapted.root}@{i}", "data.template=chat")
    assert [said(chat, question) for question in QUESTIONS] != expected


def test_prompts_are_those_that_a_run_has_trained_on(finished, adapted):
    for run in (finished[0], adapted):
        found, examples = speaker(run.root), read_examples(run.inputs / "train.parquet")
        rows = sums(24) if run is not adapted else starter_rows(16)
        assert len(rows) == len(examples)
        for row, example in zip(rows, examples, strict=True):
            assert found.prompt_ids(row["question"]).tolist() == example.prompt_ids.tolist()


def test_a_model_without_a_run_gets_its_chat_template(tpaw_, tmp_path):
    settings = ("precision=fp32", "device=cpu", "max_length=256", "generate.max_new_tokens=64")
    options = [part for setting in settings for part in ("--set", setting)]
    expected = answered(tpaw_, MODEL, starter_rows(8), tmp_path, *options)
    assert len(set(expected)) > 4
    found = speaker(MODEL, *settings)
    assert [said(found, question) for question in QUESTIONS] == expected


def test_a_model_without_continuous_batching_says_the_same(adapted, monkeypatch):
    found = speaker(adapted.root)
    expected = [said(found, question) for question in QUESTIONS[:3]]
    choice = BatchingChoice(Batching.ONE_BY_ONE, ("of the test",))
    monkeypatch.setattr("tpaw.ask.speaker.choose_batching", lambda model: choice)
    found = speaker(adapted.root)
    assert [said(found, question) for question in QUESTIONS[:3]] == expected


def test_sampling_is_that_of_the_run(adapted):
    run = adapted
    first = speaker(run.root, greedy=False, max_new_tokens=12)
    texts = [said(first, QUESTIONS[0]) for _ in range(4)]
    assert len(set(texts)) > 1  # each prompt has draws of its own
    again = speaker(run.root, greedy=False, max_new_tokens=12)
    assert [said(again, QUESTIONS[0]) for _ in range(4)] == texts
    assert (
        said(speaker(run.root, "seed=5", greedy=False, max_new_tokens=12), QUESTIONS[0]) != texts[0]
    )
    cold = speaker(run.root, "generate.temperature=0", greedy=False, max_new_tokens=12)
    assert said(cold, QUESTIONS[0]) == said(speaker(run.root, max_new_tokens=12), QUESTIONS[0])
    assert run.load_config().generate.temperature == 1


def test_the_longest_answer(finished):
    run, config = finished
    lengths = []
    for limit in (None, 3):
        answer = speaker(run.root, max_new_tokens=limit).answer(QUESTIONS[0])
        lengths.append(sum(iter(answer.advance, False)))
    assert lengths == [config.generate.max_new_tokens, 3]


@pytest.mark.parametrize("system", [False, True])
def test_whether_a_prompt_has_the_chat_template_can_be_seen(system):
    tokenizer = make_tokenizer()
    stop = [tokenizer.eos_token_id]

    def prompt(dialogue, template):
        chat = ChatFormat(tokenizer, stop, template, "data.template", 100)
        return chat.encode([dialogue])[0].prompt

    turns = [{"role": "system", "content": "Be brief."}] if system else []
    turns.append({"role": "user", "content": "Hi"})
    assert is_templated(tokenizer, prompt(Dialogue(turns, "x", is_chat=True), "auto"))
    assert not is_templated(tokenizer, prompt(Dialogue("Hi", "x", is_chat=False), "none"))
    tokenizer.chat_template = None
    assert not is_templated(tokenizer, "<|user|>Hi<|end|>\n<|assistant|>")


def test_a_template_that_adds_only_a_beginning_or_an_end():
    tokenizer = make_tokenizer()
    for template, good, bad in (
        ("{% for m in messages %}Q: {{ m['content'] }}{% endfor %}", "Q: Hi", "Hi"),
        ("{% for m in messages %}{{ m['content'] }} A:{% endfor %}", "Hi A:", "Hi"),
        ("{{ raise_exception('no') }}", None, "Hi"),
        ("nothing of the user", None, "nothing of the user"),
    ):
        tokenizer.chat_template = template
        assert good is None or is_templated(tokenizer, good)
        assert not is_templated(tokenizer, bad)


class Typed:
    """Lines that a person types; an exception is a key."""

    def __init__(self, *lines):
        self.lines = list(lines)

    def __call__(self, prompt):
        assert prompt == "prompt> "
        line = self.lines.pop(0)
        if isinstance(line, type):
            raise line
        return line


class Fake:
    """A speaker whose answers are given texts, one character a token."""

    def __init__(self, name, text, turns, at=None):
        self.name, self.full, self.turns, self.at = name, text, turns, at

    def answer(self, prompt):
        return FakeAnswer(self)


class FakeAnswer:
    def __init__(self, speaker):
        self.speaker, self.text = speaker, ""

    def advance(self):
        if len(self.text) == self.speaker.at:
            os.kill(os.getpid(), signal.SIGINT)
        if self.text == self.speaker.full:
            return False
        self.text = self.speaker.full[: len(self.text) + 1]
        self.speaker.turns.append(self.speaker.name)
        return True


def terminal(**options):
    return TextConsole(file=io.StringIO(), force_terminal=True, width=60, **options)


def test_answers_take_turns_and_stand_side_by_side():
    turns, console = [], terminal()
    speakers = [Fake("run@4", "four", turns), Fake("run@0", "zeros", turns)]
    typed = Typed("2 + 2?", "")
    talk(speakers, console, typed)
    assert turns == ["run@4", "run@0"] * 4 + ["run@0"]
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "An empty line or Ctrl-D leaves; Ctrl-C ends an answer."
    assert any("four" in line and "zeros" in line for line in lines)
    assert any("run@4" in line and "run@0" in line for line in lines)
    assert not typed.lines


def test_what_grows_is_shown_while_it_grows(monkeypatch):
    monkeypatch.setattr("tpaw.ask.terminal.SECONDS_BETWEEN_FRAMES", -1)
    console = terminal()
    talk([Fake("a", "xyz", [])], console, Typed("p", EOFError))
    shown = console.file.getvalue()
    places = [shown.index(f"│ {text} ") for text in ("x", "xy", "xyz")]
    assert places == sorted(places)


def test_control_c_ends_the_answer_and_then_the_program(control_c):
    console, typed = terminal(), Typed("first", "second", KeyboardInterrupt, "never")
    slow = Fake("a", "abcdef", [], at=3)
    talk([slow], console, typed)
    shown = console.file.getvalue()
    assert shown.count("a (stopped)") >= 2  # in both answers
    assert "abc" in shown
    assert "abcd" not in shown
    assert typed.lines == ["never"]


@pytest.mark.parametrize("live", [True, False])
def test_control_characters_of_a_model_are_text(live):
    hostile, console = Fake("m\x1b[31m", "\x1b]0;owned\x07[red]x[/red]", []), terminal()
    if live:
        talk([hostile], console, Typed("p", ""))
    else:
        answer_lines([hostile, hostile], ["p"], console)
    shown = console.file.getvalue()
    assert "\x1b]0;" not in shown
    assert "\x07" not in shown
    assert "\\x1b]0;owned\\x07[red]x[/red]" in shown
    assert "\x1b[31m" not in shown


def test_lines_of_the_standard_input_are_prompts(tpaw_, adapted, monkeypatch):
    new, old = f"{adapted.root}@1", f"{adapted.root}@0"
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTIONS[0]}\n\n{QUESTIONS[1]}\n"))
    code, out, err = tpaw_("ask", new, old, "--greedy")
    assert code == 0, err
    speakers = [speaker(new), speaker(old)]
    assert out == "".join(
        f"{found.name}: {said(found, prompt)}\n" for prompt in QUESTIONS[:2] for found in speakers
    )
    assert [found.name for found in speakers] == ["adapted@1", "adapted@0"]


def test_one_prompt_on_the_command_line(tpaw_, adapted):
    options = ("--prompt", QUESTIONS[0], "--greedy", "--max-new-tokens", "4")
    code, out, _ = tpaw_("ask", adapted.root, *options)
    assert code == 0
    assert out == said(speaker(adapted.root, max_new_tokens=4), QUESTIONS[0]) + "\n"


def test_a_prompt_that_is_too_long_is_named_and_the_others_are_answered(
    tpaw_, finished, monkeypatch
):
    run, _ = finished
    monkeypatch.setattr("sys.stdin", io.StringIO("word " * 200 + "\nWhat is 2 + 2?\n"))
    code, out, err = tpaw_("ask", run.root)
    assert code == 2
    assert "run@4" in err
    assert "max_length 128" in err
    assert out.strip()
    console = terminal()
    talk([speaker(run.root)], console, Typed("word " * 200, "Hi", ""))
    assert "max_length 128" in console.file.getvalue()
    assert "run@4" in console.file.getvalue()


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    folder = save_model(tmp_path / "model")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<|new|>"])
    tokenizer.save_pretrained(folder)
    found = speaker(folder, "precision=fp32", "device=cpu")
    with pytest.raises(Exception, match="token id 320"):
        found.answer("<|new|>")


@pytest.mark.parametrize(
    ("references", "parts"),
    [
        (["{run}@9"], ["θ_9", "@4"]),
        (["{run}", "{run}@0", "{run}@1"], ["3 checkpoints", "one or two"]),
        (["{run}", "nowhere/at/all"], ["nowhere/at/all"]),
        (["{run}", "--set", "generate.temperature=-1"], ["generate.temperature", "-1"]),
    ],
)
def test_bad_input_ends_with_2_before_a_model_is_loaded(
    tpaw_, finished, monkeypatch, references, parts
):
    monkeypatch.setattr("tpaw.ask.speaker.load_model", None)
    arguments = [reference.format(run=finished[0].root) for reference in references]
    code, _, err = tpaw_("ask", *arguments, "--prompt", "Hi")
    assert code == 2
    assert all(part in err for part in parts), err


def test_in_a_terminal_it_talks(tpaw_, finished, monkeypatch):
    seen = []
    monkeypatch.setattr("tpaw.ask.terminal.talk", lambda s, console, read: seen.append((s, read)))
    monkeypatch.setattr("tpaw.cli.share.console_of_stdout", terminal)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    assert tpaw_("ask", finished[0].root, f"{finished[0].root}@0")[0] == 0
    ((speakers, read),) = seen
    assert [found.name for found in speakers] == ["run@4", "run@0"]
    assert read is input


def test_the_model_is_the_checkpoints():
    with pytest.raises(InputError, match=r"--set model.path=other: the checkpoint decides"):
        speaker(MODEL, "model.path=other")
