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
    evaluated,
    has,
    immutable,
    no_space_check,
    poison,
    row,
    small_suite,
    starter_rows,
    write_sealed,
)


def killed(x, markers):
    """Kill a run each time that a marker becomes true; it must then resume to the same bytes."""
    run = x.folder / "r"
    for marker in markers:
        outcome = x.sound(x.begin(run, marker).kill())
        x.said.append(str(outcome.code))
    x.rerun(run)


def stop(x, seconds, signals, codes, *command):
    """Send signals after some seconds; require one of the exit codes, or 0 if it was faster."""
    child = x.start(*command)
    child.lasts(seconds)
    for number in signals:
        child.send(number)
        time.sleep(0.02)
    outcome = x.refused(x.sound(child.wait()), code=(0, *codes))
    if outcome.code > 2 and "to resume, run" not in outcome.err:
        raise Fail(f"says nothing of resuming: {outcome.err[-300:]}")


def stopped_at_random(x, times, *command):
    """Send SIGTERM to a command that many times; the next time it must work."""
    rng = random.Random(x.seed)
    for _ in range(times):
        stop(x, rng.uniform(0.2, x.seconds * 0.7), [signal.SIGTERM], [143], *command)
    return x.works(x.tpaw(*command))


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
            x.refused(x.run(place / "r"), str(place), code=4)
            enlarge(place, "60m")
            x.rerun(place / "r")


@row("F7")
def _(x):
    """the disk is full in spite of the check, also while saved steps rotate"""
    for size in ("800k", "3000k", "6200k", "7400k"):
        with disk(x.folder / f"disk-{size}", size) as place:
            outcome = x.run(place / "r", before=no_space_check)
            if outcome.code:
                x.refused(outcome, "No space left", str(place), code=4)
            enlarge(place, "60m")
            x.rerun(place / "r")


@row("F8")
def _(x):
    """SIGTERM at random times, in run, sft, answer and evaluate"""
    stopped_at_random(x, 6, "run", x.tiny, "-o", x.folder / "r")
    x.same(x.folder / "r")
    stopped_at_random(x, 2, "sft", x.tiny, "-o", x.folder / "sft")
    x.works(x.tpaw("sft", x.tiny, "-o", x.folder / "sft2"))
    x.same(x.folder / "sft", x.folder / "sft2")
    answer = (
        "answer",
        STARTER / "model",
        "--data",
        STARTER / "heldout.jsonl",
        "-o",
        x.folder / "a",
    )
    sets = ("generate.max_new_tokens=8", "generate.shard_size=32", "max_length=256")
    stopped_at_random(x, 2, *answer, *sets)
    stopped_at_random(x, 2, "evaluate", x.copy("done"), "--suite", small_suite(x), "--trust")


@row("F9")
def _(x):
    """Ctrl-C twice; SIGTERM and SIGKILL; Ctrl-C and SIGTERM"""
    rng = random.Random(x.seed)
    run = x.folder / "r"
    for signals, codes in (
        ([signal.SIGINT] * 2, [130]),
        ([signal.SIGTERM, signal.SIGKILL], [143, -9]),
        ([signal.SIGINT, signal.SIGTERM], [130]),
        ([signal.SIGINT] * 2, [130]),
    ):
        seconds = rng.uniform(0.3, x.seconds * 0.6)
        stop(x, seconds, signals, codes, "run", x.tiny, "-o", run)
    x.rerun(run)


@row("F0")
def _(x):
    """SIGKILL ten times at random over whole runs"""
    rng = random.Random(x.seed)
    kills, rounds = 0, 0
    while kills < 10:
        run = x.new("r")
        rounds += 1
        for _ in range(4):
            child = x.start("run", x.tiny, "-o", run)
            child.lasts(rng.uniform(0.05, x.seconds * 0.6))
            kills += x.sound(child.kill()).code == -9
        x.rerun(run)
    x.said.append(f"{kills} kills in {rounds} runs, all the same")


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


def some_damage(x, rng, count):
    """That many kinds of damage, or all with `--all`."""
    return list(DAMAGE) if x.damage_all else rng.sample(list(DAMAGE), count)


@row("F11")
def _(x):
    """each file of a stopped run is damaged: nothing damaged is used"""
    rng = random.Random(x.seed)
    accepted = []
    stopped = x.base / "stopped"
    for name in sorted(p.relative_to(stopped) for p in stopped.rglob("*") if p.is_file()):
        for kind in some_damage(x, rng, 2):
            run = x.copy("stopped")
            DAMAGE[kind](run / name)
            outcome = x.tpaw("run", run)
            named = {name.name, str(name.parent)} - {"."}
            if outcome.code and not any(part in outcome.text for part in named):
                raise Fail(f"{name} {kind}: not named: {outcome.line[:300]}")
            if outcome.code == 0:
                accepted.append(f"{name} {kind}")
                if name.name == "training.jsonl":
                    (run / name).write_bytes((x.base / "done" / name).read_bytes())
                x.same(run)
            shutil.rmtree(run)
    x.said.append(f"accepted, with the same result: {', '.join(sorted(set(accepted)))}")


@row("F12")
def _(x):
    """damaged manifests, states and logs of a finished run: run and status name them"""
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
    ]
    manifest = next((x.base / "done").glob("logprobs/*/manifest.json"))
    names.append(str(manifest.relative_to(x.base / "done")))
    rng = random.Random(x.seed)
    for name in names:
        for kind in some_damage(x, rng, 3):
            run = x.copy("done")
            DAMAGE[kind](run / name)
            for command in ("status", "run"):
                outcome = x.tpaw(command, run)
                x.said.append(f"{outcome.code}: {outcome.line}")
                where = f"{name} {kind}: {command}: {x.said[-1][:200]}"
                if name.endswith("training.jsonl"):
                    if outcome.code or "training.jsonl" not in outcome.text:
                        raise Fail(f"not accepted with a note: {where}")
                elif command == "run" and name != "summary.json" and outcome.code == 0:
                    raise Fail(f"accepted: {where}")
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
    x.refused(x.run(run, "objective.eta=1"), "eta", "6.0", "1.0")
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
    """a run is started in several processes"""
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
    x.shows(outcome, "versions")
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
    x.begin(run, has("iterations/2/responses/*"), tiny).kill()
    x.records(starter_rows(60)[20:])
    x.resumed(run)
    data.unlink()
    x.works(x.tpaw("run", run))


@row("F17")
def _(x):
    """two processes; a stale, odd or lost lock; a stopped holder"""
    run = x.folder / "r"
    first = x.begin(run, has("iterations/1/responses/*"))
    x.refused(x.run(run), "in use by process", first.pid, code=1)
    first.send(signal.SIGSTOP)
    x.refused(x.run(run), "in use by process", first.pid, code=1)
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
    first = x.begin(run, has("iterations/1/responses/*"))
    (run / "lock").unlink()
    second = x.start("run", x.tiny, "-o", run)
    x.refused(x.sound(first.wait()), "lock", code=4)
    second = x.sound(second.wait())
    x.said.append(f"{second.code}: {second.line}")
    x.resumed(run)


@row("F17b")
def _(x):
    """four processes start the same run at once"""
    run = x.folder / "r"
    children = [x.start("run", x.tiny, "-o", run) for _ in range(4)]
    codes = sorted(x.sound(c.wait()).code for c in children)
    x.said.append(str(codes))
    x.resumed(run)
    if codes[0] != 0:
        raise Fail(f"none went through: {codes}")


@row("F18")
def _(x):
    """NaN and infinity in training"""
    for change in ("train.learning_rate=1e6", "train.learning_rate=1e5"):
        outcome = x.run(x.folder / change[-3:], change, "train.warmup=0")
        x.refused(outcome, code=(0, 1))
    x.refused(x.run(x.folder / "a", "train.learning_rate=1e30"), "learning_rate")
    for change in ("train.learning_rate=1e300", "objective.lambda=1e38", "objective.eta=1e308"):
        outcome = x.run(x.folder / change[-5:], change, "train.warmup=0")
        x.refused(outcome, code=(0, 1, 2))


@row("F19")
def _(x):
    """memory runs out"""
    kinds = set()
    for over in (20, 60, 120, 200):
        run = x.folder / f"r{over}"
        outcome = x.run(run, memory=over * 2**20)
        kinds.add(outcome.code)
        x.said.append(f"{over} MB: {outcome.code}: {outcome.line}")
        if outcome.code and "memory" not in outcome.text:
            raise Fail(f"memory is not named: {outcome.line[:300]}")
        if run.exists():
            x.rerun(run)
    if kinds == {0}:
        raise Skip("no limit was reached")
    run = x.copy("stopped")
    x.resumed(run, "generate.tokens_per_batch=2000", "score.tokens_per_row=512")


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
    """file times and the clock are wrong"""
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
    x.works(x.run(run, before=wild_clock))
    x.same(run)


@row("F22")
def _(x):
    """the run directory becomes unwritable, is moved or is removed"""
    if os.geteuid():
        raise Skip("needs root")
    places = ["iterations/1/responses/*", "logprobs/*/*", "iterations/2/training/checkpoint-*"]
    for at in places:
        run = x.new("immutable")
        child = x.begin(run, has(at))
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
        run, moved = x.new("run"), x.new("moved")
        child = x.begin(run, has(at))
        run.rename(moved)
        x.refused(x.sound(child.wait()), str(run), code=4)
        x.resumed(moved)
    for at in places:
        run = x.new("removed")
        child = x.begin(run, has(at))
        child.send(signal.SIGSTOP)
        shutil.rmtree(run)
        child.send(signal.SIGCONT)
        x.refused(x.sound(child.wait()), str(run), code=4)
        if run.exists():  # removed while a step was saved: a part of that step is written again
            x.refused(x.run(run), "not empty", "iterations")
            shutil.rmtree(run)
        x.rerun(run)


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

    def files():
        return {
            (str(p.relative_to(run)), p.stat().st_mtime_ns, p.read_bytes())
            for p in run.rglob("*")
            if p.is_file()
        }

    before = files()
    x.works(x.tpaw("run", run))
    changed = {name for name, *_ in before ^ files()}
    if changed != {"lock"}:
        raise Fail(f"changed: {sorted(changed)}")


@row("F25")
def _(x):
    """a run directory is moved"""
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
    model = x.model()

    def evaluate():
        return evaluated(x, model, x.folder / "e")

    x.works(evaluate())
    x.works(evaluate())
    kept = (model / "config.json").read_text()
    edit_json(model / "config.json", {"rms_norm_eps": 0.5})
    x.refused(evaluate(), "fingerprint")
    (model / "config.json").write_text(kept)
    x.works(evaluate())
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").write_text("X" + template)
    x.refused(evaluate(), "fingerprint")
    (model / "chat_template.jinja").write_text(template)
    data = x.folder / "suite/small-rows.jsonl"
    rows = data.read_text()
    data.write_text(rows.replace("?", "!"))
    x.refused(evaluate(), "small")
    data.write_text(rows)
    x.works(evaluate())
    poison(model, 0.5)
    x.refused(evaluate(), "fingerprint")


@row("F28")
def _(x):
    """no network; the initial player is gone or changed"""
    x.refused(
        x.run(x.folder / "h", "model.path=nobody/nothing-here"),
        "nobody/nothing-here",
    )
    if (x.folder / "h").exists():
        raise Fail("something was written")
    model = x.model()
    tiny = x.tiny_with({"model": {"path": str(model)}})
    run = x.folder / "r"
    x.begin(run, has("iterations/1/responses/*"), tiny).kill()
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
