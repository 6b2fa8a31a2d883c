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
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from commands import YAML_BOMB, fault, forked, limit_memory, preload, run_tpaw
from fork_server import run_child

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
        run_tpaw("run", self.base, "-o", self.run)


def yaml_case(rng, corpus, folder):
    """A configuration file."""
    path = Path(shutil.copy(corpus.base, folder / "c.yaml"))
    action = rng.randrange(10)
    if action == 0:
        key = rng.choice(["extends", "train", "iterations", "data", "seed", "x"])
        path.write_text(f"{YAML_BOMB}{key}: *{rng.choice('abcdefghi')}\n")
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
    import dataclasses

    import yaml
    from transformers import TrainingArguments

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
    user = {"role": "user", "content": question}
    assistant = {"role": "assistant", "content": answer}
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    shapes = (
        {"messages": [user, assistant]},
        {"conversations": turns},
        {"prompt": question, "completion": answer},
        {"instruction": question, "input": "", "output": answer},
        {"prompt": question, "chosen": answer, "rejected": "no"},
        row,
    )
    return shapes[shape]


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
    lock = os.open(folder / "out" / "lock", os.O_WRONLY | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)  # until this process ends
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


def run_mutated(kind, number, seed, corpus, folder):
    """Write one case and run its command."""
    os.chdir(folder)
    rng = random.Random(f"{seed}/{kind}/{number}")
    arguments = KINDS[kind](rng, corpus, folder)
    (folder / "command.txt").write_text(json.dumps(arguments))
    limit_memory(BYTES)
    soft = int(time.process_time()) + 1 + CPU_SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (soft, soft + 5))
    run_tpaw(*arguments)


def judged(code, text):
    """What came of a case."""
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        return "hang"
    if found := fault(code, text):
        return found
    if not 0 <= code <= 4:
        return f"exit {code}"
    return "refused" if code else "accepted"


def run_cases(cases, scratch, seed, jobs):
    """Run each case in a folder and a process of its own.

    Yields:
        The case, its folder, what came of it, what it printed, and the CPU seconds. The folder is
        removed afterwards.
    """
    corpus = Corpus(scratch / "corpus")
    corpus.folder.mkdir()
    said = corpus.folder / "out.txt"
    [(_, code, _, _)] = forked([corpus], 1, lambda corpus: run_child(corpus.write, said, said))
    if code:
        sys.exit(said.read_text())

    def start(case):
        folder = scratch / "{}-{}".format(*case)
        folder.mkdir()
        run = functools.partial(run_mutated, *case, seed, corpus, folder)
        run_child(run, folder / "out.txt", folder / "out.txt")

    for case, code, _, seconds in forked(cases, jobs, start, SECONDS):
        folder = scratch / "{}-{}".format(*case)
        text = (folder / "out.txt").read_bytes().decode("utf-8", "surrogateescape")
        yield case, folder, judged(code, text), text, seconds
        shutil.rmtree(folder, ignore_errors=True)


def print_table(outcomes, kinds):
    """Print how many cases of each kind ended in which way."""
    names = ["accepted", "refused", "traceback", "hang", "escape"]
    names += sorted({outcome for _, outcome in outcomes} - set(names))
    print(" " * 10 + "".join(f"{name:>12}" for name in names))
    for kind in kinds:
        print(f"{kind:10}" + "".join(f"{outcomes[kind, name]:12}" for name in names))
    total = Counter({name: sum(outcomes[kind, name] for kind in kinds) for name in names})
    print(f"{'all':10}" + "".join(f"{total[name]:12}" for name in names))


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
    preload("builders")
    outcomes, failures, slowest = Counter(), [], (0.0, "")
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        ended = run_cases(cases, Path(scratch), options.seed, options.jobs)
        for (kind, number), folder, outcome, text, seconds in ended:
            outcomes[kind, outcome] += 1
            slowest = max(slowest, (seconds, f"{kind} {number}"))
            if options.case is not None:
                command = (folder / "command.txt").read_text()
                print(kind, number, outcome, command, ascii(text), flush=True)
            if outcome in ("refused", "accepted"):
                continue
            last = ascii(text.strip().rpartition("\n")[2][:160])
            again = f"--seed {options.seed} --only {kind} --case {number}"
            failures.append(f"{outcome}: {again}: {last}")
            if options.output:
                kept = options.output / folder.name
                shutil.copytree(folder, kept, symlinks=True, dirs_exist_ok=True)
    print_table(outcomes, kinds)
    print("most CPU time: {:.1f} s, {}".format(*slowest))
    print("\n".join(sorted(failures)))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
