"""Preference data of every shape becomes the ids that a person would write down."""

from __future__ import annotations

import pytest
from builders import CHAT_TEMPLATE, write_jsonl
from messages import refused
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tpaw.config.schema import DataConfig, RunConfig
from tpaw.data.examples import prepare_examples, read_examples, write_examples

SPECIAL = ["<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
SYSTEM, USER, ASSISTANT, END = 1, 2, 3, 4
WORDS = ["ask", "good", "bad", "be", "kind", "more", "ok", "thanks"]
ASK, GOOD, BAD, BE, KIND, MORE, OK, THANKS = range(5, 13)


@pytest.fixture(scope="module")
def words():
    """A tokenizer in which every word is one id."""
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *WORDS, "<unk>"])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>", pad_token="<|pad|>", unk_token="<unk>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def prepare(tmp_path, tokenizer, *rows, max_length=64, preferences=True, **settings):
    path = write_jsonl(tmp_path / "rows.jsonl", list(rows))
    config = DataConfig(path=str(path), **settings)
    return prepare_examples(config, "data", tokenizer, (END,), max_length, preferences=preferences)


def message(role, content):
    return {"role": role, "content": content}


def turn(who, value):
    return {"from": who, "value": value}


CHAT = [USER, ASK, END, ASSISTANT]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        pytest.param({"prompt": "ask", "chosen": "good", "rejected": "bad"}, [ASK], id="text"),
        pytest.param(
            {
                "prompt": [message("user", "ask")],
                "chosen": [message("assistant", "good")],
                "rejected": [message("assistant", "bad")],
            },
            CHAT,
            id="messages",
        ),
        pytest.param(
            {
                "chosen": [message("user", "ask"), message("assistant", "good")],
                "rejected": [message("user", "ask"), message("assistant", "bad")],
            },
            CHAT,
            id="implicit prompt",
        ),
        pytest.param(
            {  # UltraFeedback, binarized
                "prompt": "ask",
                "prompt_id": "x",
                "chosen": [message("user", "ask"), message("assistant", "good")],
                "rejected": [message("user", "ask"), message("assistant", "bad")],
                "messages": [message("user", "ask"), message("assistant", "good")],
                "score_chosen": 8.0,
            },
            CHAT,
            id="prompt twice",
        ),
        pytest.param(
            {  # LLaMA-Factory
                "conversations": [turn("human", "ask")],
                "chosen": turn("gpt", "good"),
                "rejected": turn("gpt", "bad"),
            },
            CHAT,
            id="sharegpt",
        ),
        pytest.param(
            {
                "conversations": [
                    turn("system", "be kind"),
                    turn("human", "more"),
                    turn("gpt", "ok"),
                    turn("human", "ask"),
                ],
                "chosen": turn("gpt", "good"),
                "rejected": turn("gpt", "bad"),
            },
            [SYSTEM, BE, KIND, END, USER, MORE, END, ASSISTANT, OK, END, *CHAT],
            id="sharegpt, several rounds",
        ),
        pytest.param(
            {
                "system": "be kind",
                "conversations": [turn("human", "ask")],
                "chosen": turn("gpt", "good"),
                "rejected": turn("gpt", "bad"),
            },
            [SYSTEM, BE, KIND, END, *CHAT],
            id="sharegpt, system column",
        ),
    ],
)
def test_every_shape(tmp_path, words, row, prompt):
    (example,) = prepare(tmp_path, words, row).examples
    assert example.prompt_ids.tolist() == prompt
    assert example.target_ids.tolist() == [GOOD, END]
    assert example.rejected_ids.tolist() == [BAD, END]
    assert example.target_text == "good"
    # Another method trains on the chosen answer.
    (plain,) = prepare(tmp_path, words, row, preferences=False).examples
    assert plain.target_ids.tolist() == [GOOD, END]
    assert plain.rejected_ids is None
    assert plain.id == example.id


def test_named_columns(tmp_path, words):
    row = {"q": "ask", "yes": "good", "no": "bad thanks"}
    columns = {"prompt": "q", "chosen": "yes", "rejected": "no"}
    (example,) = prepare(tmp_path, words, row, columns=columns).examples
    assert example.prompt_ids.tolist() == CHAT
    assert example.rejected_ids.tolist() == [BAD, THANKS, END]
    row = {"yes": [message("user", "ask"), message("assistant", "good")]}
    row |= {"no": [message("user", "ask"), message("assistant", "bad")]}
    columns = {"chosen": "yes", "rejected": "no"}
    assert len(prepare(tmp_path, words, row, columns=columns).examples) == 1
    with refused("data.path", "'nope'", "no, yes"):
        prepare(tmp_path, words, row, columns={"chosen": "yes", "rejected": "nope"})


def test_what_cannot_be_used_is_counted_by_reason(tmp_path, words):
    good = {"prompt": "ask", "chosen": "good", "rejected": "bad"}
    bad = [
        good | {"rejected": "good"},
        good | {"chosen": "  "},
        good | {"rejected": ""},
        good | {"rejected": None},
        good | {"rejected": "bad " * 9},
        good | {"chosen": "good " * 9},
        good | {"rejected": "bad <|end|> bad"},
        good | {"chosen": "good", "rejected": " good "},  # the same to this tokenizer
        {
            "prompt": None,
            "chosen": [message("user", "ask"), message("assistant", "good")],
            "rejected": [message("user", "more"), message("assistant", "bad")],
        },
        good | {"chosen": [message("user", "ask")], "rejected": [message("user", "ask")]},
        {"prompt": None, "chosen": "good", "rejected": "bad"},
    ]
    found = prepare(tmp_path, words, good, *bad, max_length=8, max_skipped=0.95)
    assert len(found.examples) == 1
    assert found.skipped == {
        "chosen and rejected are equal": 2,
        "the target is empty": 1,
        "rejected: the target is empty": 1,
        "rejected: the target is not text": 1,
        "rejected: longer than max_length 8": 1,
        "longer than max_length 8": 1,
        "rejected: an end-of-sequence token within the target": 1,
        "chosen and rejected have different prompts": 1,
        "the conversation has no assistant turn": 1,
        "the prompt is not text": 1,
    }


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "ask", "completion": "good"},
        {"prompt": "ask", "completion": "good", "chosen": None, "rejected": None},
        {"prompt": "ask", "chosen": "good"},
    ],
)
def test_rows_without_two_answers_are_refused(tmp_path, words, row):
    with refused("dpo", "chosen", "rejected"):
        prepare(tmp_path, words, row)
    row = {"q": "ask", "a": "good"}
    with refused("dpo", "chosen", "rejected"):
        prepare(tmp_path, words, row, columns={"prompt": "q", "target": "a"})


@pytest.mark.parametrize(
    "columns", ["{chosen: a}", "{prompt: p, rejected: b}", "{target: t, chosen: a, rejected: b}"]
)
def test_columns_that_make_no_pair(columns):
    with refused("data.columns", "chosen", "rejected", "prompt"):
        RunConfig.load("starter", overrides=[f"data.columns={columns}"])


def test_pairs_survive_the_disk(tmp_path, words):
    rows = [{"prompt": "ask", "chosen": "good", "rejected": w} for w in ("bad", "bad bad more")]
    examples = prepare(tmp_path, words, *rows).examples
    write_examples(tmp_path / "x.parquet", examples)
    for before, after in zip(examples, read_examples(tmp_path / "x.parquet"), strict=True):
        assert before.rejected_ids.tolist() == after.rejected_ids.tolist()
        assert before.target_ids.tolist() == after.target_ids.tolist()
