"""Bad input: data files, models, settings and YAML files."""

from __future__ import annotations

import contextlib
import gzip
import json
import os

from bench import (
    ONE_TURN,
    STARTER,
    Fail,
    accepts,
    disk,
    edit_json,
    everywhere,
    listed,
    model_refused,
    pairs,
    poison,
    refuses,
    row,
    starter_rows,
    write_sealed,
)
from commands import YAML_BOMB


@row("B1")
def _(x):
    """no rows, or none after the filters"""
    refuses(x, b"", "rows.jsonl", "no records")
    refuses(x, [{"prompt": "", "completion": "c"}] * 5, "5 of 5", "the prompt is empty: 5")


@row("B2")
def _(x):
    """a column is missing"""
    refuses(x, [{"promt": "p", "complete": "c"}], "promt", "did you mean prompt")
    refuses(
        x, pairs(3), "answr", "available", more=("data.columns={prompt: prompt, target: answr}",)
    )


@row("B3")
def _(x):
    """wrong types"""
    refuses(x, [*pairs(39), {"prompt": 3, "completion": "c"}], "1 of 40", "not text", "record 40")


@row("B4")
def _(x):
    """a malformed line"""
    refuses(x, json.dumps(pairs(1)[0]) + "\n{", "line 2", "malformed JSON")


@row("B5")
def _(x):
    """no assistant turn; unknown roles"""
    user, assistant = ONE_TURN
    refuses(x, [{"messages": [user]}] * 3, "no assistant turn: 3")
    refuses(x, [{"messages": [{"role": "bot", "content": "b"}, user, assistant]}], "bot")


@row("B6")
def _(x):
    """a prompt or target is too long"""
    refuses(x, [{"prompt": "1 " * 400, "completion": "c"}] * 3, "longer than max_length 256: 3")
    refuses(x, [{"prompt": "p", "completion": "1 " * 400}] * 3, "longer than max_length 256: 3")


@row("B7")
def _(x):
    """an empty target; a target of end-of-sequence alone"""
    refuses(x, [{"prompt": "p", "completion": ""}], "the target is empty")
    refuses(x, [{"prompt": "p", "completion": "<|end|>"}], "end-of-sequence token")


@row("B9")
def _(x):
    """duplicates are counted"""
    outcome = accepts(x, pairs(1) * 40, "duplicates")
    x.shows(outcome, "duplicates")


@row("B10")
def _(x):
    """conversations without a chat template"""
    model = x.model()
    (model / "chat_template.jinja").unlink()
    chat = x.records([{"messages": ONE_TURN}] * 4)
    x.refused(x.plan_data(chat, f"model.path={model}"), "chat template")


@row("B11")
def _(x):
    """no padding token; padding that is the end token"""
    for value in (None, "<|end|>"):
        model = x.model()
        edit_json(model / "tokenizer_config.json", {"pad_token": value})
        x.works(x.run(x.new("r"), f"model.path={model}", "iterations=1"))


@row("B12")
def _(x):
    """no end-of-sequence token"""
    model = x.model(eos_token_id=None)
    edit_json(model / "tokenizer_config.json", {"eos_token": None})
    (model / "generation_config.json").unlink()
    everywhere(x, model, "end-of-sequence")


@row("B14")
def _(x):
    """the vocabulary of the model is too small"""
    from safetensors.numpy import load_file, save_file

    model = x.model(vocab_size=100)
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.shape and tensor.shape[0] == 544:
            tensors[name] = tensor[:100].copy()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    everywhere(x, model, "100", "token")


@row("B15")
def _(x):
    """config.json and the weights disagree in shape"""
    everywhere(x, x.model(hidden_size=64), "model.path")


@row("B16")
def _(x):
    """answers that are cut are reported; stop tokens that occur in targets"""
    model = x.model()
    edit_json(model / "generation_config.json", {"eos_token_id": list(range(4, 544))})
    outcome = x.run(x.folder / "r", f"model.path={model}")
    x.refused(outcome, code=(0, 1, 2))
    x.works(
        x.run(x.folder / "long", "iterations=1"),
        "cut before they ended",
        "truncated",
    )
    prompts = x.records(starter_rows(16))
    x.works(x.answer(STARTER / "model", prompts, x.folder / "a", "--greedy", tokens=32))


@row("B20")
def _(x):
    """NaN and infinity in weights"""
    prompts = x.records(pairs(5), "five.jsonl")
    for value in (float("nan"), float("inf")):
        model = x.model()
        poison(model, value)
        for command in ("answer", "evaluate"):
            model_refused(x, model, "NaN or infinite", command=command, code=1)
        outcome = x.answer(model, prompts, x.new("greedy"), "--greedy")
        x.refused(outcome, "NaN or infinite", code=1)
        x.refused(x.run(x.new("r"), f"model.path={model}"), "NaN or infinite", model, code=1)


@row("B21")
def _(x):
    """stored log-probs in another order"""
    import pyarrow.parquet as pq

    run = x.copy("stopped")
    for manifest in run.glob("logprobs/*/manifest.json"):
        tree = json.loads(manifest.read_text())
        for entry in tree["files"]:
            path = manifest.parent / entry["path"]
            table = pq.read_table(path)
            pq.write_table(table.take(list(range(len(table)))[::-1]), path)
            content = path.read_bytes()
            entry |= listed(entry["path"], content)
        write_sealed(manifest, tree)
    x.works(x.tpaw("run", run))
    model = "iterations/2/checkpoint/model.safetensors"
    if (run / model).read_bytes() != (x.base / "done" / model).read_bytes():
        raise Fail("the order decides the result")


@row("B22")
def _(x):
    """unknown and repeated keys"""
    x.refused(
        x.plan("train.learnin_rate=1"),
        "train.learnin_rate",
        "did you mean train.learning_rate",
    )
    path = x.folder / "two.yaml"
    path.write_text("extends: starter\nseed: 1\nseed: 2\n")
    x.refused(x.tpaw("plan", path), "seed", "twice", "line")


@row("B24")
def _(x):
    """values out of range, NaN, booleans, texts"""
    for assignment in (
        "train.learning_rate=-1",
        "train.learning_rate=.nan",
        "train.learning_rate='1e-5'",
        "objective.eta=.inf",
        "seed=true",
        "iterations=1.5",
        "generate.top_p=2",
        "train.batch_size=0",
        "objective.gamma=-.inf",
        "data.limit=-1",
    ):
        x.refused(x.plan(assignment), assignment.partition("=")[0])
    x.works(x.plan("train.learning_rate=1e-5"))


@row("B25")
def _(x):
    """no iterations; no opponents"""
    x.refused(x.plan("iterations=0"), "iterations")
    x.refused(x.plan("team.opponents.last=0"), "team.opponents.last")
    x.works(x.plan("team.opponents.last=99"))


@row("B26")
def _(x):
    """the output holds another run, or other files"""
    run = x.copy("done")
    x.refused(x.run(run, "seed=5"), "seed")
    (x.folder / "mine").mkdir()
    (x.folder / "mine/x").write_text("x")
    x.refused(x.run(x.folder / "mine"), "not empty", "x")


@row("B27")
def _(x):
    """the output cannot be made"""
    (x.folder / "file").write_text("")
    for place, part in (
        (x.folder / "file", "output"),
        (x.folder / "file/below", "output"),
        (x.folder / ("n" * 300), ""),
        ("d/" * 3000 + "x", ""),
        ("/proc/x/y", ""),
        ("/sys/xx", ""),
    ):
        x.refused(x.run(place), part, code=(2, 4))
    x.refused(x.tpaw("plan", "n" * 300), code=2)


@row("B28")
def _(x):
    """the disk is too small: refused before the run starts"""
    with disk(x.folder / "disk", "1m") as place:
        outcome = x.run(place / "r", "generate.max_new_tokens=200", "data.limit=4000")
        x.refused(outcome, "needs up to", "disk space", code=4)


@row("B29")
def _(x):
    """models of other kinds: t5, a classifier, bert, an unknown type, `[]`"""
    for kind, architecture, part in (
        ("t5", "T5ForConditionalGeneration", "t5"),
        ("qwen2", "Qwen2ForSequenceClassification", "Qwen2ForSequenceClassification"),
        ("bert", "BertForMaskedLM", "bert"),
        ("nosuch", "NoSuch", "nosuch"),
    ):
        everywhere(x, x.model(model_type=kind, architectures=[architecture]), part)
    model = x.model()
    (model / "config.json").write_text("[]")
    everywhere(x, model, "config.json")


@row("B30")
def _(x):
    """quantised weights"""
    for quantised in (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "gptq", "bits": 4},
    ):
        everywhere(x, x.model(quantization_config=quantised), "quanti")


@row("B31")
def _(x):
    """an adapter that does not name its base"""
    model = x.model()
    (model / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    for file in ("config.json", "model.safetensors"):
        (model / file).unlink()
    for command in ("plan", "run", "answer", "evaluate"):
        model_refused(x, model, "base_model_name_or_path", command=command)


@row("B32")
def _(x):
    """fp16, positions, seeds, a missing device"""
    x.refused(x.plan("precision=fp16"), "precision", "bf16")
    x.refused(x.plan("max_length=4096"), "max_length", "256")
    x.refused(x.plan("seed=-1"), "seed")
    x.refused(x.plan("seed=99999999999"), "seed")
    import torch

    if not torch.cuda.is_available():
        x.refused(x.plan("device=cuda"), "device", "cuda")


@row("B34")
def _(x):
    """an unknown suite or task; no network for its data"""
    x.refused(x.tpaw("evaluate", STARTER / "model", "--suite", "nosuch"), "nosuch")
    suite = x.folder / "s.yaml"
    task = {"name": "t", "task": "nosuchtask", "num_fewshot": 0, "metric": "acc"}
    suite.write_text(json.dumps({"name": "s", "tasks": [task]}))
    x.refused(x.tpaw("evaluate", STARTER / "model", "--suite", suite), "nosuchtask")
    x.refused(x.tpaw("evaluate", STARTER / "model", "--suite", "gsm8k"), "gsm8k")


@row("B35")
def _(x):
    """held-out prompts that occur in the training data are counted"""
    path = x.records(starter_rows(48))
    outcome = x.plan_data(path, f"evaluate.data.path={path}")
    x.works(outcome, "held-out prompts in the training data: 12")
    x.shows(outcome, "held-out prompts")


@row("B36")
def _(x):
    """a batch larger than the data"""
    x.refused(x.run(x.folder / "r", "train.batch_size=1000"), "step")


@row("B39")
def _(x):
    """surrogates, NUL, byte order marks, UTF-16, CRLF"""
    refuses(x, '{"prompt": "\\ud83d", "completion": "c"}\n', "surrogate")
    refuses(x, b'{"prompt": "a\0", "completion": "c"}\n', "control character")
    refuses(x, json.dumps(pairs(1)[0]).encode("utf-16"), "UTF-8")
    for mark, end in ((b"\xef\xbb\xbf", b"\n"), (b"", b"\r\n"), (b"", b"\n\n\n")):
        accepts(x, mark + end.join(json.dumps(one).encode() for one in pairs(40)) + end)


@row("B40")
def _(x):
    """verdicts of the judge that cannot be parsed are counted"""
    from judge_server import JudgeServer

    replies = iter(["**[[A]]**", "[[A]].", "[[a]]", "[[A]] [[B]]", "> [[A]]", "x\n[[A]]"] * 2)
    with contextlib.closing(JudgeServer(lambda question: next(replies))) as server:
        outcome = x.judge(server.url, "abcdef", "uvwxyz", "--parallel", "1")
    x.refused(outcome, "invalid", code=(0, 3))
    x.shows(outcome, "invalid")


@row("B41")
def _(x):
    """files: parquet, csv, json, gz, folders and pipes"""
    import pyarrow as pa
    import pyarrow.parquet as pq

    good = pairs(40)
    columns = {key: [one[key] for one in good] for key in ("prompt", "completion")}

    def parquet(name, **more):
        path = x.folder / name
        pq.write_table(pa.table(columns | more), path)
        return path

    x.works(x.plan_data(parquet("good.parquet")))
    bad = pa.array([b"\xff\xfe"] * 40).cast(pa.string(), safe=False)
    late = pa.array([2**62] * 40, pa.timestamp("us"))
    zone = pa.array([1] * 40, pa.timestamp("us", tz="No/Where"))
    for name, extra in (("utf8", bad), ("late", late), ("zone", zone)):
        x.works(x.plan_data(parquet(f"{name}.parquet", extra=extra)))
    x.refused(x.plan_data(parquet("prompt.parquet", prompt=bad)), "prompt")
    x.refused(x.plan_data(parquet("numbers.parquet", prompt=pa.array(range(40)))), "not text")
    path = parquet("cut.parquet")
    path.write_bytes(path.read_bytes()[:500])
    x.refused(x.plan_data(path), "parquet")
    refuses(x, gzip.compress(json.dumps(good[0]).encode()), "UTF-8")
    refuses(x, gzip.compress(b"x"), "file type", name="rows.jsonl.gz")
    accepts(x, b"\n\n" + b"\n\n".join(json.dumps(one).encode() for one in good) + b"\n\n")
    (x.folder / "folder.jsonl").mkdir()
    x.refused(x.plan_data(x.folder / "folder.jsonl"), "folder")
    os.mkfifo(x.folder / "pipe.jsonl")
    x.refused(x.plan_data(x.folder / "pipe.jsonl", limit=60), "no such file")
    (x.folder / "loop.jsonl").symlink_to("loop.jsonl")
    x.refused(x.plan_data(x.folder / "loop.jsonl"), "no such file")
    refuses(x, "prompt,completion\na,b,c\n", "2 fields", name="ragged.csv")
    refuses(x, 'prompt,completion\n"a,b\n', "line", name="open.csv")
    refuses(x, "prompt,completion\né,b\n".encode("latin-1"), "utf-8", name="latin.csv")
    refuses(x, f"prompt,completion\n{'x' * 140_000},b\n", "field limit", name="field.csv")
    refuses(x, '{"prompt": ' + "9" * 5000 + ', "completion": "c"}', "line 1")
    refuses(x, "[1, 2]\n", "JSON object")


@row("B42")
def _(x):
    """deep JSON, long names, odd dataset folders, targets that are lists"""
    refuses(x, "[" * 50_000 + "]" * 50_000, "nested too deeply")
    refuses(x, '{"prompt": ' + "[" * 50_000 + "]" * 50_000 + "}", "nested too deeply")
    refuses(x, "[" + '{"a": ' * 50_000, "JSON", name="deep.json")
    x.refused(x.plan_data(x.folder / ("n" * 300 + ".jsonl")), "data.path")
    (x.folder / "ds").mkdir()
    (x.folder / "ds/dataset_info.json").write_text("[]")
    x.refused(x.plan_data(x.folder / "ds"), "not a dataset")
    (x.folder / "ds/state.json").write_text("[]")
    x.refused(x.plan_data(x.folder / "ds"), "not a dataset")
    refuses(x, [{"prompt": ONE_TURN, "rejected": "x", "completion": "\0"}], "")
    refuses(x, [{"prompt": "p", "completion": ["a"]}], "")
    refuses(x, [{"prompt": ONE_TURN[:1], "rejected": "x", "completion": ["a"]}], "")
    refuses(x, [{"prompt": "p", "chosen": [{"role": "assistant"}], "rejected": "x"}], "")


@row("B43")
def _(x):
    """duplicate columns and keys"""
    refuses(x, "prompt,completion,prompt\na,b,c\n", "stands twice", "prompt", name="two.csv")
    refuses(x, '{"prompt": "a", "prompt": "b", "completion": "c"}', "stands twice", "prompt")


@row("B44")
def _(x):
    """YAML: tags, dates, odd keys, deep brackets, aliases, and the same by --set"""
    texts = [
        ("seed: !!int abc", True),
        ("seed: !!float x", True),
        ("seed: !!timestamp x", True),
        ("seed: 2001-99-99", False),
        ("{[1, 2]: 3}", True),
        ("? {a: 1}\n: 2", True),
        ("seed: " + "[" * 20_000, True),
        *((f"{YAML_BOMB}{key}: *i", False) for key in ("extends", "iterations", "train", "seed")),
        (f"{YAML_BOMB}data: *i", False),
    ]
    for text, is_named in texts:
        path = x.new("c").with_suffix(".yaml")
        path.write_text(text + "\n")
        outcome = x.tpaw("plan", path, limit=90, memory=2 * 2**30)
        x.refused(outcome, path.name if is_named else "")
        if len(outcome.text) > 5000:
            raise Fail(f"{path.name}: {len(outcome.text)} characters are said")
    for text in ("seed=!!int x", "seed=2001-99-99", "data.path={[1]: 2}", "seed=" + "[" * 9000):
        x.refused(x.plan(text))


@row("B45")
def _(x):
    """settings that would run forever, or fail late"""
    for text in (
        "iterations=99999999",
        "train.epochs=99999999999999999999",
        "generate.temperature=1e-40",
        "train.training_arguments={max_grad_norm: abc}",
        "train.training_arguments={dataloader_num_workers: -1}",
        "train.training_arguments={max_grad_norm: .nan}",
    ):
        run = x.new("r")
        x.refused(x.run(run, text, limit=120), text.partition("=")[0])
        if run.exists():
            raise Fail(f"{text}: {run} was made")


@row("B46")
def _(x):
    """a row of 10 MB is skipped in little memory"""
    rows = [*pairs(120), {"prompt": "1 2 " * 2_500_000, "completion": "c"}]
    outcome = accepts(x, rows, "longer than max_length")
    x.said[-1] = f"{outcome.code}: {outcome.seconds:.1f} s, {outcome.mb} MB"
    if outcome.mb > 1500:
        raise Fail(f"{outcome.mb} MB")


@row("B47")
def _(x):
    """safetensors headers that are no mapping"""
    for header in (b"[1,2]", b"{}", b"null", b'{"a": 1}', b"x", b'{"a": {"dtype": "F32"}}'):
        model = x.model()
        (model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
        everywhere(x, model, model)


@row("B48")
def _(x):
    """status of damaged evaluations"""
    for name in (
        "inputs/manifest.json",
        "iterations/1/evaluation/manifest.json",
        "iterations/1/checkpoint/manifest.json",
    ):
        run = x.copy("done")
        (run / name).write_text("{}")
        x.refused(x.tpaw("status", run), "manifest.json", code=1)
    run = x.copy("done")
    (run / "iterations/1/evaluation/results.json").write_text("{}")
    x.refused(x.tpaw("status", run), "results.json", code=1)
