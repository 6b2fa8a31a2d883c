"""Give mutated files to the command line, and look for tracebacks, hangs and raw escapes.

    python checks/fuzz.py --count 2000 --seed 0 -o fuzz

Each case changes one valid file or argument at random and runs one command in a forked process. The
command must end by itself with success or with a message, within its limits of time and memory, and
must print no control character. A case depends on its seed, kind and number alone:

    python checks/fuzz.py --seed 0 --only yaml --case 17
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import fcntl
import functools
import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from fork_server import PRELOADED, QUIET

os.environ |= QUIET | {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
}

CPU_SECONDS = 5
# A case that sleeps uses no CPU. The limit is wide because other work may share the cores.
SECONDS = 60.0
BYTES = 3 * 2**30  # more than the libraries have mapped when a case begins

NUMBERS = [-1, 0, 1, 2, 3, 1.5, -0.0, 1e-320, 1e308, 2**31, 2**63, 10**30, float("nan")]
NUMBERS += [float("inf"), -float("inf")]
TEXTS = ["", "x", " ", "\0", "\x1b]0;owned\x07", "\x9b31m", "\u202eabc\u2066", "\ud800", "NaN"]
TEXTS += ["../../../../etc/passwd", "/dev/zero", "/proc/self/mem", "x" * 300, "ü" * 5000, "[red]x"]
TEXTS += ["tpaw://starter/model", "<|end|>", "{{ 1 }}", "1e400", "2001-99-99", "%s{}", "\n\n", "\r"]
PIECES = [b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\xc3\x28", b"\xed\xa0\x80", b"\x1b[2J", b"\x9b"]
PIECES += [b"[" * 3000, b"{" * 3000, b"}", b"]", b'"', b"'", b",", b":", b"\n", b"\r\n", b"\t"]
PIECES += [
    b"&a [*a]",
    b"*b",
    b"!!int x",
    b"!!float ",
    b"!!timestamp x",
    b"{[1]: 2}",
    b"<<: ",
    b"- ",
]
PIECES += [b"9" * 5000, b"1:" * 3000, b"0x" + b"f" * 5000, b"null", b"NaN", b"Infinity", b"1e999"]
PIECES += [b"\\ud800", b"\\u001b[1m", b"#", b"---\n", b"%YAML 3.0\n", b"? ", b"|\n", b">\n"]
BOMB = "".join(
    f"{here}: &{here} [{', '.join([f'*{before}' if before else 'x'] * 9)}]\n"
    for before, here in zip(["", *"abcdefgh"], "abcdefghi", strict=True)
)


def value(rng, depth=0):
    """A value of any JSON type."""
    kind = rng.randrange(8 if depth < 3 else 5)
    if kind < 2:
        return rng.choice(NUMBERS)
    if kind < 4:
        return rng.choice(TEXTS)
    if kind == 4:
        return rng.choice([None, True, False])
    if kind == 5:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 6:
        return {rng.choice(TEXTS): value(rng, depth + 1) for _ in range(rng.randrange(4))}
    nested = []
    for _ in range(rng.choice([10, 500])):
        nested = [nested] if rng.random() < 0.5 else {"a": nested}
    return nested


def changed(rng, tree):
    """A tree with some values replaced, removed, renamed or copied."""
    places = []

    def walk(node):
        keys = list(node) if isinstance(node, dict) else range(len(node))
        for key in keys:
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    if not isinstance(tree, dict | list):
        return value(rng)
    walk(tree)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        if not places:
            break
        node, key = rng.choice(places)
        action = rng.randrange(6)
        try:
            if action == 0:
                del node[key]
            elif action == 1 and isinstance(node, dict):
                node[rng.choice(TEXTS)] = node.pop(key)
            elif action == 2:
                other, other_key = rng.choice(places)
                node[key] = json.loads(json.dumps(other[other_key]))
            else:
                node[key] = value(rng)
        except (KeyError, IndexError, RecursionError):
            continue
    return tree if rng.random() < 0.97 else value(rng)


def scrambled(rng, data):
    """Bytes with some of them changed, cut, copied or inserted."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(len(data) + 1)
        size = rng.choice([1, 4, 20, 200])
        action = rng.randrange(6)
        if action == 0:
            del data[at : at + size]
        elif action == 1:
            data[at:at] = data[at : at + size] * rng.choice([1, 50])
        elif action == 2 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif action == 3 and rng.random() < 0.3:
            del data[at:]
        else:
            data[at:at] = rng.choice(PIECES)
    return bytes(data)


def dumped(rng, tree):
    """A tree as JSON text, with raw or escaped characters."""
    text = json.dumps(tree, ensure_ascii=rng.random() < 0.5)
    return text.encode("utf-8", "surrogatepass")


def file_changed(rng, path):
    """Change a file on its own terms, or as bytes, or make something else of it."""
    action = rng.randrange(20)
    if action == 0:
        path.unlink()
    elif action == 1:
        path.write_bytes(b"")
    elif action == 2:
        path.unlink()
        path.mkdir()
    elif action == 3:
        path.unlink()
        path.symlink_to(rng.choice([path.name, "/dev/null", "nowhere", ".."]))
    elif action == 4:
        path.write_bytes(rng.choice([b"{}", b"[]", b"null", b"0", b'""', b"[[]]", b"{}\n{}\n"]))
    elif action < 12 and path.suffix == ".json":
        path.write_bytes(dumped(rng, changed(rng, json.loads(path.read_bytes()))))
    elif action < 12 and path.suffix in (".yaml", ".yml"):
        import yaml

        tree = changed(rng, yaml.safe_load(path.read_text()))
        path.write_bytes(dumped(rng, tree))  # JSON is YAML
    elif action < 12 and path.suffix == ".jsonl":
        lines = path.read_bytes().splitlines()
        at = rng.randrange(len(lines))
        lines[at] = dumped(rng, changed(rng, json.loads(lines[at])))
        path.write_bytes(b"\n".join(lines) + b"\n")
    else:
        path.write_bytes(scrambled(rng, path.read_bytes()))


class Corpus:
    """Valid files that the cases begin with."""

    def __init__(self, folder):
        self.folder = folder
        self.model, self.run = folder / "model", folder / "run"
        self.rows, self.base = folder / "rows.jsonl", folder / "base.yaml"

    def write(self):
        """Write them. It trains a model of a few thousand parameters for a step or two."""
        import yaml
        from builders import run_settings, save_model, sums, write_jsonl

        save_model(self.model)
        write_jsonl(self.rows, sums(12))
        write_jsonl(self.folder / "heldout.jsonl", sums(4, seed=1))
        settings = run_settings(self.model, self.rows, self.folder / "heldout.jsonl")
        settings |= {"iterations": 1}
        self.base.write_text(yaml.safe_dump(settings))
        sys.argv = ["tpaw", "run", str(self.base), "-o", str(self.run)]
        from tpaw.cli.main import main

        main()


def yaml_case(rng, corpus, folder):
    """A configuration file."""
    path = shutil.copy(corpus.base, folder / "c.yaml")
    path = Path(path)
    action = rng.randrange(10)
    if action == 0:
        key = rng.choice(["extends", "train", "iterations", "data", "seed", "x"])
        path.write_text(f"{BOMB}{key}: *{rng.choice('abcdefghi')}\n")
    elif action == 1:
        for i in range(30):
            names = [f"{i + 1}.yaml"] * rng.choice([1, 2, 3])
            (folder / f"{i}.yaml").write_text(json.dumps({"extends": names}))
        shutil.copy(corpus.base, folder / f"{rng.randrange(1, 30)}.yaml")
        path = folder / "0.yaml"
    else:
        file_changed(rng, path)
    return [*rng.choice(["plan", "plan", "config show"]).split(), str(path)]


def set_case(rng, corpus, folder):
    """Arguments of --set."""
    import yaml

    from tpaw.config.schema import RunConfig

    keys = []

    def walk(node, prefix):
        for key, part in node.items():
            keys.append(prefix + key)
            if isinstance(part, dict):
                walk(part, f"{prefix}{key}.")

    walk(RunConfig.load(str(corpus.base)).model_dump(by_alias=True), "")
    given = []
    for _ in range(rng.choice([1, 1, 2])):
        key = rng.choice(keys)
        if rng.random() < 0.2:
            key = scrambled(rng, key.encode()).decode(errors="surrogateescape")
        if rng.random() < 0.3:
            import dataclasses

            from transformers import TrainingArguments

            name = rng.choice([f.name for f in dataclasses.fields(TrainingArguments)])
            key, text = "train.training_arguments", json.dumps({name: value(rng)})
        elif rng.random() < 0.5:
            text = rng.choice(PIECES).decode(errors="surrogateescape")
        else:
            text = json.dumps(value(rng), ensure_ascii=False)
        with contextlib.suppress(Exception):  # what PyYAML makes of it is not the question here
            text = text if rng.random() < 0.7 else yaml.safe_dump(yaml.safe_load(text))
        given += ["--set", f"{key}={text}".replace("\0", "\x01")]
    return ["plan", str(corpus.base), *given]


def data_case(suffix):
    """Cases of a data file."""

    def case(rng, corpus, folder):
        rows = [json.loads(line) for line in corpus.rows.read_text().splitlines()]
        shape = rng.randrange(6)
        rows = [shaped(shape, row) for row in rows]
        path = folder / f"rows.{suffix}"
        if suffix == "csv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, sorted(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        elif suffix == "parquet":
            write_parquet(rng, path, rows)
        elif suffix == "json":
            path.write_text(json.dumps(rows))
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        if suffix != "parquet" or rng.random() < 0.5:
            file_changed(rng, path)
        return ["plan", str(corpus.base), "--set", f"data.path={path}"]

    return case


def shaped(shape, row):
    """A record in one of the shapes that TPAW reads."""
    question, answer = row["question"], row["answer"]
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if shape == 5:
        return row
    if shape == 0:
        return {"messages": turns}
    if shape == 1:
        return {
            "conversations": [
                {"from": "human", "value": question},
                {"from": "gpt", "value": answer},
            ]
        }
    if shape == 2:
        return {"prompt": question, "completion": answer}
    if shape == 3:
        return {"instruction": question, "input": "", "output": answer}
    return {"prompt": question, "chosen": answer, "rejected": "no"}


def write_parquet(rng, path, rows):
    """A table whose columns may have other types, nulls or bytes that are not text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {key: pa.array([str(row.get(key, "")) for row in rows]) for key in rows[0]}
    kinds = [
        lambda: pa.array(range(len(rows))),
        lambda: pa.array([None] * len(rows)),
        lambda: pa.array([b"\xff\x1b"] * len(rows)).cast(pa.string(), safe=False),
        lambda: pa.array([2**62] * len(rows), pa.timestamp("us")),
        lambda: pa.array([1] * len(rows), pa.timestamp("us", tz="No/Where")),
        lambda: pa.array([[{"role": "user", "content": None}]] * len(rows)),
        lambda: pa.array(["a"] * len(rows)).dictionary_encode(),
        lambda: pa.array([[1.5, None]] * len(rows)),
        lambda: pa.array([b"x"] * len(rows)),
    ]
    for _ in range(rng.randrange(3)):
        name = rng.choice([*columns, "extra", "\x1b[31m"])
        try:
            columns[name] = rng.choice(kinds)()
        except pa.ArrowException:
            continue
    pq.write_table(pa.table(columns), path)


def model_case(rng, corpus, folder):
    """A file of a model or a tokenizer."""
    model = Path(shutil.copytree(corpus.model, folder / "model"))
    names = sorted(path for path in model.iterdir() if path.is_file())
    path = rng.choice(names)
    if path.suffix == ".jinja" and rng.random() < 0.5:
        path.write_text(
            rng.choice(
                [
                    "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
                    "{{ raise_exception('\x1b[31m') }}",
                    "{{ 'x' * 100000000 }}",
                    "{{ ''.__class__ }}",
                    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
                ]
            )
        )
    else:
        file_changed(rng, path)
    command = rng.choice(["plan", "plan", "answer"])
    if command == "answer":
        rows = ["--data", str(corpus.folder / "heldout.jsonl"), "-o", str(folder / "out")]
        return ["answer", str(model), *rows, "--set", "generate.max_new_tokens=4", "--greedy"]
    return ["plan", str(corpus.base), "--set", f"model.path={model}"]


def run_case(rng, corpus, folder):
    """A file of a run directory."""
    run = Path(shutil.copytree(corpus.run, folder / "run"))
    files = sorted(path for path in run.rglob("*") if path.is_file())
    small = [path for path in files if path.suffix in (".json", ".yaml", ".jsonl", "")]
    for _ in range(rng.choice([1, 1, 2])):
        path = rng.choice(small if rng.random() < 0.8 else files)
        if path.is_file() and not path.is_symlink():
            file_changed(rng, path)
    command = rng.choice(["status", "run", "plan", "config show"])
    return [*command.split(), str(run)]


def suite_case(rng, corpus, folder):
    """A benchmark suite. The model is not there, so nothing is evaluated."""
    source = Path(__file__).parents[1] / "src/tpaw/evaluation/benchmarks/suites"
    names = ["starter.yaml", "gsm8k.yaml", "open-llm-v1.yaml", "open-llm-v2.yaml"]
    path = Path(shutil.copy(source / rng.choice(names), folder / "s.yaml"))
    file_changed(rng, path)
    return ["evaluate", str(folder / "none"), "--suite", str(path)]


def study_case(rng, corpus, folder):
    """A study. Its folder is in use, so nothing is run."""
    import yaml

    path = folder / "s.yaml"
    tree = {
        "recipe": str(corpus.base),
        "methods": {"tpaw": "tpaw", "a b": ["spin", {"train": {"epochs": 1}}]},
        "vary": {"objective.gamma": [0.0, 0.5], "train.learning_rate": [1e-3, [1e-4]]},
        "seeds": [0, 3],
        "set": {"iterations": 1},
        "baseline": "tpaw, gamma = 0.0, learning_rate = 0.001",
    }
    path.write_text(yaml.safe_dump(tree))
    file_changed(rng, path)
    (folder / "out").mkdir()
    lock = (folder / "out" / "lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.set_inheritable(lock.fileno(), True)
    study_case.locks = [lock]  # it stays locked until the next case
    return ["study", str(path), "-o", str(folder / "out")]


KINDS = {
    "yaml": yaml_case,
    "set": set_case,
    "json": data_case("json"),
    "jsonl": data_case("jsonl"),
    "csv": data_case("csv"),
    "parquet": data_case("parquet"),
    "model": model_case,
    "run": run_case,
    "suite": suite_case,
    "study": study_case,
}


def child(call, folder):
    """Run a call in this forked process, with limits; never returns."""
    code = 70
    try:
        os.chdir(folder)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with open(folder / "out.txt", "ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(  # noqa: SIM115
            2, "w", encoding="utf-8", errors="backslashreplace", closefd=False
        )
        call()
        code = 0
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_command(kind, number, seed, corpus, folder):
    """Write one case and run its command. It is called in a child process."""
    rng = random.Random(f"{seed}/{kind}/{number}")
    arguments = KINDS[kind](rng, corpus, folder)
    (folder / "command.txt").write_text(json.dumps(arguments))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = pages * resource.getpagesize() + BYTES
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    used = time.process_time()
    soft = int(used) + 1 + CPU_SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (soft, soft + 5))
    sys.argv = ["tpaw", *arguments]
    from tpaw.cli.main import main

    main()


def judged(code, text):
    """What came of a case."""
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        return "hang"
    if "Traceback (most recent call last)" in text:
        return "traceback"
    if not 0 <= code <= 4:
        return f"exit {code}"
    if re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", text):
        return "escape"
    if code and not re.search(r"^(tpaw: |Usage: )", text, re.M):
        return "no message"
    return "refused" if code else "accepted"


def preload():
    """Import once what each case would import."""
    for name in (*PRELOADED, "pyarrow.parquet", "datasets", "builders", "jinja2", "lm_eval.tasks"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def ended(cases, jobs, start):
    """Start the cases, `jobs` at a time; gives each case with exit code and CPU seconds.

    Args:
        start: called in the child process with the case; it never returns.
    """
    waiting, running = list(reversed(cases)), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            case = waiting.pop()
            pid = os.fork()
            if pid == 0:
                start(case)
            running[pid] = case, time.monotonic()
        for pid, (case, began) in list(running.items()):
            done, status, usage = os.wait4(pid, os.WNOHANG)
            if done:
                del running[pid]
                seconds = usage.ru_utime + usage.ru_stime
                yield case, os.waitstatus_to_exitcode(status), seconds
            elif time.monotonic() - began > SECONDS:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)


def main():
    """Run the cases, print a table, and exit with 1 if any failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=KINDS, action="append", help="Can be repeated.")
    parser.add_argument("--case", type=int, help="Run the case of this number, and show it.")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("-o", "--output", type=Path, help="Keep the files of failed cases here.")
    options = parser.parse_args()
    kinds = options.only or list(KINDS)
    cases = [(kinds[i % len(kinds)], i // len(kinds)) for i in range(options.count)]
    if options.case is not None:
        cases = [(kind, options.case) for kind in kinds]
    preload()
    outcomes, failures, slowest = Counter(), [], (0.0, "")
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        corpus = Corpus(Path(scratch) / "corpus")
        corpus.folder.mkdir()
        start = functools.partial(child, corpus.write)
        [(_, code, _)] = ended([corpus.folder], 1, start)
        if code:
            sys.exit((corpus.folder / "out.txt").read_text())

        def folder_of(case):
            return Path(scratch) / "{}-{}".format(*case)

        def start_case(case):
            folder = folder_of(case)
            folder.mkdir()
            child(functools.partial(run_command, *case, options.seed, corpus, folder), folder)

        for case, code, seconds in ended(cases, options.jobs, start_case):
            folder, (kind, number) = folder_of(case), case
            text = (folder / "out.txt").read_bytes().decode("utf-8", "surrogateescape")
            outcome = judged(code, text)
            outcomes[kind, outcome] += 1
            slowest = max(slowest, (seconds, f"{kind} {number}"))
            if options.case is not None:
                print(kind, number, outcome, (folder / "command.txt").read_text(), ascii(text))
            if outcome not in ("refused", "accepted"):
                last = ascii(text.strip().rpartition("\n")[2][:160])
                again = f"--seed {options.seed} --only {kind} --case {number}"
                failures.append(f"{outcome}: {again}: {last}")
                if options.output:
                    kept = options.output / folder.name
                    shutil.copytree(folder, kept, symlinks=True, dirs_exist_ok=True)
            shutil.rmtree(folder, ignore_errors=True)

    names = ["accepted", "refused", "traceback", "hang", "escape"]
    names += sorted({outcome for _, outcome in outcomes} - set(names))
    print(" " * 10 + "".join(f"{name:>12}" for name in names))
    for kind in kinds:
        print(f"{kind:10}" + "".join(f"{outcomes[kind, name]:12}" for name in names))
    total = Counter({name: sum(outcomes[kind, name] for kind in kinds) for name in names})
    print(f"{'all':10}" + "".join(f"{total[name]:12}" for name in names))
    print("most CPU time: {:.1f} s, {}".format(*slowest))
    print("\n".join(sorted(failures)))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
