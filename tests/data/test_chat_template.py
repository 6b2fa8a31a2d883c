"""Tools, tool calls and template options: ids and labels are those of TRL."""

from __future__ import annotations

import itertools
import json
import random

import pytest
from builders import make_model, make_tokenizer, save_model, sums, write_jsonl
from datasets import Dataset
from messages import refused
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from tpaw.config.schema import DataConfig, RunConfig
from tpaw.data.chat_template import ChatFormat
from tpaw.data.examples import prepare_examples
from tpaw.data.inputs import load_inputs, publish_inputs
from tpaw.pipeline.preflight import read_inputs

END = 4  # <|end|> in the tests' tokenizers

# What Qwen3's does: tools before the conversation, no thinking if asked, calls and results.
QWEN3_LIKE = r"""
{%- if tools %}<|system|># Tools
    {%- for tool in tools %}{{ '\n' ~ tool | tojson }}{% endfor %}<|end|>{{ '\n' }}
{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'tool' %}<|user|><tool_response>{{ m.content }}</tool_response>
    {%- elif m.role == 'assistant' %}<|assistant|>
        {%- if loop.last and enable_thinking is defined and not enable_thinking %}<think></think>
        {%- endif %}
        {%- if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}
        {%- if m.content %}{{ m.content }}{% endif %}
        {%- for call in m.tool_calls or [] %}<tool_call>{"name": "{{ call.function.name }}", {# #}
            {#- #}"arguments": {{ call.function.arguments | tojson }}}</tool_call>{% endfor %}
    {%- else %}<|{{ m.role }}|>{{ m.content }}
    {%- endif %}<|end|>{{ '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>
    {%- if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}
{%- endif %}"""

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds two numbers.",
            "parameters": {"type": "object", "properties": {"a": {"type": "number"}}},
        },
    }
]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
ASK = {"role": "user", "content": "What is 1 + 2?"}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
ENDS = {"type": "function", "function": {"name": "<|end|>", "arguments": {}}}
RESULT = {"role": "tool", "content": "3"}
ANSWER = {"role": "assistant", "content": "It is 3."}
WRONG = {"role": "assistant", "content": "It is 4."}


@pytest.fixture(scope="module")
def tokenizer():
    made = make_tokenizer()
    made.chat_template = QWEN3_LIKE
    return made


@pytest.fixture(scope="module")
def model():
    return make_model()


def prepare(folder, tokenizer, *rows, preferences=False, **settings):
    config = DataConfig(path=str(write_jsonl(folder / "rows.jsonl", rows)), **settings)
    return prepare_examples(config, "data", tokenizer, (END,), 1000, preferences=preferences)


OPTIONS = {
    "no thinking": {"chat_template_kwargs": {"enable_thinking": False}},
    "tools": {"tools": TOOLS},
    "tools as JSON": {"tools": json.dumps(TOOLS)},
    "both": {"tools": TOOLS, "chat_template_kwargs": {"enable_thinking": False}},
    "neither": {},
}
CONVERSATIONS = {
    "one round": [ASK, ANSWER],
    "after a tool": [ASK, CALLS, RESULT, ANSWER],
    "a call": [ASK, CALLS],
    "a call without text": [ASK, {**CALLS, "content": None}],
    "reasoning": [ASK, {**ANSWER, "reasoning_content": "1 and 2"}],
}


@pytest.mark.parametrize(
    ("options", "conversation"),
    [
        ("no thinking", "one round"),
        ("no thinking", "a call"),
        ("tools", "after a tool"),
        ("tools", "a call without text"),
        ("tools as JSON", "one round"),
        ("both", "after a tool"),
        ("neither", "reasoning"),
    ],
)
def test_ids_and_labels_are_those_of_trl(tmp_path, tokenizer, model, options, conversation):
    messages = CONVERSATIONS[conversation]
    row = {"prompt": messages[:-1], "completion": messages[-1:], **OPTIONS[options]}
    arguments = SFTConfig(str(tmp_path / "sft"), report_to="none", use_cpu=True, bf16=False)
    trainer = SFTTrainer(
        model, arguments, train_dataset=Dataset.from_list([row]), processing_class=tokenizer
    )
    [expected] = trainer.train_dataset
    [example] = prepare(tmp_path, tokenizer, row).examples
    ids = [*example.prompt_ids.tolist(), *example.target_ids.tolist()]
    labels = [-100] * len(example.prompt_ids) + example.target_ids.tolist()
    newline = tokenizer("\n", add_special_tokens=False).input_ids
    assert ids + newline == expected["input_ids"]
    assert labels + newline == expected["labels"]
    # As a conversation, the record has the same last turn.
    row = {"messages": messages, **OPTIONS[options]}
    [same] = prepare(tmp_path, tokenizer, row, turn="last").examples
    assert same.prompt_ids.tolist() == example.prompt_ids.tolist()
    assert same.target_ids.tolist() == example.target_ids.tolist()


def test_preference_ids_are_those_of_trl(tmp_path, tokenizer, model):
    row = {"prompt": [ASK, CALLS, RESULT], "chosen": [ANSWER], "rejected": [WRONG], "tools": TOOLS}
    row["chat_template_kwargs"] = {"enable_thinking": False}
    arguments = DPOConfig(str(tmp_path / "dpo"), report_to="none", use_cpu=True, bf16=False)
    trainer = DPOTrainer(
        model,
        ref_model=make_model(seed=1),
        args=arguments,
        train_dataset=Dataset.from_list([row]),
        processing_class=tokenizer,
    )
    [expected] = trainer.train_dataset
    [example] = prepare(tmp_path, tokenizer, row, preferences=True).examples
    newline = tokenizer("\n", add_special_tokens=False).input_ids
    assert example.prompt_ids.tolist() == expected["prompt_ids"]
    assert [*example.target_ids.tolist(), *newline] == expected["chosen_ids"]
    assert [*example.rejected_ids.tolist(), *newline] == expected["rejected_ids"]
    assert tokenizer.decode(example.rejected_ids) == "It is 4.<|end|>"


def test_options_of_a_question_with_an_answer(tmp_path, tokenizer):
    rows = [{**row, **OPTIONS["no thinking"]} for row in sums(2)]
    for example in prepare(tmp_path, tokenizer, *rows).examples:
        assert example.prompt_text.endswith("<|assistant|><think></think>")


def test_a_run_keeps_the_prompts_with_their_options(settings, tokenizer, tmp_path):
    """Generation, evaluation and a resumed run read inputs/, and `tpaw answer` reads the file."""
    model = save_model(tmp_path / "m")
    tokenizer.save_pretrained(model)
    rows = [{**row, **OPTIONS["both"]} for row in sums(16)]
    path = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    settings |= {"model": {"path": str(model)}, "data": {"path": path}, "max_length": 256}
    settings["evaluate"] = {"data": {"path": path}}
    config = RunConfig.load(settings)
    publish_inputs(tmp_path / "inputs", read_inputs(config))
    kept = load_inputs(tmp_path / "inputs", config)
    again = prepare_examples(config.data, "data", kept.tokenizer, kept.stop_ids, 256).examples
    rendered = [
        kept.tokenizer.apply_chat_template(
            [{"role": "user", "content": row["question"]}],
            tools=TOOLS,
            enable_thinking=False,
            add_generation_prompt=True,
        )["input_ids"]
        for row in rows
    ]
    for examples in (kept.examples, kept.heldout, again):
        assert [example.prompt_ids.tolist() for example in examples] == rendered


def test_the_rounds_of_a_conversation_with_tools(tmp_path, tokenizer):
    row = {"messages": [ASK, CALLS, RESULT, ANSWER], "tools": TOOLS}
    [first] = prepare(tmp_path, tokenizer, row).examples
    assert tokenizer.decode(first.target_ids) == (
        '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call><|end|>'
    )
    assert json.loads(first.target_text) == [CALL]
    found = prepare(tmp_path, tokenizer, row, turn="last")
    [last] = found.examples
    assert last.prompt_text.endswith(
        '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call><|end|>\n'
        "<|user|><tool_response>3</tool_response><|end|>\n<|assistant|>"
    )
    assert last.target_text == "It is 3."
    assert list(found.instructions) == [
        f"user: What is 1 + 2?\n\nassistant: {json.dumps([CALL])}\n\ntool: 3"
    ]


def test_sharegpt_calls_and_observations(tmp_path, tokenizer):
    turns = [
        ("human", ASK["content"]),
        ("function_call", json.dumps(CALL["function"])),
        ("observation", "3"),
        ("gpt", "It is 3."),
    ]
    sharegpt = {"conversations": [{"from": who, "value": text} for who, text in turns]}
    messages = {"messages": [ASK, CALLS, RESULT, ANSWER]}
    for turn in ("first", "last"):
        [one] = prepare(tmp_path, tokenizer, sharegpt, turn=turn).examples
        [other] = prepare(tmp_path, tokenizer, messages, turn=turn).examples
        assert one.prompt_text == other.prompt_text
        assert one.target_ids.tolist() == other.target_ids.tolist()


def test_a_call_needs_no_text_but_takes_no_other_content(tmp_path, tokenizer):
    rows = [{"messages": [ASK, {**CALLS, "content": content}]} for content in (None, "", 7)]
    found = prepare(tmp_path, tokenizer, *rows, max_skipped=0.5)
    assert len(found.examples) == 2
    assert found.skipped == {"the target is not text": 1}


def test_a_blank_system_column_adds_no_turn(tmp_path, tokenizer):
    row = {"instruction": "What is 1 + 2?", "output": "3"}
    for system, turns in ((" \n", 1), ("Be brief.", 2)):
        [example] = prepare(tmp_path, tokenizer, {**row, "system": system}).examples
        assert example.prompt_text.count("<|end|>") == turns


def test_a_call_that_ends_with_another_token(tmp_path):
    """As gpt-oss: an answer ends with <|return|>, a call with <|call|>."""
    tokenizer = make_tokenizer()
    ends = "{%- endif %}{% if not m.tool_calls %}<|end|>{% endif %}{{"
    tokenizer.chat_template = QWEN3_LIKE.replace("{%- endif %}<|end|>{{", ends)
    rows = [{"messages": [ASK, ANSWER]}, {"messages": [ASK, CALLS]}]
    found = prepare(tmp_path, tokenizer, *rows, max_skipped=0.5)
    assert found.skipped == {"the chat template ends a tool call without end of sequence": 1}


LEAVES_OUT = "the chat template leaves out "


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"messages": [ASK, ANSWER, RESULT, ANSWER]},
            f"{LEAVES_OUT}a turn of role 'tool'",
        ),
        ({"messages": [ASK, CALLS]}, f"{LEAVES_OUT}tool calls"),
        ({"messages": [ASK, {**CALLS, "content": None}]}, f"{LEAVES_OUT}tool calls"),
        ({"messages": [ASK, ANSWER], "tools": "[{"}, "the column tools is malformed JSON"),
        ({"messages": [ASK, ANSWER], "tools": {"a": 1}}, "the column tools is not a list"),
        (
            {"messages": [ASK, ANSWER], "chat_template_kwargs": [1]},
            "the column chat_template_kwargs is not a mapping",
        ),
        (
            {"messages": [ASK, ANSWER], "chat_template_kwargs": {"chat_template": "{{"}},
            "the chat template raises an error: ",
        ),
        (
            {"messages": [ASK, ANSWER], "chat_template_kwargs": {"tokenize": True}},
            "the chat template raises an error: ",
        ),
        (
            {"messages": [{"role": "system", "content": "\ud800"}, ASK, ANSWER]},
            "the content of a message contains half of a surrogate pair",
        ),
        (
            {"messages": [ASK, ANSWER], "tools": [{"name": "\ud800"}]},
            "the rendered text contains half of a surrogate pair",
        ),
        (
            {"messages": [ASK, {**CALLS, "tool_calls": [ENDS]}]},
            "an end-of-sequence token within the target",
        ),
    ],
)
def test_what_the_template_cannot_render_is_counted(tmp_path, tokenizer, row, reason):
    turn = "last"
    if LEAVES_OUT in reason:
        tokenizer = make_tokenizer()
        tokenizer.chat_template = (
            "{% for m in messages if m.role != 'tool' %}<|{{ m.role }}|>{{ m.content }}<|end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
        )
    good = {"messages": [ASK, ANSWER]}
    found = prepare(tmp_path, tokenizer, good, row, turn=turn, max_skipped=0.5)
    [said] = found.skipped
    assert said.startswith(reason)


def test_without_a_template_a_call_is_no_text(tmp_path, tokenizer):
    rows = [{"messages": [ASK, ANSWER]}, {"messages": [ASK, {**CALLS, "content": None}]}]
    found = prepare(tmp_path, tokenizer, *rows, template="none", max_skipped=0.5)
    assert found.skipped == {"a message is a tool call, which needs the chat template": 1}
    assert found.examples[0].prompt_text == ASK["content"]


THINKS = QWEN3_LIKE.replace("prompt %}<|assistant|>", "prompt %}<|assistant|><think>")


def test_a_template_that_opens_the_response_itself(tmp_path):
    """As DeepSeek-R1's: the prompt ends with <think>, which is left out before an answer."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = THINKS
    row = {"messages": [ASK, ANSWER]}
    with refused("chat_template_kwargs", "prompt and completion", "1 of 1"):
        prepare(tmp_path, tokenizer, row)
    # The way out that the error names: the text as the model should read it.
    rendered = {"prompt": "<|user|>What is 1 + 2?<|end|>\n<|assistant|><think>"}
    rendered["completion"] = "1 and 2</think>It is 3."
    [example] = prepare(tmp_path, tokenizer, rendered).examples
    whole = tokenizer(rendered["prompt"] + rendered["completion"] + "<|end|>").input_ids
    assert [*example.prompt_ids.tolist(), *example.target_ids.tolist()] == whole


def tokenizers_of_many_kinds():
    """Tokenizers that cut and change text in the ways that published ones do."""
    plain = {"normalized": False}
    flags = {
        "specials": [
            AddedToken(token, **plain) for token in ("<|a|>", "<|ab|>", "|>x", "++", "</s>")
        ],
        "strips": [
            AddedToken("<|a|>", lstrip=True, **plain),
            AddedToken("<|ab|>", rstrip=True, **plain),
            AddedToken("</s>", **plain),
        ],
        "words": [AddedToken("<|a|>", single_word=True, **plain), AddedToken("</s>", **plain)],
        "normalized": [AddedToken("<|a|>", **plain), AddedToken("</s>", normalized=True)],
    }
    normalizer_of = {
        "none": None,
        "prepend": normalizers.Sequence(
            [normalizers.Prepend("_"), normalizers.Replace(" ", "_"), normalizers.Lowercase()]
        ),
    }
    splits = {
        "bytes": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "space before": pre_tokenizers.ByteLevel(add_prefix_space=True),
        "first": pre_tokenizers.Metaspace(prepend_scheme="first"),
    }
    for (flag, tokens), (change, normalizer), (split, pre) in itertools.product(
        flags.items(), normalizer_of.items(), splits.items()
    ):
        core = Tokenizer(models.BPE(unk_token=None, byte_fallback=False))
        core.pre_tokenizer = pre
        if normalizer is not None:
            core.normalizer = normalizer
        trainer = trainers.BpeTrainer(
            vocab_size=330,
            initial_alphabet=[*pre_tokenizers.ByteLevel.alphabet(), "▁", "_"],
            show_progress=False,
        )
        core.train_from_iterator(["a b ab  x |> <| \n </s> aa bb"] * 3, trainer)
        core.add_tokens(tokens)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
        yield f"{flag}, {change}, {split}", tokenizer


@pytest.mark.parametrize(
    "made", [pytest.param(made, id=name) for name, made in tokenizers_of_many_kinds()]
)
def test_the_ids_of_a_prompt_are_found_in_those_of_the_whole(made):
    """Whatever stands at the border, and however the tokenizer cuts and changes text."""
    stop = made.convert_tokens_to_ids("</s>")
    chat = ChatFormat(made, (stop,), "auto", "data.template", 1000)
    rng = random.Random(0)
    pieces = ["a", "b", " ", "\n", "<|a|>", "<|ab|>", "|>x", "x", "<|", "|>", "</s>", "</S>"]
    pieces += ["</", "A", "s>", "+", "+"]
    found = 0
    for _ in range(300):
        prompt, rest = ("".join(rng.choices(pieces, k=rng.randrange(1, 9))) for _ in range(2))
        [whole] = chat._tokenised([prompt + rest])
        ids = chat._borders.prompt_ids(prompt, whole)
        if ids is not None:
            found += 1
            assert ids == made(prompt, add_special_tokens=False).input_ids, (prompt, rest)
        if stop in made(rest, add_special_tokens=False).input_ids:
            assert chat._borders.may_have_stop(rest), rest
    assert found > 50
