"""Bad files, tokenizers and answers: refused by name, skipped by reason, or of no consequence."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from builders import ignore, make_model, make_tokenizer, save_model, scorer, sums, write_jsonl
from messages import refused

from tpaw.config.schema import RunConfig
from tpaw.data.token_ids import TokenSequence, token_ids
from tpaw.generation.generator import FakeGenerator
from tpaw.generation.responses import read_responses
from tpaw.pipeline.preflight import read_inputs
from tpaw.scoring.score import deliver_logps, fill_store
from tpaw.scoring.sequences import DistinctSequences
from tpaw.scoring.store import LogprobStore, sequence_key
from tpaw.selfplay import self_play
from tpaw.storage.run_directory import RunDirectory

END = 4
GOOD = sums(39)
ONE = GOOD[:1]


def chat(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


USER, ASSISTANT = ("user", "u"), ("assistant", "a")

REFUSED = {
    "no rows": ("", []),
    "no usable row": (
        [{"prompt": "", "completion": "c"}] * 5,
        ["5 of 5", "the prompt is empty: 5"],
    ),
    "a column missing": ([{"promt": "p", "complete": "c"}], ["did you mean prompt?"]),
    "a wrong type": ([*GOOD, {"question": 3, "answer": "a"}], ["1 of 40", "not text", "record 40"]),
    "a malformed line": (json.dumps(ONE[0]) + "\n{", ["line 2", "JSON"]),
    "no assistant turn": ([chat(USER)] * 3, ["no assistant turn: 3"]),
    "a turn of another role": ([chat(("bot", "b"), USER, ASSISTANT)], ["'bot'"]),
    "a long target": ([{**ONE[0], "answer": "1 " * 200}], ["longer than max_length 128: 1"]),
    "a long prompt": ([{**ONE[0], "question": "1 " * 200}], ["longer than max_length 128: 1"]),
    "an empty target": ([{**ONE[0], "answer": " "}], ["the target is empty: 1"]),
    "a target of end-of-sequence": ([{**ONE[0], "answer": "<|end|>"}], ["end-of-sequence token"]),
    "a plain target of end-of-sequence": (
        [{"prompt": "p", "completion": "<|end|>"}],
        ["the target is empty", "end-of-sequence token: 1"],
    ),
    "half a surrogate pair": ([{**ONE[0], "answer": "\ud83d"}], ["surrogate"]),
    "a raw NUL": ('{"question": "a\0", "answer": "b"}', ["line 1", "control character"]),
    "UTF-16": ('{"question": "q", "answer": "b"}'.encode("utf-16"), ["UTF-8"]),
    "a list as target": (
        [{"prompt": [{"role": "user", "content": "u"}], "rejected": "x", "completion": ["a"]}],
        ["not a list of messages"],
    ),
    "a chosen response without text": (
        [{"prompt": "p", "chosen": [{"role": "assistant"}], "rejected": "x"}],
        ["the target is not text"],
    ),
    "a prompt that is a message": (
        [{"prompt": {"role": "user", "content": "u"}, "completion": "c"}],
        ["the prompt is not text"],
    ),
    "an earlier turn with half a pair": (
        [chat(("system", "\ud83d"), USER, ASSISTANT)],
        ["surrogate"],
    ),
}


def write(path, rows):
    if isinstance(rows, list):
        return write_jsonl(path, rows)
    path.write_bytes(rows if isinstance(rows, bytes) else rows.encode())
    return path


@pytest.mark.parametrize("what", REFUSED)
def test_a_file_that_is_refused(settings, tmp_path, what):
    rows, parts = REFUSED[what]
    path = write(tmp_path / "a.jsonl", rows)
    settings["data"]["path"] = str(path)
    with refused("data.path", path, *parts):
        read_inputs(RunConfig.load(settings))


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: b"\xef\xbb\xbf" + text.encode(),
        lambda text: text.replace("\n", "\r\n").encode(),
        lambda text: text.replace("\n", "\n\n  \n").encode(),
    ],
    ids=["byte order mark", "CRLF", "empty lines"],
)
def test_a_file_that_is_read_as_it_is_meant(settings, tmp_path, encode):
    text = "".join(json.dumps(row) + "\n" for row in sums(24))
    expected = read_inputs(RunConfig.load(settings)).examples
    settings["data"]["path"] = str(write(tmp_path / "a.jsonl", encode(text)))
    found = read_inputs(RunConfig.load(settings)).examples
    assert [example.id for example in found] == [example.id for example in expected]


def tokenizer_without_template(tokenizer):
    tokenizer.chat_template = None


def tokenizer_without_end(tokenizer):
    tokenizer.eos_token = None


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (tokenizer_without_template, ["data.template", "chat template"]),
        (tokenizer_without_end, ["model.eos_token"]),
    ],
)
def test_a_tokenizer_that_is_refused(settings, tmp_path, change, parts):
    folder, tokenizer = save_model(tmp_path / "m"), make_tokenizer()
    change(tokenizer)
    tokenizer.save_pretrained(folder)
    make_model().generation_config.from_dict({}).save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=tokenizer.chat_template is not None)
    settings["model"]["path"] = str(folder)
    settings["data"]["path"] = str(write_jsonl(tmp_path / "a.jsonl", [chat(USER, ASSISTANT)]))
    with refused(*parts):
        read_inputs(RunConfig.load(settings))


def one_iteration(settings, folder, answer, pad_token):
    """Train one iteration from eight rows, with the answers of a fake; give its run and log."""
    model, tokenizer = save_model(folder / "model"), make_tokenizer()
    tokenizer.pad_token = pad_token
    tokenizer.save_pretrained(model)
    settings["model"]["path"] = str(model)
    settings["data"]["limit"] = 8
    settings["train"]["batch_size"] = 4
    settings["generate"]["max_new_tokens"] = 50
    settings |= {"iterations": 1, "evaluate": {}}
    run = RunDirectory(folder / "run")
    generator = FakeGenerator(answer)
    self_play(RunConfig.load(settings), run.root, open_generator=generator.opener)
    return run, [json.loads(line) for line in run.training_log(1).read_text().splitlines()]


def test_unusual_answers_are_scored_and_trained_on(settings, tmp_path):
    """Nothing but the end, nothing at all, special tokens, and 50 tokens without an end."""
    answers = [[END], [], [2, 3, 11, 1, END], [11] * 50]
    left = iter(answers * 2)
    run, log = one_iteration(settings, tmp_path, lambda prompt, seed: next(left), pad_token=None)
    responses = read_responses(run.responses(1))
    assert [response.token_ids.tolist() for response in responses] == answers * 2
    assert [response.finish_reason for response in responses] == ["stop", "length"] * 4
    assert len(log) == 2
    assert np.mean([line["share/truncated"] for line in log]) == 0.5
    for line in log:
        assert np.isfinite(line["loss"])
        assert line["logps/generated"] < 0


def test_answers_that_are_the_targets_are_counted(settings, tmp_path):
    examples = read_inputs(RunConfig.load(settings)).examples
    targets = {example.prompt_ids.tobytes(): example.target_ids.tolist() for example in examples}
    _, log = one_iteration(
        settings,
        tmp_path,
        lambda prompt, seed: targets[prompt.tobytes()],
        pad_token="<|end|>",
    )
    assert {line["share/identical"] for line in log} == {1.0}


def test_log_probs_are_found_in_any_order(tmp_path):
    model, rng = make_model(), random.Random(0)
    sequences = [
        TokenSequence(
            *(token_ids(rng.choices(range(5, 300), k=rng.randrange(1, 9))) for _ in range(2))
        )
        for _ in range(20)
    ]
    keys = [sequence_key(sequence) for sequence in sequences]
    stored = []
    for order in (range(20), rng.sample(range(20), 20)):
        store = LogprobStore(tmp_path / str(len(stored)))
        wanted = DistinctSequences.of(sequences[i] for i in order)
        prepared = scorer(model)

        def compute(shards, folder=store.folder, prepared=prepared):
            for shard in shards:
                yield deliver_logps(folder, shard, prepared, tokens_per_row=100, on_done=ignore)

        fill_store(store, "s", wanted, compute, shard_size=6)
        stored.append(store.logps(keys))
        assert np.array_equal(store.logps(keys[::-1]), stored[-1][::-1])
    assert np.allclose(*stored, atol=1e-5)
