"""The paper's recipes on real rows, with a small model in place of the large one.

Needs data/gsm8k/{train,test}.jsonl and data/llamafactory/*.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from tpaw.config.schema import DataConfig, RunConfig
from tpaw.data.examples import prepare_examples, read_examples
from tpaw.pipeline.preflight import read_inputs
from tpaw.storage.artifacts import read_manifest
from tpaw.storage.run_directory import RunDirectory

# Qwen's chat template without its default system message.
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# The same with tools, tool calls and their results.
TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>system{% for t in tools %}\n{{ t | tojson }}{% endfor %}<|im_end|>\n"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for c in m['tool_calls'] or [] %}<tool_call>{{ c['function'] | tojson }}</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def small_qwen(shared, tmp_path_factory):
    """A random Qwen2 of 0.2 M parameters with 2,048 positions and a BPE trained on GSM8K."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train([str(shared / "data" / "gsm8k" / "train.jsonl")], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=1100,  # larger than the tokenizer's, as Qwen's own is
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
        )
    )
    folder = tmp_path_factory.mktemp("models") / "small-qwen"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tpaw(*arguments):
    command = [sys.executable, "-c", "from tpaw.cli.main import main; main()", *map(str, arguments)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_run(folder, rows):
    run = RunDirectory(folder)
    examples = read_examples(run.inputs / "train.parquet")
    assert len(examples) == rows
    end = examples[0].target_ids[-1]
    for example in examples:
        assert example.target_ids[-1] == end
        assert example.prompt_text.endswith("<|im_start|>assistant\n")
        assert (example.target_ids == end).sum() == 1
    fingerprints = {read_manifest(run.checkpoint(i))["fingerprint"] for i in range(1, 5)}
    assert len(fingerprints) == 4
    summary = json.loads(run.summary_file.read_text())
    assert summary["iterations_done"] == 4
    first_losses = []
    for i in range(1, 5):
        lines = [json.loads(line) for line in run.training_log(i).read_text().splitlines()]
        assert abs(lines[0]["rewards/target/player_0"]) < 0.05
        first_losses.append(lines[0]["loss"])
    assert first_losses[0] == pytest.approx(0.6931, abs=1e-2)
    return summary


def test_gsm8k_with_the_papers_recipe_on_64_rows(shared, small_qwen, tmp_path):
    data = shared / "data" / "gsm8k"
    settings = [
        f"model.path={small_qwen}",
        f"data.path={data}/train.jsonl",
        "data.limit=64",
        f"evaluate.data.path={data}/test.jsonl",
        "evaluate.data.limit=32",
        # A random model hardly ever ends a response; 1024 tokens of noise would prove nothing more.
        "generate.max_new_tokens=128",
    ]
    flags = [part for setting in settings for part in ("--set", setting)]
    plan = tpaw("plan", "gsm8k-qwen2.5-1.5b", *flags)
    assert "64 examples, 32 held out; skipped: none" in plan
    out = tpaw("run", "gsm8k-qwen2.5-1.5b", "-o", tmp_path / "run", *flags)
    assert "θ_4" in out
    summary = check_run(tmp_path / "run", 64)
    for player in summary["players"]:
        assert player["evaluation"]["exact_match"]["items"] == 32
    assert [p["sequences_scored"] for p in summary["players"][1:]] == [128, 256, 384, 384]


def test_every_preference_pair_is_used_or_counted(shared, small_qwen):
    path = shared / "data" / "llamafactory" / "dpo_en_demo.json"
    overrides = [
        f"model.path={small_qwen}",
        f"data.path={path}",
        "data.max_skipped=1",
        "evaluate.data=null",
    ]
    source = ["ultrachat-qwen2.5-1.5b", "dpo"]
    inputs = read_inputs(RunConfig.load(*source, overrides=overrides))
    pairs = json.loads(path.read_text())
    assert len(inputs.examples) + sum(inputs.skipped["data"].values()) == len(pairs) == 300
    assert set(inputs.skipped["data"]) <= {
        "longer than max_length 2048",
        "rejected: longer than max_length 2048",
    }
    assert len(inputs.examples) > 150  # a small vocabulary makes long rows
    decode = inputs.tokenizer.decode
    for example in inputs.examples:
        pair = pairs[int(example.id.partition("-")[0])]
        assert example.prompt_text.endswith(
            f"{pair['conversations'][-1]['value']}<|im_end|>\n<|im_start|>assistant\n"
        )
        assert decode(example.target_ids) == pair["chosen"]["value"] + "<|im_end|>"
        assert decode(example.rejected_ids) == pair["rejected"]["value"] + "<|im_end|>"


@pytest.mark.parametrize("turn", ["first", "last"])
def test_every_tool_call_is_used_or_counted(shared, small_qwen, tmp_path, turn):
    path = shared / "data" / "llamafactory" / "glaive_toolcall_en_demo.json"
    tokenizer = AutoTokenizer.from_pretrained(small_qwen)
    tokenizer.chat_template = TOOL_TEMPLATE
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    config = DataConfig(path=str(path), turn=turn, max_skipped=1.0)
    found = prepare_examples(config, "data", tokenizer, (stop,), 4096)
    rows = json.loads(path.read_text())
    assert len(found.examples) + sum(found.skipped.values()) == len(rows) == 300
    assert set(found.skipped) <= {"longer than max_length 4096"}
    calls = 0
    for example in found.examples:
        row = rows[int(example.id.partition("-")[0])]
        for tool in json.loads(row["tools"]):
            assert json.dumps(tool, ensure_ascii=False) in example.prompt_text
        of_assistant = [t for t in row["conversations"] if t["from"] in ("gpt", "function_call")]
        expected = of_assistant[0 if turn == "first" else -1]
        text = tokenizer.decode(example.target_ids)
        if expected["from"] == "gpt":
            assert text == expected["value"] + "<|im_end|>"
        else:
            calls += 1
            call = text.removeprefix("<tool_call>").removesuffix("</tool_call><|im_end|>")
            assert json.loads(call) == json.loads(expected["value"])
    assert (calls > 50) == (turn == "first")


@pytest.mark.parametrize(
    ("name", "limit", "usable"),
    # In a third of the tool-call rows the first reply is a call, which this template leaves out.
    [("alpaca_en_demo.json", 100, 100), ("glaive_toolcall_en_demo.json", 40, 26)],
)
def test_instruction_data_of_other_shapes(shared, small_qwen, tmp_path, name, limit, usable):
    settings = [
        f"model.path={small_qwen}",
        f"data.path={shared / 'data' / 'llamafactory' / name}",
        f"data.limit={limit}",
        f"data.max_skipped={1 - usable / limit}",
        "evaluate.data=null",
        "generate.max_new_tokens=64",
        "train.epochs=1",
        "train.batch_size=16",
        "train.activation_checkpointing=false",
        "precision=fp32",
    ]
    flags = [part for setting in settings for part in ("--set", setting)]
    tpaw("run", "ultrachat-qwen2.5-1.5b", "-o", tmp_path / "run", *flags)
    check_run(tmp_path / "run", usable)
