"""Text becomes ids once, and generation gets exactly what training sees."""

from __future__ import annotations

import pytest
from builders import make_model, make_tokenizer, save_model, sums, write_jsonl
from messages import refused
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tpaw.config.schema import DataConfig, RunConfig
from tpaw.data.examples import (
    described_skips,
    prepare_examples,
    read_examples,
    write_examples,
)
from tpaw.data.inputs import Inputs, described_skips_by_source, publish_inputs
from tpaw.pipeline.preflight import read_inputs
from tpaw.storage.artifacts import read_manifest

END = 4  # <|end|> in the tests' tokenizers


def prepare(path, tokenizer=None, max_length=128, **settings):
    config = DataConfig(path=str(path), **settings)
    return prepare_examples(config, "data", tokenizer or make_tokenizer(), (END,), max_length)


def test_templated_ids_are_the_templates_own_and_end_with_the_end_of_turn(tmp_path):
    tokenizer = make_tokenizer()
    path = write_jsonl(tmp_path / "a.jsonl", sums(3))
    for example, row in zip(prepare(path, tokenizer).examples, sums(3), strict=True):
        messages = [{"role": "user", "content": row["question"]}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        whole = tokenizer.apply_chat_template(
            [*messages, {"role": "assistant", "content": row["answer"]}]
        )["input_ids"]
        newline = tokenizer("\n", add_special_tokens=False).input_ids
        assert example.prompt_ids.tolist() == prompt
        # The template's newline after <|end|> is nothing that a model generates.
        assert example.prompt_ids.tolist() + example.target_ids.tolist() + newline == whole
        assert example.target_ids.tolist().count(END) == 1
        assert example.target_ids[-1] == END
        assert example.target_text == row["answer"]


@pytest.mark.parametrize("bos", [False, True])
def test_plain_text_gets_one_bos_where_the_tokenizer_adds_one_and_one_eos(tmp_path, bos):
    tokenizer = make_tokenizer(bos=bos)
    rows = [
        {"prompt": "Say hi", "completion": " hi"},
        {"prompt": "<|bos|>Say", "completion": " x<|end|>"},
    ]
    examples = prepare(write_jsonl(tmp_path / "a.jsonl", rows), tokenizer).examples
    bos_id = tokenizer.convert_tokens_to_ids("<|bos|>")
    assert examples[0].prompt_ids.tolist() == tokenizer("Say hi").input_ids
    assert examples[0].prompt_ids.tolist().count(bos_id) == int(bos)
    assert examples[1].prompt_ids.tolist().count(bos_id) == 1
    for example in examples:
        assert example.target_ids.tolist().count(END) == 1
        assert example.target_ids[-1] == END


def test_a_bos_token_that_the_tokenizer_does_not_add_is_not_added(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.bos_token = "<|bos|>"  # as GPT-2's: declared, and never put before a text
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "Say hi", "completion": " hi"}])
    example = prepare(path, tokenizer).examples[0]
    assert example.prompt_ids.tolist() == tokenizer("Say hi").input_ids
    assert tokenizer.bos_token_id not in example.prompt_ids


def test_of_several_stop_tokens_a_target_gets_the_tokenizers_own(tmp_path):
    config = DataConfig(
        path=str(write_jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "completion": "c"}]))
    )
    for stop_ids in ((END, 0), (END, 5)):
        example = prepare_examples(config, "data", make_tokenizer(), stop_ids, 128).examples[0]
        assert example.target_ids[-1] == END


def test_templates_are_used_as_asked(tmp_path):
    tokenizer = make_tokenizer()
    user = tokenizer.convert_tokens_to_ids("<|user|>")
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "p", "completion": "c"}])
    sums_file = write_jsonl(tmp_path / "sums.jsonl", sums(1))

    def is_templated(path, template):
        return user in prepare(path, tokenizer, template=template).examples[0].prompt_ids

    assert not is_templated(pairs, "auto")
    assert is_templated(pairs, "chat")
    assert is_templated(sums_file, "auto")
    assert not is_templated(sums_file, "none")
    turns = [("system", "s"), ("user", "u"), ("assistant", "a")]
    chat = {"messages": [{"role": role, "content": content} for role, content in turns]}
    chats = write_jsonl(tmp_path / "chats.jsonl", [chat])
    assert is_templated(chats, "auto")
    assert prepare(chats, tokenizer, template="none").examples[0].prompt_text == "s\nu"


def test_messages_need_a_chat_template(tmp_path):
    row = {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    with refused("data.template"):
        prepare(path, make_tokenizer(chat=False))
    plain = prepare(write_jsonl(tmp_path / "b.jsonl", sums(1)), make_tokenizer(chat=False))
    assert plain.examples[0].prompt_text == sums(1)[0]["question"]


def test_a_template_that_never_ends_a_turn(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    with refused("data.template", "<|end|>", "model.eos_token"):
        prepare(write_jsonl(tmp_path / "a.jsonl", sums(1)), tokenizer)


def test_a_template_that_rewrites_the_prompt(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages|length }}" + tokenizer.chat_template
    with refused("data.path", tmp_path / "a.jsonl", "1 of 1"):
        prepare(write_jsonl(tmp_path / "a.jsonl", sums(1)), tokenizer)


def test_a_token_across_the_border_does_not_change_the_prompt(tmp_path):
    tokenizer = make_tokenizer()
    # No special token between prompt and answer: "is" may merge with what follows.
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    )
    rows = [
        {
            "prompt": [{"role": "user", "content": "What i"}],
            "completion": [{"role": "assistant", "content": "s 1"}],
        }
    ]
    example = prepare(write_jsonl(tmp_path / "a.jsonl", rows), tokenizer).examples[0]
    together = tokenizer("What is 1<|end|>", add_special_tokens=False).input_ids
    apart = tokenizer("What i", add_special_tokens=False).input_ids
    assert together[: len(apart)] != apart  # the case is real
    assert example.prompt_ids.tolist() == apart
    assert tokenizer.decode(example.target_ids) == "s 1<|end|>"


def test_skipped_rows_are_counted_by_reason_and_too_many_are_an_error(tmp_path):
    rows = [*sums(98), {"question": "", "answer": "a"}, {"question": "x " * 200, "answer": "y"}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with refused("2 of 100", "2.0%", "data.max_skipped", "1.0%", 99, 128, 100):
        prepare(path)
    prepared = prepare(path, max_skipped=0.02)
    assert len(prepared.examples) == 98
    assert prepared.skipped == {"the prompt is empty": 1, "longer than max_length 128": 1}
    both = "1 (the prompt is empty), 1 (longer than max_length 128)"
    assert described_skips(prepared.skipped) == both
    assert described_skips({}) == "none"
    assert described_skips_by_source({"data": prepared.skipped, "evaluate.data": {}}) == (
        f"in data {both}"
    )


def test_batches_give_the_ids_of_single_texts(tmp_path):
    tokenizer = make_tokenizer()
    rows = [{**row, "answer": row["answer"] * (1 + i % 5)} for i, row in enumerate(sums(300))]
    counts = []
    config = DataConfig(path=str(write_jsonl(tmp_path / "a.jsonl", rows)))
    found = prepare_examples(config, "data", tokenizer, (END,), 500, counts.append)
    assert sum(counts) == 300
    assert len(counts) > 1
    for example, row in zip(found.examples, rows, strict=True):
        text = f"<|user|>{row['question']}<|end|>\n<|assistant|>{row['answer']}<|end|>"
        assert [*example.prompt_ids, *example.target_ids] == tokenizer(text).input_ids


class Counting:
    """A tokenizer that counts the characters that it is given."""

    def __init__(self, tokenizer):
        self.tokenizer, self.characters = tokenizer, 0

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, text, **options):
        self.characters += len(text) if isinstance(text, str) else sum(map(len, text))
        return self.tokenizer(text, **options)


def test_a_huge_record_is_skipped_before_it_is_tokenised(tmp_path):
    tokenizer = Counting(make_tokenizer())
    rows = [*sums(3), {"question": "What is it? " * 100_000, "answer": "y"}]
    rows += [{"question": "What?", "answer": "y " * 500_000}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    found = prepare(path, tokenizer, max_skipped=0.5)
    assert found.skipped == {"longer than max_length 128": 2}
    assert tokenizer.characters < 20_000


def test_a_templated_row_is_tokenised_once(tmp_path):
    tokenizer = Counting(make_tokenizer())
    examples = prepare(write_jsonl(tmp_path / "a.jsonl", sums(500)), tokenizer).examples
    characters = sum(len(e.prompt_text) + len(f"{e.target_text}<|end|>\n") for e in examples)
    assert characters < tokenizer.characters < characters + 1000


def test_a_long_text_of_few_tokens_is_kept(tmp_path):
    """What cannot be told from the number of characters: one token may stand for any of them."""
    core = Tokenizer(models.WordLevel({"<unk>": 0, "<|end|>": 1}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(["<|end|>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>", unk_token="<unk>"
    )
    row = {"prompt": "x" * 10_000 + " " * 10_000 + "y", "completion": " z"}
    config = DataConfig(path=str(write_jsonl(tmp_path / "a.jsonl", [row])))
    [example] = prepare_examples(config, "data", tokenizer, (1,), 4).examples
    assert example.prompt_ids.tolist() == [0, 0]
    assert example.target_ids.tolist() == [0, 1]


def test_max_length_itself_is_not_too_long(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", sums(1))
    example = prepare(path).examples[0]
    length = len(example.prompt_ids) + len(example.target_ids)
    assert len(prepare(path, max_length=length).examples) == 1
    with refused("max_length", length - 1):
        prepare(path, max_length=length - 1)


def test_every_target_too_long_is_an_error_even_if_skipping_is_allowed(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", sums(5))
    with refused("5 of 5", "max_length", 4):
        prepare(path, max_length=4, max_skipped=1.0)


def test_ids_differ_for_equal_prompts_and_stay_when_made_again(tmp_path):
    rows = [
        {"prompt": "p", "completion": "a"},
        {"prompt": "p", "completion": "b"},
        {"prompt": "p", "completion": "a"},
    ]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    ids = [example.id for example in prepare(path).examples]
    assert len(set(ids)) == 3
    assert ids == [example.id for example in prepare(path).examples]
    write_jsonl(path, [rows[0] | {"completion": "c"}, rows[1] | {"prompt": "q"}, rows[2]])
    edited = [example.id for example in prepare(path).examples]
    assert [a == b for a, b in zip(ids, edited, strict=True)] == [False, False, True]


def test_held_out_prompts_that_are_trained_on_are_counted(tmp_path):
    examples = prepare(write_jsonl(tmp_path / "a.jsonl", sums(7))).examples
    inputs = Inputs(examples[:4], [*examples[2:], examples[0]], {}, None, (END,))
    assert inputs.heldout_prompts_in_training() == 3


def test_duplicates_are_counted(settings, tmp_path):
    one, other = sums(2)
    rows = [one, other, one, {**one, "answer": "#### 3"}, one]
    settings["data"]["path"] = str(write_jsonl(tmp_path / "a.jsonl", rows))
    settings["train"]["batch_size"] = 2
    inputs = read_inputs(RunConfig.load(settings))
    assert len(inputs.examples) == 5  # each counts in training as often as it stands there
    assert inputs.duplicates() == {"data": 2, "evaluate.data": 0}
    assert "skipped: none; duplicates: 2 in data;" in inputs.described()
    publish_inputs(tmp_path / "inputs", inputs)
    assert read_manifest(tmp_path / "inputs")["duplicates"] == inputs.duplicates()


def test_an_end_of_sequence_token_that_only_the_model_names(settings, tmp_path):
    folder = save_model(tmp_path / "m")
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    settings["model"]["path"] = str(folder)
    settings["data"]["template"] = "none"
    inputs = read_inputs(RunConfig.load(settings))
    assert inputs.stop_ids == (END,)
    assert all(example.target_ids[-1] == END for example in inputs.examples)


def test_the_last_token_of_the_vocabulary_may_be_used_and_no_later_one(settings, tmp_path):
    examples = read_inputs(RunConfig.load(settings)).examples
    used = int(max(max(e.prompt_ids.max(), e.target_ids.max()) for e in examples))
    settings.pop("evaluate")
    settings["model"]["path"] = str(save_model(tmp_path / "m"))
    make_model(vocab_size=used + 1).save_pretrained(tmp_path / "m")
    assert len(read_inputs(RunConfig.load(settings)).examples) == len(examples)
    make_model(vocab_size=used).save_pretrained(tmp_path / "m")
    with refused("model.path", tmp_path / "m", used):
        read_inputs(RunConfig.load(settings))


def test_examples_survive_the_disk(tmp_path):
    examples = prepare(write_jsonl(tmp_path / "a.jsonl", sums(7))).examples
    write_examples(tmp_path / "x.parquet", examples)
    for before, after in zip(examples, read_examples(tmp_path / "x.parquet"), strict=True):
        assert (before.id, before.prompt_text) == (after.id, after.prompt_text)
        assert before.target_text == after.target_text
        assert before.prompt_ids.tolist() == after.prompt_ids.tolist()
        assert before.target_ids.tolist() == after.target_ids.tolist()
    write_examples(tmp_path / "none.parquet", [])
    assert list(read_examples(tmp_path / "none.parquet")) == []


def test_a_template_that_adds_an_end_of_text_after_the_end_of_turn(tmp_path):
    """Phi-3's does; generation stops at the first, so the target must too."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template += "{% if not add_generation_prompt %}<|bos|>{% endif %}"
    bos = tokenizer.convert_tokens_to_ids("<|bos|>")
    config = DataConfig(path=str(write_jsonl(tmp_path / "a.jsonl", sums(3))))
    for example in prepare_examples(config, "data", tokenizer, (END, bos), 128).examples:
        assert example.target_ids[-1] == END
        assert bos not in example.target_ids


def test_a_target_that_would_end_early_is_counted(tmp_path):
    rows = [*sums(3), {"question": "Which token ends a turn?", "answer": "It is <|end|> here."}]
    prepared = prepare(write_jsonl(tmp_path / "a.jsonl", rows), max_skipped=0.5)
    assert prepared.skipped == {"an end-of-sequence token within the target": 1}
    pairs = [{"prompt": "p", "completion": f"a{x}b"} for x in ("", "", "<|end|>")]
    prepared = prepare(write_jsonl(tmp_path / "b.jsonl", pairs), max_skipped=0.5)
    assert prepared.skipped == {"an end-of-sequence token within the target": 1}


def test_a_target_that_only_ends_is_counted(tmp_path):
    pairs = [{"prompt": "p", "completion": text} for text in ("a", "<|end|>")]
    prepared = prepare(write_jsonl(tmp_path / "a.jsonl", pairs), max_skipped=0.5)
    assert prepared.skipped == {"the target is empty but for an end-of-sequence token": 1}


def test_a_row_that_the_template_refuses_is_counted(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + tokenizer.chat_template
    )
    chat = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": chat}] * 3 + [{"messages": [{"role": "system", "content": "s"}, *chat]}]
    prepared = prepare(write_jsonl(tmp_path / "a.jsonl", rows), tokenizer, max_skipped=0.5)
    assert prepared.skipped == {"the chat template raises an error: no system role": 1}


def test_a_tokenizer_that_begins_any_text_with_a_space(tmp_path):
    """As SentencePiece's do: what follows the prompt must read on without one."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    core.decoder = decoders.Metaspace(prepend_scheme="always")
    texts = [row[key] for row in sums(50) for key in ("question", "answer")]
    special = ["<unk>", "<|end|>"]
    core.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=200, special_tokens=special))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>")
    rows = [{"prompt": row["question"] + "\n", "completion": row["answer"]} for row in sums(20)]
    config = DataConfig(path=str(write_jsonl(tmp_path / "a.jsonl", rows)))
    prepared = prepare_examples(config, "data", tokenizer, (1,), 128)
    for example, row in zip(prepared.examples, rows, strict=True):
        together = tokenizer(row["prompt"] + row["completion"], add_special_tokens=False).input_ids
        assert [*example.prompt_ids, *example.target_ids] == [*together, 1]


def test_a_text_that_the_tokenizer_drops_or_joins(tmp_path):
    vocabulary = {"a": 0, "b": 1, "\n": 2, "\n\n": 3, "a\n": 4, "<|end|>": 5}
    core = Tokenizer(models.BPE(vocabulary, [("a", "\n"), ("\n", "\n")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>")
    rows = [{"prompt": "a", "completion": "\nb"}, {"prompt": "q", "completion": "b"}]
    config = DataConfig(path=str(write_jsonl(tmp_path / "a.jsonl", rows)), max_skipped=0.5)
    found = prepare_examples(config, "data", tokenizer, (5,), 128)
    [example] = found.examples
    assert (example.prompt_ids.tolist(), example.target_ids.tolist()) == ([0], [2, 1, 5])
    assert found.skipped == {"no tokens": 1}
