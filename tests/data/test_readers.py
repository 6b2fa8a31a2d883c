from __future__ import annotations

import csv
import json
import random
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import sums, write_jsonl
from datasets import Dataset, DatasetDict
from messages import IN_BRACKETS, refused

from tpaw.config.schema import DataConfig
from tpaw.data import readers
from tpaw.data.formats import Dialogue, Unusable, columns_to_read, shape_of
from tpaw.data.readers import Records, count_records, read_records
from tpaw.errors import InputError

# Worded by Python and pyarrow.
CANNOT_BE_READ = {"reason": re.compile(r"(?<=malformed JSON: ).*|(?<=cannot be read: ).*")}

USER, SYSTEM, ASSISTANT = ({"role": r, "content": r[0]} for r in ("user", "system", "assistant"))


def convert(row, **settings):
    config = DataConfig(path="x.json", **settings)
    return shape_of(Records([row], row), config, "data")(row)


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_arrow_file(path, rows):
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)


WRITERS = {
    "a.jsonl": write_jsonl,
    "a.json": lambda path, rows: path.write_text(json.dumps(rows)),
    "lines.json": write_jsonl,
    "a.csv": write_csv,
    "a.parquet": lambda path, rows: pq.write_table(pa.Table.from_pylist(rows), path),
    "a.arrow": write_arrow_file,
    "saved": lambda path, rows: Dataset.from_list(rows).save_to_disk(str(path)),
    "splits": lambda path, rows: DatasetDict(train=Dataset.from_list(rows)).save_to_disk(str(path)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_local_format_gives_the_same_rows(tmp_path, name):
    rows = [*sums(5), {"question": 'Größe, "quoted"\nand two lines?', "answer": "a\n#### 1"}]
    WRITERS[name](tmp_path / name, rows)
    assert read_records(DataConfig(path=str(tmp_path / name)), "data") == rows


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("rows", [1, 300, 1025])
def test_records_are_counted_without_their_values(tmp_path, name, rows):
    WRITERS[name](tmp_path / name, sums(rows))
    config = DataConfig(path=str(tmp_path / name))
    done = []
    assert count_records(config, "data", done.append) == sum(done) == rows
    assert count_records(config.model_copy(update={"limit": 299}), "data") == min(rows, 299)


def test_the_stream_that_datasets_caches(tmp_path):
    Dataset.from_list(sums(4)).save_to_disk(str(tmp_path / "d"))
    arrow = next((tmp_path / "d").glob("*.arrow"))
    assert read_records(DataConfig(path=str(arrow)), "data") == sums(4)


def test_limit_takes_the_first_rows(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", sums(5))
    assert read_records(DataConfig(path=str(path), limit=2), "data") == sums(2)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.arrow"])
def test_what_follows_the_limit_is_not_read(tmp_path, name):
    path = tmp_path / name
    if name in ("a.parquet", "a.arrow"):
        table = pa.table({"question": UNREADABLE["not UTF-8"], "answer": ["a", "b"]})
        write_table(path, table)
        rows = [{"question": "fine", "answer": "a"}]
    else:
        rows = sums(1)
        WRITERS[name](path, rows)
        broken = {"a.jsonl": "{", "a.json": ", {", "a.csv": "1,2,3\n"}[name]
        path.write_text(path.read_text().removesuffix("]") + broken)
    assert read_records(DataConfig(path=str(path), limit=1), "data") == rows
    with refused("data.path", path, hide=CANNOT_BE_READ):
        read_records(DataConfig(path=str(path), limit=2), "data")


def json_file(seed):
    """A list of nested records with every kind of blank between them."""
    rng = random.Random(seed)

    def value(depth):
        kinds = [None, True, -1.5e3, 12345, 'é"\\\n🙂', "x" * rng.randrange(30)]
        if depth and rng.random() < 0.5:
            return (
                [value(depth - 1) for _ in range(3)]
                if rng.random() < 0.5
                else {str(i): value(depth - 1) for i in range(3)}
            )
        return rng.choice(kinds)

    records = [{"a": value(2), "b": value(1)} for _ in range(rng.randrange(1, 8))]
    blanks = ["", " ", "\n", "\t\r\n  "]
    text = rng.choice(blanks) + "["
    for i, record in enumerate(records):
        text += rng.choice(blanks) + ("," if i else "") + rng.choice(blanks)
        text += json.dumps(record, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 1]))
    return records, text + rng.choice(blanks) + "]" + rng.choice(blanks)


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_a_json_list_that_is_read_piece_by_piece(tmp_path, monkeypatch, size):
    monkeypatch.setattr(readers, "_BYTES_AT_A_TIME", size)
    for seed in range(30):
        records, text = json_file(seed)
        (tmp_path / "a.json").write_text(text)
        assert read_records(DataConfig(path=str(tmp_path / "a.json")), "data") == records


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_an_error_in_a_json_list_has_its_place_in_the_file(tmp_path, monkeypatch, size):
    monkeypatch.setattr(readers, "_BYTES_AT_A_TIME", size)
    config = DataConfig(path=str(tmp_path / "a.json"))
    for seed in range(30):
        _, text = json_file(seed)
        text = text.rstrip().removesuffix("]").rstrip() + ',\n\n {"c": 1,\n "d": oops}]'
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(json.JSONDecodeError) as expected:
            json.loads((tmp_path / "a.json").read_text())
        with pytest.raises(InputError) as found:
            read_records(config, "data")
        assert str(found.value).endswith(f"malformed JSON: {expected.value}")
        # A comma that is missing has its line.
        (tmp_path / "a.json").write_text(text.replace(',\n\n {"c"', '\n\n {"c"'))
        line = text.count("\n", 0, text.index('{"c"')) + 1
        with pytest.raises(InputError, match=f"no comma .* line {line}$"):
            read_records(config, "data")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_of_a_large_file_no_more_is_read_than_the_limit_needs(tmp_path, name):
    """Far behind the limit stands what is no text, and nobody notices."""
    path = tmp_path / name
    WRITERS[name](path, sums(20_000))
    text = path.read_bytes().removesuffix(b"]")
    path.write_bytes(text + b"\xff" * 100)
    for limit in (1, 48):
        assert read_records(DataConfig(path=str(path), limit=limit), "data") == sums(limit)
    with refused("data.path", path, hide={"reason": re.compile(r"'utf-8' codec.*")}):
        read_records(DataConfig(path=str(path)), "data")


def test_a_folder_of_files_is_prepared_whole_whatever_the_limit(tmp_path, monkeypatch):
    """The description of `data.limit` says so."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "d"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", sums(100))
    assert read_records(DataConfig(path=str(folder), limit=3), "data") == sums(3)
    with (folder / "train.jsonl").open("a") as file:
        file.write("no JSON\n")
    with pytest.raises(InputError, match="DatasetGenerationError"):
        read_records(DataConfig(path=str(folder), limit=3), "data")


@pytest.mark.parametrize("name", ["a.parquet", "saved"])
def test_a_source_without_a_column_that_is_known_has_records(tmp_path, name):
    WRITERS[name](tmp_path / name, [{"text": "x"}] * 3)
    config = DataConfig(path=str(tmp_path / name))
    records = read_records(config, "data", columns_to_read(config))
    assert (records, records.columns) == ([{}] * 3, ("text",))


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        pytest.param(name, text, parts, id=f"{name}-{what}")
        for name, text, what, *parts in [
            ("a.jsonl", '{"a": 1}\n\n{"a": 2\n', "half", "line 3", "JSON"),
            ("a.jsonl", '{"a": 1}\n[1]\n', "list", "line 2", "[1]"),
            ("a.jsonl", "", "empty"),
            ("a.json", '[{"a": 1}, 3]', "number", "2", "3"),
            ("a.json", '[{"a": 1},', "half", "JSON"),
            ("a.json", "[]", "empty"),
            ("a.csv", "question,answer\n1,2\n3\n", "short", "line 3", "2"),
            ("a.csv", "question,answer\n1,2,3\n", "long", "line 2", "2"),
            ("a.parquet", "nonsense", "nonsense", "parquet"),
            ("a.arrow", "nonsense", "nonsense", "arrow"),
            ("a.txt", "nonsense", "nonsense", ".json", ".jsonl"),
        ]
    ],
)
def test_bad_files_are_named_with_the_place(tmp_path, name, text, parts):
    path = tmp_path / name
    path.write_text(text)
    libraries = re.compile(r"(?<=malformed JSON: ).*|(?<= file: ).*")
    with refused(*parts, hide={"reason": libraries}) as caught:
        read_records(DataConfig(path=str(path)), "data")
    assert str(caught.value).startswith(f"data.path: {path}")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_json_that_is_nested_too_deeply(tmp_path, name):
    text = '{"a": ' + "[" * 50_000 + "]" * 50_000 + "}"
    (tmp_path / name).write_text(f"[{text}]" if name == "a.json" else text)
    with refused("data.path", tmp_path / name, 1):
        read_records(DataConfig(path=str(tmp_path / name)), "data")
    nested = "[" * 900 + "]" * 900  # Python reads it, and cannot show it
    (tmp_path / name).write_text(f"[{nested}]" if name == "a.json" else nested)
    with refused("data.path", tmp_path / name, "object"):
        read_records(DataConfig(path=str(tmp_path / name)), "data")


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("a.csv", "question,answer,question\n1,2,3\n", ["question"]),
        ("a.jsonl", '{"question": 1}\n{"answer": 2, "answer": 3}\n', ["line 2", "answer"]),
        ("a.json", '[{"question": 1}, {"q": {"answer": 2, "answer": 3}}]', ["record 2", "answer"]),
    ],
    ids=["csv", "jsonl", "json"],
)
def test_names_that_stand_twice(tmp_path, name, text, parts):
    (tmp_path / name).write_text(text)
    with refused("data.path", tmp_path / name, "twice", *parts):
        read_records(DataConfig(path=str(tmp_path / name)), "data")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_columns_of_a_table_that_stand_twice(tmp_path, name):
    table = pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["prompt", "prompt"])
    write_table(tmp_path / name, table)
    with refused("data.path", tmp_path / name, "prompt", "twice"):
        read_records(DataConfig(path=str(tmp_path / name)), "data")


def write_table(path, table):
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)


UNREADABLE = {
    "not UTF-8": pa.array([b"fine", b"\xff\xfe"], pa.binary()).view(pa.string()),
    "year 10000": pa.array([0, 253_402_300_800], pa.timestamp("s")),
    "time zone": pa.array([None, 0], pa.timestamp("s", tz="Mars/Base")),
}


@pytest.mark.parametrize("what", UNREADABLE)
@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_values_that_python_cannot_hold(tmp_path, name, what):
    table = pa.table({**{key: [row[key] for row in sums(2)] for key in sums(1)[0]}})
    path, config = tmp_path / name, DataConfig(path=str(tmp_path / name))
    write_table(path, table.append_column("when", UNREADABLE[what]))
    # A column that nobody needs does no harm, and is still listed.
    records = read_records(config, "data", columns_to_read(config))
    assert records == sums(2)
    assert records.columns == ("question", "answer", "when")
    write_table(path, table.set_column(1, "answer", UNREADABLE[what]))
    with refused("data.path", path, "record 2", "answer", hide=CANNOT_BE_READ):
        read_records(config, "data", columns_to_read(config))


def test_bytes_that_are_not_text(tmp_path):
    for name in ("a.jsonl", "a.json"):
        (tmp_path / name).write_bytes(b'\xff\xfe{"a": 1}')
        with refused("data.path", tmp_path / name, "UTF-8"):
            read_records(DataConfig(path=str(tmp_path / name)), "data")


@pytest.mark.parametrize(
    "path",
    ["missing.jsonl", "./missing", "/missing/folder", "/" + "x" * 300, "a\0b.jsonl"],
    ids=["file", "relative", "absolute", "300 characters", "NUL"],
)
def test_a_missing_file(path):
    with refused("data.path", path):
        read_records(DataConfig(path=path), "data")


def test_a_hub_id_that_cannot_be_had_says_so():
    with refused("data.path", "nobody/nothing", hide=IN_BRACKETS):
        read_records(DataConfig(path="nobody/nothing"), "data")


def test_a_hub_id_is_loaded_with_name_split_and_revision(monkeypatch):
    import datasets

    calls = {}

    def load_dataset(path, **options):
        calls.update(options, path=path)
        return Dataset.from_list(sums(3))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    config = DataConfig(path="openai/gsm8k", name="main", split="train[:3]", revision="v1")
    assert read_records(config, "data") == sums(3)
    expected = {"name": "main", "split": "train[:3]", "revision": "v1"}
    assert calls == {"path": "openai/gsm8k", **expected}


@pytest.fixture
def two_configurations(tmp_path, monkeypatch):
    """A folder as the repository of openai/gsm8k: two configurations and no default."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "gsm8k"
    card = "---\nconfigs:\n"
    for seed, name in enumerate(("main", "socratic")):
        card += f"- config_name: {name}\n  data_files:\n"
        (folder / name).mkdir(parents=True)
        for split in ("train", "test"):
            card += f"  - split: {split}\n    path: {name}/{split}.jsonl\n"
            write_jsonl(folder / name / f"{split}.jsonl", sums(5 if split == "train" else 2, seed))
    (folder / "README.md").write_text(card + "---\n")
    return folder


def test_a_dataset_with_two_configurations(two_configurations):
    config = DataConfig(path=str(two_configurations), name="socratic")
    assert read_records(config, "data") == sums(5, seed=1)
    config = DataConfig(path=str(two_configurations), name="main", split="test")
    assert read_records(config, "data") == sums(2)
    config = DataConfig(path=str(two_configurations), name="main", split="train[:4]", limit=3)
    assert read_records(config, "data") == sums(3)


@pytest.mark.parametrize("name", [None, "mian"])
def test_a_configuration_that_is_missing_or_unknown(two_configurations, name):
    with refused("evaluate.data.name", two_configurations, "main", name or "socratic"):
        read_records(DataConfig(path=str(two_configurations), name=name), "evaluate.data")


def test_a_folder_that_is_no_dataset_and_a_split_that_is_not_there(tmp_path):
    with refused("data.path", tmp_path):
        read_records(DataConfig(path=str(tmp_path)), "data")
    (tmp_path / "x").mkdir()
    for file in ("dataset_info.json", "state.json"):
        (tmp_path / "x" / file).write_text("[]")
        with refused("data.path", tmp_path / "x", hide=IN_BRACKETS):
            read_records(DataConfig(path=str(tmp_path / "x")), "data")
    DatasetDict(train=Dataset.from_list(sums(1))).save_to_disk(str(tmp_path / "d"))
    with refused("data.path", "'test'", "train"):
        read_records(DataConfig(path=str(tmp_path / "d"), split="test"), "data")


def test_prompt_and_completion_as_text_and_as_messages():
    assert convert({"prompt": "p", "completion": "c"}) == Dialogue("p", "c", False)
    row = {"prompt": [SYSTEM, USER], "completion": [ASSISTANT]}
    assert convert(row) == Dialogue([SYSTEM, USER], "a", True)
    # What stands in the prompt is prompt, earlier answers included.
    row = {"prompt": [USER, ASSISTANT, USER], "completion": "b"}
    assert convert(row) == Dialogue([USER, ASSISTANT, USER], "b", True)


def test_first_round_is_the_default_and_a_system_message_is_kept():
    later = [{"role": "user", "content": "more"}, {"role": "assistant", "content": "last"}]
    row = {"messages": [SYSTEM, USER, ASSISTANT, *later]}
    assert convert(row) == Dialogue([SYSTEM, USER], "a", True)
    assert convert(row, turn="last") == Dialogue([SYSTEM, USER, ASSISTANT, later[0]], "last", True)


def test_sharegpt():
    turns = [
        {"from": "human", "value": "u"},
        {"from": "gpt", "value": "a"},
        {"from": "human", "value": "x"},
    ]
    assert convert({"conversations": turns, "system": "s"}) == Dialogue([SYSTEM, USER], "a", True)
    gap = [{"from": "human", "value": "q1"}, {"from": "gpt"}, *turns[:2]]
    assert convert({"conversations": gap}) == Unusable("the target is not text")
    assert convert({"conversations": [USER, ASSISTANT]}) == Dialogue([USER], "a", True)
    assert convert({"conversations": [{"from": ["human"], "value": "x"}]}) == Unusable(
        "the conversation has no assistant turn"
    )
    assert convert({"conversations": "text"}) == Unusable("the conversation is not a list of turns")
    assert convert({"conversations": [{"from": "human"}, turns[1]]}) == Unusable(
        "the content of a message is not text"
    )


def test_alpaca_joins_instruction_and_input():
    row = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
    assert convert(row) == Dialogue([{"role": "user", "content": "Add.\n1 and 2"}], "3", False)
    assert convert(row | {"input": ""}).prompt == [{"role": "user", "content": "Add."}]
    assert convert(row | {"system": "s"}).prompt[0] == SYSTEM


def test_question_and_answer_and_named_columns():
    assert convert({"question": "u", "answer": "a"}) == Dialogue([USER], "a", False)
    named = {"columns": {"prompt": "q", "target": "r"}}
    # Named columns are treated as question and answer, so both files of a run agree.
    row = {"q": "u", "r": "a", "prompt": "x", "completion": "y"}
    assert convert(row, **named) == convert({"question": "u", "answer": "a"})
    assert convert({"chat": [USER, ASSISTANT]}, columns={"messages": "chat"}) == Dialogue(
        [USER], "a", True
    )


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "", "completion": "c"}, "the prompt is empty"),
        ({"prompt": "p", "completion": " \n"}, "the target is empty"),
        ({"prompt": None, "completion": "c"}, "the prompt is not text"),
        ({"prompt": "p", "completion": 3}, "the target is not text"),
        ({"question": 1, "answer": "a"}, "the prompt is not text"),
        ({"messages": [USER]}, "the conversation has no assistant turn"),
        ({"messages": []}, "the conversation has no assistant turn"),
        ({"messages": "hello"}, "the conversation is not a list of messages"),
        (
            {"messages": [ASSISTANT]},
            "the assistant turn does not follow a user turn or a tool turn",
        ),
        (
            {"messages": [SYSTEM, ASSISTANT]},
            "the assistant turn does not follow a user turn or a tool turn",
        ),
        (
            {"messages": [{"role": "bot", "content": "x"}, USER, ASSISTANT]},
            "a turn has the unknown role 'bot'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}, ASSISTANT]},
            "the content of a message is not text",
        ),
    ],
)
def test_rows_that_cannot_be_used_say_why(row, reason):
    assert convert(row) == Unusable(reason)


def test_a_shape_fits_if_all_its_columns_are_there():
    row = {"prompt": "x", "instruction": "y", "question": "u", "answer": "a"}
    assert convert(row) == Dialogue([USER], "a", False)


def test_columns_that_do_not_fit():
    with refused("data", "text"):
        convert({"text": "x"})
    with refused("data.path", "'q'", "answer, question"):
        convert({"question": "x", "answer": "y"}, columns={"prompt": "q", "target": "answer"})


@pytest.mark.parametrize(
    ("row", "hint"),
    [
        ({"promt": "p", "completion": "c"}, "promt: did you mean prompt?"),
        ({"prompt": "p", "complete": "c"}, "complete: did you mean completion?"),
        ({"mesages": [USER, ASSISTANT]}, "mesages: did you mean messages?"),
        ({"text": "p", "label": "c"}, ""),
    ],
    ids=["prompt", "completion", "messages", "none"],
)
def test_a_column_whose_name_is_almost_right(row, hint):
    with refused("data.path", hint) as caught:
        convert(row)
    assert ("did you mean" in str(caught.value)) == bool(hint)
    with refused("data.path", "'messsages'", "did you mean messages?"):
        convert({"messages": [USER, ASSISTANT]}, columns={"messages": "messsages"})


def test_columns_that_are_null_do_not_decide_the_shape():
    rows = [{"messages": None, "question": "u", "answer": "a"}] * 3
    records = Records(rows, rows[0])
    assert shape_of(records, DataConfig(path="x.json"), "data")(rows[0]) == Dialogue(
        [USER], "a", False
    )


def test_half_a_surrogate_pair_is_no_text():
    reason = Unusable("the target contains half of a surrogate pair")
    assert convert({"prompt": "p", "completion": "\ud800"}) == reason


def test_a_byte_order_mark_and_capital_suffixes(tmp_path):
    (tmp_path / "a.JSONL").write_bytes(b"\xef\xbb\xbf" + json.dumps(sums(1)[0]).encode())
    assert read_records(DataConfig(path=str(tmp_path / "a.JSONL")), "data") == sums(1)
