"""What the rows of the table work with: commands in forked processes, disks, models and runs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from commands import fault, limit_memory, run_tpaw
from fork_server import run_child

LIMIT = 240.0  # seconds of a command; other work may share the cores
TINY = {
    "extends": "starter",
    "iterations": 2,
    "data": {"limit": 48},
    "evaluate": {"data": {"limit": 12}, "max_new_tokens": 8},
    "generate": {"max_new_tokens": 8, "shard_size": 16},
    "score": {"shard_size": 64},
    "train": {
        "learning_rate": 3e-4,
        "epochs": 1,
        "batch_size": 16,
        "save_every": 1,
        "log_every": 1,
    },
}
TIMES = re.compile(rb'"(train_runtime|train_\w+_per_second|total_flos)": [^,}]+')
SETTING = re.compile(r"[a-z][a-z_.]*=")
STARTER = Path(__file__).parents[2] / "src" / "tpaw" / "starter"
ONE_TURN = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]

ROWS = {}


class Fail(Exception):
    """What a row expected and did not find."""


class Skip(Exception):
    """Why a row cannot be tried here."""


def row(name):
    """Enter a function into the table. Its docstring says what is done."""

    def enter(function):
        ROWS[name] = function
        return function

    return enter


@dataclasses.dataclass
class Outcome:
    """How a command ended, what it printed, its seconds and the most memory that it had."""

    arguments: list[str]
    code: int
    out: str
    err: str
    seconds: float
    mb: int

    @property
    def text(self):
        return self.out + self.err

    @property
    def line(self):
        """The error message in one line; without one, the last line."""
        lines = [line for line in self.err.splitlines() if line.strip()]
        begin = next((i for i, line in enumerate(lines) if line.startswith("tpaw: ")), -1)
        return " / ".join(lines[begin:] or self.out.splitlines()[-1:])


class Child:
    """A command in a forked process.

    Args:
        files: what it prints to stdout and to stderr.
        memory: bytes that it may have more than this process.
        before: called in the new process before the command.
    """

    def __init__(self, arguments, files, cwd, memory=None, before=None, env=None):
        def call():
            os.environ.update(env or {})
            os.chdir(cwd)
            if memory is not None:
                limit_memory(memory)
            if before is not None:
                before()
            run_tpaw(*arguments)

        self.arguments, self.files = arguments, files
        for file in files:
            file.touch()
        self.began = time.monotonic()
        self.outcome = None
        self.pid = os.fork()
        if self.pid == 0:
            run_child(call, *files)

    def ended(self):
        if self.outcome is None:
            done, status, usage = os.wait4(self.pid, os.WNOHANG)
            if done:
                out, err = (f.read_text("utf-8", "surrogateescape") for f in self.files)
                code = os.waitstatus_to_exitcode(status)
                seconds = time.monotonic() - self.began
                mb = usage.ru_maxrss // 1024
                self.outcome = Outcome(self.arguments, code, out, err, seconds, mb)
        return self.outcome is not None

    def wait(self, limit=LIMIT):
        self.until(lambda: False, limit, pause=0.002)
        return self.outcome

    def send(self, number):
        if not self.ended():
            os.kill(self.pid, number)

    def kill(self):
        self.send(signal.SIGKILL)
        return self.wait()

    def until(self, predicate, limit=LIMIT, pause=0.0005):
        """Wait until the predicate is true or the command has ended."""
        while not self.ended():
            with contextlib.suppress(OSError):
                if predicate():
                    return
            if time.monotonic() - self.began > limit:
                os.kill(self.pid, signal.SIGKILL)
                raise Fail(f"hang: {' '.join(self.arguments)[:200]}: no end after {limit:.0f} s")
            time.sleep(pause)

    def lasts(self, seconds):
        """Wait for some seconds, or until the command has ended."""
        end = time.monotonic() + seconds
        self.until(lambda: time.monotonic() > end)


class Bench:
    """What a row works with.

    Attributes:
        folder: an empty folder.
        base: folder with `tiny.yaml` and the runs `done`, `begun` and `stopped`.
        seconds: how long a whole run takes.
        damage_all: damage every file in every way.
        said: messages, with exit codes, for the table.
    """

    def __init__(self, folder, base, *, seconds=0.0, seed=0, damage_all=False):
        self.folder, self.base = folder, base
        self.seconds, self.seed, self.damage_all = seconds, seed, damage_all
        self.tiny = base / "tiny.yaml"
        self.said = []
        self._numbers = itertools.count()

    def start(self, *arguments, **options):
        """Start a command; `key=value` becomes `--set key=value`, and `options` are of `Child`."""
        given = []
        for argument in map(str, arguments):
            is_setting = SETTING.match(argument) and given[-1] != "--set"
            given += ["--set", argument] if is_setting else [argument]
        said = self.new("said")
        files = [said.with_suffix(".out"), said.with_suffix(".err")]
        return Child(given, files, self.folder, **options)

    def begin(self, run, marker, config=None):
        """Start a run, and wait until the marker is true of its folder."""
        child = self.start("run", config or self.tiny, "-o", run)
        child.until(lambda: marker(run))
        return child

    def tpaw(self, *arguments, limit=LIMIT, **options):
        """Run a command to its end, and check it with `sound`."""
        return self.sound(self.start(*arguments, **options).wait(limit))

    def run(self, folder, *settings, **options):
        """Run the tiny configuration."""
        return self.tpaw("run", self.tiny, "-o", folder, *settings, **options)

    def plan(self, *settings, **options):
        """Plan a run of the tiny configuration."""
        return self.tpaw("plan", self.tiny, *settings, **options)

    def plan_data(self, path, *settings, **options):
        """Plan a run on a data file of one's own."""
        sets = (f"data.path={path}", "data.limit=null", *settings)
        given = [part for one in sets for part in ("--set", one)]
        return self.plan(*given, **options)

    def sound(self, outcome):
        """Require no traceback, no control character, and a message if the command failed."""
        if wrong := fault(outcome.code, outcome.text):
            where = f"{' '.join(outcome.arguments)[:160]}: exit {outcome.code}"
            raise Fail(f"{wrong}: {where}: {outcome.text[-1000:]!r}")
        return outcome

    def refused(self, outcome, *parts, code=2):
        """Require this exit code, or one of these, and these parts in what was printed.

        Upper and lower case are the same.
        """
        said = f"{outcome.code}: {outcome.line}"
        self.said.append(said)
        codes = code if isinstance(code, tuple) else (code,)
        if outcome.code not in codes:
            command = " ".join(outcome.arguments)[:120]
            raise Fail(f"exit {outcome.code}, not {code}: {command}: {said[:400]}")
        for part in parts:
            if str(part).lower() not in outcome.text.lower():
                raise Fail(f"{part!r} is not in: {said[:600]}")
        return outcome

    def works(self, outcome, *parts):
        return self.refused(outcome, *parts, code=0)

    def shows(self, outcome, part):
        """Let the table show the line with this part."""
        lines = [line for line in outcome.text.splitlines() if part in line]
        self.said[-1] = f"{outcome.code}: {(lines or [''])[0]}"

    def new(self, name):
        """A path in the folder that does not exist yet."""
        return self.folder / f"{name}-{next(self._numbers)}"

    def copy(self, name):
        """A copy of a run of `base`."""
        return Path(shutil.copytree(self.base / name, self.new(name)))

    def tiny_with(self, tree):
        path = self.folder / "c.yaml"
        path.write_text(json.dumps({"extends": str(self.tiny)} | tree))
        return path

    def model(self, **config):
        """A copy of the starter's model with other keys in config.json."""
        target = Path(shutil.copytree(STARTER / "model", self.new("model")))
        if config:
            edit_json(target / "config.json", config)
        return target

    def records(self, content, name="rows.jsonl"):
        """A file of records: bytes, text or a list."""
        path = self.folder / name
        if isinstance(content, list):
            content = "".join(
                (one if isinstance(one, str) else json.dumps(one)) + "\n" for one in content
            )
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def answer(self, model, data, folder, *more, tokens=4):
        """Generate some tokens for each prompt of a file."""
        sets = ("max_length=256", f"generate.max_new_tokens={tokens}")
        return self.tpaw("answer", model, "--data", data, "-o", folder, *sets, *more)

    def judge(self, url, first, second, *more, **options):
        """Compare two lists of texts as the answers of two models."""
        from judge_server import answers

        a, b = answers(self.folder / "a.json", *first), answers(self.folder / "b.json", *second)
        ends = ("-o", self.folder / "j", "--cache", self.folder / "cache")
        given = ("--endpoint", url, "--model", "j", *ends, *more)
        return self.tpaw("judge", a, b, *given, **options)

    def resumed(self, run, *settings):
        """Resume a run, and compare it with the uninterrupted one."""
        return self.completed(run, self.tpaw("run", run, *settings))

    def rerun(self, run):
        """Do the same with the command that started the run. It works without the folder too."""
        return self.completed(run, self.run(run))

    def completed(self, run, outcome):
        if outcome.code:
            raise Fail(f"does not resume: exit {outcome.code}: {outcome.line[:400]}")
        self.same(run)
        return outcome

    def same(self, run, other=None):
        """Weights, responses, log-probs, held-out items and logs are those of the other run."""
        there, here = contents(other or self.base / "done"), contents(run)
        if there.keys() != here.keys():
            odd = sorted(there.keys() ^ here.keys())
            raise Fail(f"other files: {odd[:5]}")
        differing = [name for name in there if there[name] != here[name]]
        if differing:
            raise Fail(f"other bytes: {differing[:5]}")
        left = [str(p.relative_to(run)) for p in run.rglob(".tmp-*")]
        if left:
            raise Fail(f"left: {left[:5]}")


def contents(run):
    """The bytes that results depend on, and the logs without their times."""
    from builders import contents as results

    logs = {path.relative_to(run).as_posix(): path for path in run.rglob("training.jsonl")}
    return results(run) | {name: TIMES.sub(b"", log.read_bytes()) for name, log in logs.items()}


def edit_json(path, changes):
    tree = json.loads(path.read_text())
    tree |= changes
    path.write_text(json.dumps(tree))


def write_sealed(path, facts):
    """Write a forged file whose checksum is correct."""
    from tpaw.storage.seals import seal_facts

    path.write_text(json.dumps(seal_facts(facts)))


def listed(path, content):
    """The entry of a file in a manifest."""
    sha256 = hashlib.sha256(content).hexdigest()
    return {"path": path, "bytes": len(content), "sha256": sha256}


def edit_text(path, old, new):
    text = path.read_text()
    assert old in text, f"{old} is not in {path}"
    path.write_text(text.replace(old, new))


def starter_rows(count, file="train.jsonl"):
    lines = (STARTER / file).read_text().splitlines()[:count]
    return [json.loads(line) for line in lines]


def pairs(count):
    return [{"prompt": r["question"], "completion": r["answer"]} for r in starter_rows(count)]


def poison(model, value=float("nan")):
    """Put a value into one weight of a model, without torch."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    tensors = dict(load_file(model / "model.safetensors"))
    name = next(n for n in tensors if "norm" in n)
    tensors[name] = np.array(tensors[name])
    tensors[name].flat[0] = value
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


@contextlib.contextmanager
def disk(folder, size):
    """A disk of limited size."""
    if os.geteuid():
        raise Skip("needs root")
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        raise Skip("cannot mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def enlarge(folder, size):
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)


@contextlib.contextmanager
def immutable(folder):
    """A folder in which nothing can be made."""
    paths = [folder, *(p for p in folder.rglob("*") if p.is_dir())]
    change = functools.partial(subprocess.run, capture_output=True, check=False)
    try:
        if change(["chattr", "+i", *paths]).returncode:
            raise Skip("chattr does not work here")
        yield
    finally:
        change(["chattr", "-i", *paths])


def no_space_check():
    """Remove the check of the free space, so that a run fills the disk."""
    import tpaw.pipeline.space

    tpaw.pipeline.space.require_space = lambda *a, **k: None


def has(pattern, least=1):
    """A marker: at least so many paths of a run match."""
    return lambda run: len(list(run.glob(pattern))) >= least


def small_suite(x, template="{{question}}", name="small"):
    """A suite of one task: the starter's, with six records and this prompt."""
    from builders import write_jsonl

    folder = x.folder / "suite"
    folder.mkdir(exist_ok=True)
    data = folder / f"{name}-rows.jsonl"
    if not data.exists():
        write_jsonl(data, starter_rows(6, "heldout.jsonl"))
    source = STARTER.parent / "evaluation/benchmarks/suites/tasks/starter.yaml"
    text = re.sub(
        r"data_files: .*", f"data_files: {{train: {data}, test: {data}}}", source.read_text()
    )
    for old, new in (
        ("task: starter", f"task: {name}"),
        ("max_gen_toks: 64", "max_gen_toks: 8"),
        ("{{question}}", template),
    ):
        text = text.replace(old, new)
    (folder / f"{name}-task.yaml").write_text(text)
    task = {"name": name, "task": f"{name}-task.yaml", "num_fewshot": 0}
    task["metric"] = "exact_match,strict-match"
    suite = folder / f"{name}.yaml"
    suite.write_text(json.dumps({"name": name, "apply_chat_template": True, "tasks": [task]}))
    return suite


def refuses(x, content, *parts, name="rows.jsonl", more=()):
    """Require that a plan on this data file is refused with these parts in the message."""
    x.refused(x.plan_data(x.records(content, name), *more), *parts)


def accepts(x, content, *parts):
    """Require that a plan on this data file works and prints these parts."""
    return x.works(x.plan_data(x.records(content)), *parts)


def model_refused(x, model, *parts, command="plan", code=2):
    """Require that a command on this model is refused and writes no results."""
    folder = x.new("out")
    if command == "plan":
        outcome = x.plan(f"model.path={model}")
    elif command == "run":
        outcome = x.run(folder, f"model.path={model}")
    elif command == "answer":
        outcome = x.answer(model, x.records(pairs(4), "prompts.jsonl"), folder)
    else:
        outcome = evaluated(x, model, folder)
    x.refused(outcome, *parts, code=code)
    for name in ("inputs", "manifest.json"):
        if (folder / name).exists():
            raise Fail(f"{command}: {name} was written: {outcome.line[:200]}")


def evaluated(x, model, folder):
    return x.tpaw("evaluate", model, "--suite", small_suite(x), "--trust", "-o", folder)


def everywhere(x, model, *parts):
    for command in ("plan", "run", "answer", "evaluate"):
        model_refused(x, model, *parts, command=command)
