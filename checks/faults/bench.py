"""What the rows of the table work with: commands in forked processes, disks, models and runs."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from fork_server import QUIET

os.environ |= QUIET | {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
}

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
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
TIMES = re.compile(rb'"(train_runtime|train_\w+_per_second|total_flos)": [^,}]+')
HERE = Path(__file__).parents[2]
SETTING = re.compile(r"[a-z][a-z_.]*=")
STARTER = HERE / "src" / "tpaw" / "starter"

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


class Outcome:
    """How a command ended, and what it said."""

    def __init__(self, arguments, code, out, err, seconds, mb):
        self.arguments, self.code, self.out, self.err = arguments, code, out, err
        self.seconds, self.mb = seconds, mb

    @property
    def text(self):
        return self.out + self.err

    @property
    def line(self):
        """The message, else the last line."""
        lines = [line for line in self.err.splitlines() if line.strip()]
        said = [line for line in lines if line.startswith("tpaw: ")]
        after = "\n".join(lines[lines.index(said[0]) :]) if said else ""
        return (after or (lines or self.out.splitlines() or [""])[-1]).replace("\n", " / ")


class Child:
    """A command in a forked process."""

    def __init__(self, folder, arguments, cwd, memory, before, env):
        self.arguments = arguments
        number = len(list(folder.glob("said-*.out")))
        self.files = [folder / f"said-{number}.{kind}" for kind in ("out", "err")]
        self.files[0].touch()
        self.began = time.monotonic()
        self.outcome = None
        self.pid = os.fork()
        if self.pid == 0:
            self._run(cwd, memory, before, env)

    def _run(self, cwd, memory, before, env):
        code = 70
        try:
            os.setpgid(0, 0)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            for number, file in enumerate(self.files, start=1):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
            sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
            sys.stderr = open(  # noqa: SIM115
                2, "w", encoding="utf-8", errors="backslashreplace", closefd=False
            )
            os.environ.update(env or {})
            os.chdir(cwd)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            if memory is not None:
                pages = int(Path("/proc/self/statm").read_text().split()[0])
                size = pages * resource.getpagesize() + memory
                resource.setrlimit(resource.RLIMIT_AS, (size, size))
            if before is not None:
                before()
            sys.argv = ["tpaw", *self.arguments]
            from tpaw.cli.main import main

            main()
            code = 0
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def ended(self):
        if self.outcome is None:
            done, status, usage = os.wait4(self.pid, os.WNOHANG)
            if done:
                out, err = (
                    f.read_text(encoding="utf-8", errors="surrogateescape") if f.exists() else ""
                    for f in self.files
                )
                code = os.waitstatus_to_exitcode(status)
                seconds = time.monotonic() - self.began
                mb = usage.ru_maxrss // 1024
                self.outcome = Outcome(self.arguments, code, out, err, seconds, mb)
        return self.outcome is not None

    def wait(self, limit=LIMIT):
        while not self.ended():
            if time.monotonic() - self.began > limit:
                os.kill(self.pid, signal.SIGKILL)
                while not self.ended():
                    time.sleep(0.002)
                raise Fail(f"hang: {' '.join(self.arguments)[:200]}: no end after {limit:.0f} s")
            time.sleep(0.002)
        return self.outcome

    def send(self, number):
        if not self.ended():
            os.kill(self.pid, number)

    def until(self, predicate, limit=LIMIT):
        """Wait until something is so; False if the command ended before."""
        while not self.ended():
            with contextlib.suppress(OSError):
                if predicate():
                    return True
            if time.monotonic() - self.began > limit:
                self.send(signal.SIGKILL)
                raise Fail(f"hang: {' '.join(self.arguments)[:200]}")
            time.sleep(0.0005)
        return False


class Bench:
    """What a row works with.

    Attributes:
        folder: an empty folder.
        base: folder with `tiny.yaml` and the runs `done`, `begun` and `stopped`.
        said: messages, with exit codes, for the table.
    """

    def __init__(self, folder, base):
        self.folder, self.base = folder, base
        self.tiny = base / "tiny.yaml"
        self.said = []
        self.count = 0

    def start(self, *arguments, cwd=None, memory=None, before=None, env=None):
        given = []
        for argument in map(str, arguments):
            is_setting = SETTING.match(argument) and given[-1] != "--set"
            given += ["--set", argument] if is_setting else [argument]
        return Child(self.folder, given, cwd or self.folder, memory, before, env)

    def tpaw(self, *arguments, limit=LIMIT, **options):
        """Run a command to its end. However it ends, it must end well."""
        return self.sound(self.start(*arguments, **options).wait(limit))

    def sound(self, outcome):
        text = outcome.text
        where = f"{' '.join(outcome.arguments)[:160]}: exit {outcome.code}"
        if "Traceback (most recent call last)" in text or "this is a bug" in text:
            last = [line for line in text.splitlines() if line and line[:10] != "tpaw: this"]
            raise Fail(f"traceback: {where}: {last[-1][:300]!r}")
        if match := CONTROL.search(text):
            raise Fail(f"raw {match[0]!r}: {where}")
        if (
            outcome.code
            and outcome.code > 0
            and not re.search(r"^(tpaw: |Usage: |stopped)", text, re.M)
        ):
            raise Fail(f"no message: {where}: {outcome.line[:300]!r}")
        return outcome

    def refused(self, outcome, *parts, code=2):
        """It ended with this code and said these parts, in any case of letters."""
        self.count += 1
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

    def fails(self, what):
        raise Fail(what)

    def copy(self, name):
        """A copy of a run of `base`."""
        target = self.folder / f"{name}-{self.count}-{random.randrange(10**6)}"
        self.count += 1
        return Path(shutil.copytree(self.base / name, target))

    def tiny_with(self, tree, name="c.yaml"):
        path = self.folder / name
        path.write_text(json.dumps({"extends": str(self.tiny)} | tree))
        return path

    def model(self, name="model", **config):
        """A copy of the starter's model with other keys in config.json."""
        target = self.folder / name
        if not target.exists():
            shutil.copytree(STARTER / "model", target)
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

    def plan(self, path, *more, **options):
        """Plan a run on a data file of one's own."""
        sets = (f"data.path={path}", "data.limit=null", *more)
        given = [part for one in sets for part in ("--set", one)]
        return self.tpaw("plan", self.tiny, *given, **options)

    def resumed(self, run, *more):
        """Resume a run, and compare it with the uninterrupted one."""
        outcome = self.tpaw("run", *(more or (run,)))
        if outcome.code:
            raise Fail(f"does not resume: exit {outcome.code}: {outcome.line[:400]}")
        self.same(run)
        return outcome

    def same(self, run, other=None):
        """Weights, responses, log-probs, held-out items and logs are those of the other run."""
        there, here = contents(other or self.base / "done"), contents(run)
        if there.keys() != here.keys():
            odd = sorted(map(str, there.keys() ^ here.keys()))
            raise Fail(f"other files: {odd[:5]}")
        differing = [str(name) for name in there if there[name] != here[name]]
        if differing:
            raise Fail(f"other bytes: {differing[:5]}")
        left = [str(p.relative_to(run)) for p in Path(run).rglob(".tmp-*")]
        if left:
            raise Fail(f"left: {left[:5]}")


def contents(run):
    found = {}
    for path in sorted(Path(run).rglob("*")):
        if path.suffix in (".safetensors", ".parquet", ".jsonl") and path.is_file():
            content = path.read_bytes()
            if path.name == "training.jsonl":
                content = TIMES.sub(b"", content)
            found[path.relative_to(run)] = content
    return found


def edit_json(path, changes):
    tree = json.loads(path.read_text())
    tree |= changes
    path.write_text(json.dumps(tree))


def write_sealed(path, facts):
    """Write a file as somebody else would who knows how: its checksum fits."""
    from tpaw.storage.seals import seal_facts

    path.write_text(json.dumps(seal_facts(facts)))


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
    done = subprocess.run(["chattr", "+i", *paths], capture_output=True, check=False)
    if done.returncode:
        subprocess.run(["chattr", "-i", *paths], capture_output=True, check=False)
        raise Skip("chattr does not work here")
    try:
        yield
    finally:
        subprocess.run(["chattr", "-i", *paths], check=False)


def no_space_check():
    """Let a run fill the disk."""
    import tpaw.pipeline.space

    tpaw.pipeline.space.require_space = lambda *a, **k: None


def has(pattern, least=1):
    return lambda run: len(list(run.glob(pattern))) >= least


def small_suite(x, template="{{question}}", name="small"):
    folder = x.folder / "suite"
    folder.mkdir(exist_ok=True)
    data = folder / f"{name}-rows.jsonl"
    if not data.exists():
        data.write_text("".join(json.dumps(r) + "\n" for r in starter_rows(6, "heldout.jsonl")))
    source = STARTER.parent / "evaluation/benchmarks/suites/tasks/starter.yaml"
    text = source.read_text()
    text = re.sub(r"data_files: .*", f"data_files: {{train: {data}, test: {data}}}", text)
    text = text.replace("task: starter", f"task: {name}").replace(
        "max_gen_toks: 64", "max_gen_toks: 8"
    )
    text = text.replace("{{question}}", template)
    (folder / f"{name}-task.yaml").write_text(text)
    suite = folder / f"{name}.yaml"
    suite.write_text(
        json.dumps(
            {
                "name": name,
                "apply_chat_template": True,
                "tasks": [
                    {
                        "name": name,
                        "task": f"{name}-task.yaml",
                        "num_fewshot": 0,
                        "metric": "exact_match,strict-match",
                    }
                ],
            }
        )
    )
    return suite


def refuses(x, content, *parts, name="rows.jsonl", more=()):
    """A plan on this file is refused, with these parts."""
    x.refused(x.plan(x.records(content, name), *more), *parts)


def accepts(x, content, *parts, name="rows.jsonl", more=()):
    return x.works(x.plan(x.records(content, name), *more), *parts)


def model_refused(x, model, *parts, command="plan", code=2):
    """A command on this model is refused, and no run directory appears."""
    if command == "plan":
        outcome = x.tpaw("plan", x.tiny, f"model.path={model}")
    elif command == "run":
        outcome = x.tpaw("run", x.tiny, "-o", x.folder / "out", f"model.path={model}")
    elif command == "answer":
        data = x.records(pairs(4), "prompts.jsonl")
        outcome = x.tpaw(
            "answer",
            model,
            "--data",
            data,
            "-o",
            x.folder / "answers",
            "generate.max_new_tokens=4",
            "max_length=256",
        )
    else:
        outcome = x.tpaw(
            "evaluate", model, "--suite", small_suite(x), "--trust", "-o", x.folder / "results"
        )
    x.refused(outcome, *parts, code=code)
    for name in ("out/inputs", "answers/manifest.json", "results/manifest.json"):
        if (x.folder / name).exists():
            raise Fail(f"{command}: {name} was written: {outcome.line[:200]}")


def everywhere(x, model, *parts, code=2):
    for command in ("plan", "run", "answer", "evaluate"):
        model_refused(x, model, *parts, command=command, code=code)
