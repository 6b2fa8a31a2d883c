"""Faults of the machine: kills, full disks, damaged files, lost folders, other versions."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time

from bench import (
    STARTER,
    Fail,
    Skip,
    contents,
    disk,
    edit_json,
    edit_text,
    enlarge,
    has,
    immutable,
    no_space_check,
    pairs,
    poison,
    row,
    small_suite,
    starter_rows,
    write_sealed,
)


def killed(x, markers, signals=(signal.SIGKILL,)):
    """Kill a run as each of these is so; it must then resume to the same bytes."""
    run = x.folder / "r"
    for marker in markers:
        child = x.start("run", x.tiny, "-o", run)
        if child.until(lambda m=marker: m(run)):
            for number in signals:
                child.send(number)
                time.sleep(0.01)
        x.sound(child.wait())
        x.said.append(str(child.outcome.code))
    x.resumed(run, x.tiny, "-o", run)


@row("F1")
def _(x):
    """SIGKILL while answers are generated"""
    killed(x, [has("iterations/1/responses/*.parquet"), has("iterations/2/responses/*.parquet", 2)])


@row("F2")
def _(x):
    """SIGKILL between a shard and its manifest"""
    at = has("iterations/1/responses/.tmp-*manifest*"), has("iterations/2/responses/shard-00001*")
    killed(x, at)
    stopped = x.copy("begun")
    (stopped / "iterations/2/responses/.tmp-1-ab-manifest.partial.json").write_text("{")
    x.resumed(stopped)


@row("F3")
def _(x):
    """SIGKILL while scoring under the second player"""
    killed(x, [lambda run: len(list(run.glob("logprobs/*/iteration-2*"))) >= 2] * 2)


@row("F4")
def _(x):
    """SIGKILL while a model is saved"""
    at = [has("iterations/1/.tmp-*checkpoint"), has("iterations/2/.tmp-*checkpoint/*.safetensors")]
    killed(x, [*at, has("iterations/2/checkpoint/manifest.json")])


@row("F5")
def _(x):
    """SIGKILL while the optimizer is saved; a saved step without a manifest"""
    killed(
        x,
        [
            has("iterations/*/training/checkpoint-*/optimizer.pt"),
            has("iterations/2/training/checkpoint-2/*"),
        ],
    )
    stopped = x.copy("stopped")
    for manifest in stopped.glob("iterations/2/training/checkpoint-*/manifest.json"):
        manifest.unlink()
    x.resumed(stopped)


@row("F6")
def _(x):
    """the disk is full"""
    for size in ("16k", "300k", "1200k", "2600k", "5000k"):
        with disk(x.folder / f"disk-{size}", size) as place:
            x.refused(x.tpaw("run", x.tiny, "-o", place / "r"), str(place), code=4)
            enlarge(place, "60m")
            x.resumed(place / "r", x.tiny, "-o", place / "r")


@row("F7")
def _(x):
    """the disk is full in spite of the check, also while saved steps rotate"""
    for size in ("800k", "3000k", "6200k", "7400k"):
        with disk(x.folder / f"disk-{size}", size) as place:
            outcome = x.tpaw("run", x.tiny, "-o", place / "r", before=no_space_check)
            if outcome.code:
                x.refused(outcome, "No space left", str(place), code=4)
            enlarge(place, "60m")
            x.resumed(place / "r", x.tiny, "-o", place / "r")


def stopped_at_random(x, signals, code, times, command=None, run=None, seed=0):
    rng = random.Random(seed)
    run = run or x.folder / "r"
    command = command or ("run", x.tiny, "-o", run)
    codes = code if isinstance(code, tuple) else (code,)
    for _ in range(times):
        child = x.start(*command)
        delay = rng.uniform(0.2, x.whole * 0.7)
        end = time.monotonic() + delay
        child.until(lambda e=end: time.monotonic() > e)
        for number in signals:
            child.send(number)
            time.sleep(0.02)
        outcome = x.sound(child.wait())
        x.said.append(f"{outcome.code}: {outcome.line}")
        if outcome.code not in (0, *codes):
            raise Fail(f"exit {outcome.code}, not {code}: {outcome.line[:300]}")
        if outcome.code > 2 and "to resume, run" not in outcome.err:
            raise Fail(f"says nothing of resuming: {outcome.err[-300:]}")
    return x.tpaw(*command)


@row("F8")
def _(x):
    """SIGTERM at random times, in run, sft, answer and evaluate"""
    x.works(stopped_at_random(x, [signal.SIGTERM], 143, 6))
    x.same(x.folder / "r")
    sft = ("sft", x.tiny, "-o", x.folder / "sft")
    x.works(stopped_at_random(x, [signal.SIGTERM], 143, 2, sft))
    whole = x.tpaw("sft", x.tiny, "-o", x.folder / "sft2")
    x.works(whole)
    x.same(x.folder / "sft", x.folder / "sft2")
    answer = (
        "answer",
        STARTER / "model",
        "--data",
        STARTER / "heldout.jsonl",
        "-o",
        x.folder / "a",
        "generate.max_new_tokens=8",
        "generate.shard_size=32",
        "max_length=256",
    )
    x.works(stopped_at_random(x, [signal.SIGTERM], 143, 2, answer))
    evaluate = ("evaluate", x.copy("done"), "--suite", small_suite(x), "--trust")
    x.works(stopped_at_random(x, [signal.SIGTERM], 143, 2, evaluate))


@row("F9")
def _(x):
    """Ctrl-C twice; SIGTERM and SIGKILL; Ctrl-C and SIGTERM"""
    run = x.folder / "r"
    for signals, code in (
        ([signal.SIGINT] * 2, 130),
        ([signal.SIGTERM, signal.SIGKILL], (143, -9)),
        ([signal.SIGINT, signal.SIGTERM], 130),
        ([signal.SIGINT] * 2, 130),
    ):
        rng = random.randrange(100)
        child = x.start("run", x.tiny, "-o", run)
        end = time.monotonic() + random.Random(rng).uniform(0.3, x.whole * 0.6)
        child.until(lambda e=end: time.monotonic() > e)
        for number in signals:
            child.send(number)
            time.sleep(0.03)
        outcome = x.sound(child.wait())
        x.said.append(f"{outcome.code}: {outcome.line}")
        codes = code if isinstance(code, tuple) else (code,)
        if outcome.code not in (0, *codes):
            raise Fail(f"exit {outcome.code}, not {code}")
    x.resumed(run, x.tiny, "-o", run)


@row("F0")
def _(x):
    """SIGKILL ten times at random over whole runs"""
    rng = random.Random(x.seed)
    kills, round_ = 0, 0
    while kills < 10:
        run = x.folder / f"r{round_}"
        round_ += 1
        for _ in range(4):
            child = x.start("run", x.tiny, "-o", run)
            end = time.monotonic() + rng.uniform(0.05, x.whole * 0.6)
            if child.until(lambda e=end: time.monotonic() > e):
                child.send(signal.SIGKILL)
            x.sound(child.wait())
            kills += child.outcome.code == -9
        x.resumed(run, x.tiny, "-o", run)
    x.said.append(f"{kills} kills in {round_} runs, all the same")


DAMAGE = {
    "truncated": lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
    "empty": lambda p: p.write_bytes(b""),
    "zero tail": lambda p: p.write_bytes(p.read_bytes()[:-20] + bytes(20)),
    "bit flip": lambda p: flip(p),
    "{}": lambda p: p.write_bytes(b"{}"),
    "[]": lambda p: p.write_bytes(b"[]"),
    "removed": lambda p: p.unlink(),
}


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@row("F11")
def _(x):
    """each file of a stopped run is damaged: nothing damaged is used"""
    rng = random.Random(x.seed)
    accepted = []
    files = sorted(
        p.relative_to(x.base / "stopped") for p in (x.base / "stopped").rglob("*") if p.is_file()
    )
    for name in files:
        kinds = list(DAMAGE) if x.whole_matrix else rng.sample(list(DAMAGE), 2)
        for kind in kinds:
            run = x.copy("stopped")
            DAMAGE[kind](run / name)
            outcome = x.tpaw("run", run)
            x.sound(outcome)
            if outcome.code == 0:
                accepted.append(f"{name} {kind}")
                if "training.jsonl" in name.name:
                    (run / name).write_bytes((x.base / "done" / name).read_bytes())
                x.same(run)
            elif (
                name.name.replace("config.yaml", "") not in outcome.text
                and str(name.parent) not in outcome.text
            ):
                raise Fail(f"{name} {kind}: not named: {outcome.line[:300]}")
            x.count += 1
            shutil.rmtree(run)
    x.said.append(f"accepted, with the same result: {', '.join(sorted(set(accepted)))}")


@row("F12")
def _(x):
    """damaged manifests, states and logs of a finished run: run and status are clear"""
    names = [
        "inputs/manifest.json",
        "run.json",
        "config.yaml",
        "players/0.json",
        "summary.json",
        "iterations/0/evaluation/manifest.json",
        "iterations/0/evaluation/results.json",
        "iterations/1/responses/manifest.json",
        "iterations/1/checkpoint/manifest.json",
        "iterations/1/training.jsonl",
        "iterations/2/training.jsonl",
        "iterations/2/evaluation/results.json",
        next(
            str(p.relative_to(x.base / "done"))
            for p in (x.base / "done").glob("logprobs/*/manifest.json")
        ),
    ]
    rng = random.Random(x.seed)
    for name in names:
        for kind in list(DAMAGE) if x.whole_matrix else rng.sample(list(DAMAGE), 3):
            run = x.copy("done")
            DAMAGE[kind](run / name)
            for command in ("status", "run"):
                outcome = x.tpaw(command, run)
                is_rebuilt = name == "summary.json" or "training.jsonl" in name
                if outcome.code == 0 and command == "run" and not is_rebuilt:
                    raise Fail(f"{name} {kind}: run accepted it")
                if "training.jsonl" in name:
                    if outcome.code:
                        raise Fail(
                            f"{name} {kind}: {command}: exit {outcome.code}: {outcome.line[:200]}"
                        )
                    if "training.jsonl" not in outcome.text:
                        raise Fail(f"{name} {kind}: {command}: nothing said")
                x.count += 1
                x.said.append(f"{outcome.code}: {outcome.line}")
            shutil.rmtree(run)


@row("F12b")
def _(x):
    """a number edited in training.jsonl is not shown"""
    run = x.copy("done")
    log = run / "iterations/2/training.jsonl"
    log.write_text(re.sub(r'"rewards/target": [-\d.e]+', '"rewards/target": 61.5', log.read_text()))
    for command in ("status", "run"):
        outcome = x.works(x.tpaw(command, run), "training.jsonl")
        if "61.5" in outcome.out:
            raise Fail("the false number is shown")
    if "61.5" in (run / "summary.json").read_text():
        raise Fail("the false number is in summary.json")


@row("F13")
def _(x):
    """the configuration of a run under way is changed"""
    run = x.copy("stopped")
    before = contents(run)
    x.refused(x.tpaw("run", x.tiny, "-o", run, "objective.eta=1"), "eta", "6.0", "1.0")
    x.refused(x.tpaw("run", x.tiny_with({"objective": {"eta": 1}}), "-o", run), "eta")
    kept = (run / "config.yaml").read_text()
    edit_text(run / "config.yaml", "eta: 6.0", "eta: 1.0")
    x.refused(x.tpaw("run", run), "config.yaml", code=1)
    x.refused(x.tpaw("run", run / "config.yaml", "-o", run), "config.yaml", code=1)
    (run / "config.yaml").write_text(kept.partition("precision:")[0])
    x.refused(x.tpaw("run", run), "config.yaml", code=1)
    x.refused(x.tpaw("status", run), "config.yaml", code=1)
    (run / "config.yaml").write_text(kept)
    if contents(run) != before:
        raise Fail("something was written")
    x.works(x.tpaw("run", run, "train.log_every=3"))


@row("F14")
def _(x):
    """several processes"""
    run = x.copy("stopped")
    x.refused(x.tpaw("run", run, env={"WORLD_SIZE": "2", "RANK": "0"}), "WORLD_SIZE")


@row("F15")
def _(x):
    """other package versions"""
    run = x.copy("stopped")
    facts = json.loads((run / "run.json").read_text())
    facts["versions"]["torch"] = "1.0"
    (run / "run.json").write_text(json.dumps(facts))
    x.refused(x.tpaw("run", run), "run.json", code=1)
    write_sealed(run / "run.json", facts)
    outcome = x.works(x.tpaw("run", run), "versions changed", "torch 1.0")
    x.said[-1] = "0: " + next(line for line in outcome.err.splitlines() if "versions" in line)
    if "1.0" not in str(json.loads((run / "run.json").read_text())["versions"]["torch"]):
        raise Fail("the first version is not recorded any more")
    if not json.loads((run / "run.json").read_text()).get("resumed"):
        raise Fail("the new versions are not recorded")
    x.same(run)


@row("F16")
def _(x):
    """the data file changes in mid-run"""
    data = x.records(starter_rows(48))
    tiny = x.tiny_with({"data": {"path": str(data), "limit": None}})
    run = x.folder / "r"
    child = x.start("run", tiny, "-o", run)
    child.until(lambda: has("iterations/2/responses/*")(run))
    child.send(signal.SIGKILL)
    child.wait()
    x.records(starter_rows(60)[20:])
    x.resumed(run)
    data.unlink()
    x.works(x.tpaw("run", run))


@row("F17")
def _(x):
    """two processes; a stale, odd or lost lock; a stopped holder"""
    run = x.folder / "r"
    first = x.start("run", x.tiny, "-o", run)
    first.until(lambda: has("iterations/1/responses/*")(run))
    x.refused(x.tpaw("run", x.tiny, "-o", run), "in use by process", first.pid, code=1)
    first.send(signal.SIGSTOP)
    x.refused(x.tpaw("run", x.tiny, "-o", run), "in use by process", first.pid, code=1)
    first.send(signal.SIGCONT)
    x.works(x.sound(first.wait()))
    x.same(run)
    for content in ('{"host": "elsewhere", "pid": 1, "since": "x"}', "garbage", "", "\x1b[2J"):
        run = x.copy("stopped")
        (run / "lock").write_text(content)
        x.resumed(run)
    for make in (lambda p: p.mkdir(), lambda p: p.symlink_to("nowhere"), os.mkfifo):
        run = x.copy("stopped")
        (run / "lock").unlink(missing_ok=True)
        make(run / "lock")
        x.refused(x.tpaw("run", run, limit=60), "lock")
    run = x.folder / "lost"
    first = x.start("run", x.tiny, "-o", run)
    first.until(lambda: has("iterations/1/responses/*")(run))
    (run / "lock").unlink()
    second = x.start("run", x.tiny, "-o", run)
    x.refused(x.sound(first.wait()), "lock", code=4)
    second = x.sound(second.wait())
    x.said.append(f"{second.code}: {second.line}")
    x.resumed(run)


@row("F17b")
def _(x):
    """four processes at once"""
    run = x.folder / "r"
    children = [x.start("run", x.tiny, "-o", run) for _ in range(4)]
    codes = sorted(x.sound(c.wait()).code for c in children)
    x.said.append(str(codes))
    x.resumed(run)
    if codes[0] != 0:
        raise Fail(f"none went through: {codes}")


@row("F18")
def _(x):
    """NaN and infinity in training and in weights"""
    for change in ("train.learning_rate=1e6", "train.learning_rate=1e5"):
        outcome = x.tpaw("run", x.tiny, "-o", x.folder / change[-3:], change, "train.warmup=0")
        x.refused(outcome, code=(0, 1))
    x.refused(
        x.tpaw("run", x.tiny, "-o", x.folder / "a", "train.learning_rate=1e30"), "learning_rate"
    )
    for change in ("train.learning_rate=1e300", "objective.lambda=1e38", "objective.eta=1e308"):
        outcome = x.tpaw("run", x.tiny, "-o", x.folder / change[-5:], change, "train.warmup=0")
        x.refused(outcome, code=(0, 1, 2))
    for value, name in ((float("nan"), "nan"), (float("inf"), "inf")):
        model = x.model(name)
        poison(model, value)
        outcome = x.tpaw("run", x.tiny, "-o", x.folder / f"r{name}", f"model.path={model}")
        x.refused(outcome, "NaN or infinite", model, code=1)
        suite = small_suite(x)
        outcome = x.tpaw(
            "evaluate", model, "--suite", suite, "--trust", "-o", x.folder / f"e{name}"
        )
        x.refused(outcome, "NaN or infinite", code=1)
        for greedy in ([], ["--greedy"]):
            outcome = x.tpaw(
                "answer",
                model,
                "--data",
                x.records(pairs(5)),
                "-o",
                x.folder / f"a{name}{len(greedy)}",
                *greedy,
                "generate.max_new_tokens=4",
                "max_length=256",
            )
            x.refused(outcome, "NaN or infinite", code=1)


@row("F19")
def _(x):
    """memory runs out"""
    kinds = set()
    for over in (20, 60, 120, 200):
        run = x.folder / f"r{over}"
        outcome = x.tpaw("run", x.tiny, "-o", run, memory=over * 2**20)
        kinds.add(outcome.code)
        x.said.append(f"{over} MB: {outcome.code}: {outcome.line}")
        if outcome.code and "memory" not in outcome.text:
            raise Fail(f"memory is not named: {outcome.line[:300]}")
        if run.exists():
            x.resumed(run, x.tiny, "-o", run)
    if kinds == {0}:
        raise Skip("no limit was reached")
    run = x.copy("stopped")
    x.resumed(run, run, "generate.tokens_per_batch=2000", "score.tokens_per_row=512")


@row("F20")
def _(x):
    """an evaluation crashes; there is no network"""
    run = x.copy("done")
    suite = small_suite(x, "{{ 1 // 0 }}", "zero")
    x.refused(x.tpaw("evaluate", run, "--suite", suite, "--trust"), "zero")
    x.works(x.tpaw("run", run))
    x.same(run)
    x.refused(x.tpaw("evaluate", run, "--suite", "gsm8k"), "gsm8k")


@row("F21")
def _(x):
    """times of files and the clock go wrong"""
    rng = random.Random(x.seed)
    run = x.copy("stopped")
    for path in run.rglob("*"):
        when = rng.randrange(0, 2**31)
        os.utime(path, (when, when))
    x.resumed(run)

    def wild_clock():
        real, source = time.time, random.Random(1)
        time.time = lambda: real() + source.uniform(-1e8, 1e8)

    run = x.folder / "clock"
    x.works(x.tpaw("run", x.tiny, "-o", run, before=wild_clock))
    x.same(run)


@row("F22")
def _(x):
    """the folder becomes unwritable, moves away or is removed"""
    if os.geteuid():
        raise Skip("needs root")
    places = ["iterations/1/responses/*", "logprobs/*/*", "iterations/2/training/checkpoint-*"]
    for at in places:
        run = x.folder / f"i{places.index(at)}"
        child = x.start("run", x.tiny, "-o", run)
        child.until(lambda r=run, a=at: has(a)(r))
        child.send(signal.SIGSTOP)
        with immutable(run):
            child.send(signal.SIGCONT)
            x.refused(x.sound(child.wait()), str(run), code=4)
        x.resumed(run)
    run = x.copy("stopped")
    with immutable(run):
        x.refused(x.tpaw("run", run), str(run), code=(2, 4))
    x.resumed(run)
    for at in places:
        run = x.folder / f"m{places.index(at)}"
        child = x.start("run", x.tiny, "-o", run)
        child.until(lambda r=run, a=at: has(a)(r))
        moved = run.with_name(run.name + "-moved")
        run.rename(moved)
        x.refused(x.sound(child.wait()), str(run), code=4)
        x.resumed(moved)
    for at in places:
        run = x.folder / f"d{places.index(at)}"
        child = x.start("run", x.tiny, "-o", run)
        child.until(lambda r=run, a=at: has(a)(r))
        child.send(signal.SIGSTOP)
        shutil.rmtree(run)
        child.send(signal.SIGCONT)
        x.refused(x.sound(child.wait()), str(run), code=4)
        if run.exists():  # removed while a step was saved: a part of that step is written again
            x.refused(x.tpaw("run", x.tiny, "-o", run), "not empty", "iterations")
            shutil.rmtree(run)
        x.resumed(run, x.tiny, "-o", run)


@row("F23")
def _(x):
    """SIGKILL while two saved steps exist"""
    killed(
        x,
        [
            has("iterations/1/training/checkpoint-*", 2),
            has("iterations/2/training/checkpoint-*", 2),
            has("iterations/2/training/checkpoint-*", 2),
        ],
    )


@row("F24")
def _(x):
    """a finished run is run again"""
    run = x.copy("done")
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in run.rglob("*") if p.is_file()}
    x.works(x.tpaw("run", run))
    after = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in run.rglob("*") if p.is_file()}
    changed = sorted(
        str(p.relative_to(run))
        for p in before.keys() | after.keys()
        if before.get(p) != after.get(p)
    )
    if changed != ["lock"]:
        raise Fail(f"changed: {changed}")


@row("F25")
def _(x):
    """a run moves"""
    run = x.copy("stopped")
    target = x.folder / "moved ünï/x"
    target.parent.mkdir()
    shutil.move(run, target)
    x.resumed(target)


@row("F26")
def _(x):
    """SIGKILL at the borders of iterations"""
    killed(
        x,
        [
            has("iterations/0/evaluation/manifest.json"),
            has("iterations/1/checkpoint/manifest.json"),
            has("iterations/1/evaluation/manifest.json"),
            has("iterations/2/evaluation/manifest.json"),
        ],
    )


@row("F27")
def _(x):
    """results are not reused for another model, template or data"""
    model, suite = x.model(), small_suite(x)
    evaluate = ("evaluate", model, "--suite", suite, "--trust", "-o", x.folder / "e")
    x.works(x.tpaw(*evaluate))
    x.works(x.tpaw(*evaluate))
    kept = (model / "config.json").read_text()
    edit_json(model / "config.json", {"rms_norm_eps": 0.5})
    x.refused(x.tpaw(*evaluate), "fingerprint")
    (model / "config.json").write_text(kept)
    x.works(x.tpaw(*evaluate))
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").write_text("X" + template)
    x.refused(x.tpaw(*evaluate), "fingerprint")
    (model / "chat_template.jinja").write_text(template)
    data = x.folder / "suite/small-rows.jsonl"
    rows = data.read_text()
    data.write_text(rows.replace("?", "!"))
    x.refused(x.tpaw(*evaluate), "small")
    data.write_text(rows)
    x.works(x.tpaw(*evaluate))
    poison(model, 0.5)
    x.refused(x.tpaw(*evaluate), "fingerprint")


@row("F28")
def _(x):
    """no network; the initial player is gone or changed"""
    x.refused(
        x.tpaw("run", x.tiny, "-o", x.folder / "h", "model.path=nobody/nothing-here"),
        "nobody/nothing-here",
    )
    if (x.folder / "h").exists():
        raise Fail("something was written")
    model = x.model()
    tiny = x.tiny_with({"model": {"path": str(model)}})
    run = x.folder / "r"
    child = x.start("run", tiny, "-o", run)
    child.until(lambda: has("iterations/1/responses/*")(run))
    child.send(signal.SIGKILL)
    child.wait()
    model.rename(x.folder / "away")
    x.refused(x.tpaw("run", run), str(model))
    (x.folder / "away").rename(model)
    kept = (model / "model.safetensors").read_bytes()
    flip(model / "model.safetensors")
    x.refused(x.tpaw("run", run), "fingerprint", code=(1, 2))
    (model / "model.safetensors").write_bytes(kept)
    config = (model / "config.json").read_text()
    edit_json(model / "config.json", {"rms_norm_eps": 0.5})
    x.refused(x.tpaw("run", run), "fingerprint", code=(1, 2))
    (model / "config.json").write_text(config)
    x.resumed(run)
