"""Rebuild the starter: its problems, its tokenizer and its SFT model.

    python -m tpaw.starter.build [--output DIR] [--seed N]

Self-play needs an SFT model that still makes mistakes. Supervised fine-tuning therefore stops
early: with the default seed, 57 % of the model's greedy responses are correct. The same seed gives
the same problems and the same tokenizer on every machine. It gives the same weights on the same CPU
and PyTorch build, because the number of threads is fixed.

The script writes to the output directory:

    model/          a Qwen2 model in fp32 with its tokenizer and chat template
    train.jsonl     the records for self-play, a subset of the model's training records
    heldout.jsonl   the records for evaluation; no question occurs in the training records
    heldout-new.jsonl   those of heldout.jsonl that differ from every training record of the model
                    by more than names and other words (see `problems.pattern`)
    tuning.jsonl    records to choose settings with, so that heldout.jsonl stays unseen
"""

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tpaw.evaluation.exact_match import is_correct
from tpaw.starter.problems import Problem, generate_problems, pattern

STARTER_DIR = Path(__file__).parent
THREADS = 2

PAD, SYSTEM, USER, ASSISTANT, END = "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
VOCABULARY_SIZE = 544
MAX_POSITIONS = 256
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>' -}}
{%- endif -%}"""

SFT_ROWS = 8000
SELF_PLAY_ROWS = 1500
VALIDATION_ROWS = 500
HELDOUT_ROWS = 1200
TUNING_ROWS = 1200

BATCH_SIZE = 64
LEARNING_RATE = 3e-3
WARMUP_STEPS = 50
STEPS_BETWEEN_CHECKS = 100
"""Optimizer steps between two accuracy checks before the learning rate decays."""
DECAY_FROM_ACCURACY = 0.2
"""The learning rate decays once this share of the validation responses is correct."""
DECAY_STEPS = 60
MAX_STEPS_BEFORE_DECAY = 5000
MAX_NEW_TOKENS = 64

IGNORED_LABEL = -100


@dataclass(frozen=True)
class TokenizedRow:
    """One training sequence. The labels ignore the prompt.

    Attributes:
        input_ids: int64, of shape (tokens,).
        labels: int64, of shape (tokens,); `IGNORED_LABEL` for the prompt.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor


def train_tokenizer(problems: Sequence[Problem]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer in which each digit is one token.

    A model of this size learns arithmetic more easily from single digits. The vocabulary contains
    all 256 bytes, so the tokenizer can encode any text.

    Args:
        problems: the training text.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[PAD, SYSTEM, USER, ASSISTANT, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(
        (text for problem in problems for text in (problem.question, problem.answer)), trainer
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerBase) -> Qwen2ForCausalLM:
    """Create an untrained Qwen2 model that trains on a CPU in minutes."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        initializer_range=0.04,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def render_prompt(tokenizer: PreTrainedTokenizerBase, problem: Problem) -> str:
    """Apply the chat template to a question, up to the start of the assistant turn."""
    prompt: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": problem.question}], tokenize=False, add_generation_prompt=True
    )
    return prompt


def tokenize_row(tokenizer: PreTrainedTokenizerBase, problem: Problem) -> TokenizedRow:
    """Tokenise a problem. The loss covers the target and its end-of-sequence token."""
    prompt_ids = tokenizer(render_prompt(tokenizer, problem), add_special_tokens=False).input_ids
    target_ids = tokenizer(problem.answer + END, add_special_tokens=False).input_ids
    return TokenizedRow(
        input_ids=torch.tensor(prompt_ids + target_ids),
        labels=torch.tensor([IGNORED_LABEL] * len(prompt_ids) + target_ids),
    )


def shuffled_batches(
    rows: Sequence[TokenizedRow], pad_token_id: int, rng: random.Random
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield right-padded batches without end. Each epoch has a new order.

    Args:
        rows: the training sequences.
        pad_token_id: the token that pads input_ids.
        rng: source of the order.

    Yields:
        `input_ids` and `labels`, int64, of shape (BATCH_SIZE, longest sequence).
    """
    while True:
        order = list(range(len(rows)))
        rng.shuffle(order)
        for start in range(0, len(order) - BATCH_SIZE + 1, BATCH_SIZE):
            batch = [rows[index] for index in order[start : start + BATCH_SIZE]]
            input_ids = [row.input_ids for row in batch]
            labels = [row.labels for row in batch]
            yield {
                "input_ids": pad_sequence(input_ids, batch_first=True, padding_value=pad_token_id),
                "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED_LABEL),
            }


@torch.no_grad()
def exact_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    batch_size: int = 250,
) -> float:
    """Measure exact match of greedy responses.

    Returns:
        Share of the problems whose response ends in the correct number, from 0 to 1.
    """
    correct = 0
    for start in range(0, len(problems), batch_size):
        batch = problems[start : start + batch_size]
        prompts = [render_prompt(tokenizer, problem) for problem in batch]
        inputs = tokenizer(prompts, padding=True, return_tensors="pt", add_special_tokens=False)
        output_ids = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=False,
            max_new_tokens=MAX_NEW_TOKENS,
        )
        new_ids = output_ids[:, inputs["input_ids"].shape[1] :]
        responses: list[str] = tokenizer.batch_decode(new_ids, skip_special_tokens=True)
        correct += sum(
            is_correct(response, problem.answer)
            for response, problem in zip(responses, batch, strict=True)
        )
    return correct / len(problems)


def train_until_understood(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[Problem],
    validation: Sequence[Problem],
    seed: int,
) -> None:
    """Train until validation accuracy reaches `DECAY_FROM_ACCURACY`, then decay the learning rate.

    The learning rate is constant after the warmup. It decays to 0 in `DECAY_STEPS` steps. The
    number of steps before the decay depends on the seed, so a fixed number could give an untrained
    model. The final accuracy also depends on the seed: seed 0 reaches 57 % of the held-out
    problems, seed 1 reaches 27 %. For another seed, check the printed accuracy and change
    `DECAY_STEPS`; more steps give a better model.

    Args:
        model: the model; it is trained in place.
        tokenizer: its tokenizer.
        train: the training problems.
        validation: the problems that decide when the decay starts.
        seed: seed of the order of the training problems.

    Raises:
        RuntimeError: the accuracy is not reached in `MAX_STEPS_BEFORE_DECAY` steps.
    """
    rows = [tokenize_row(tokenizer, problem) for problem in train]
    batches = shuffled_batches(rows, tokenizer.pad_token_id, random.Random(seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)

    def train_step(learning_rate: float) -> float:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        loss = model(**next(batches), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    for step in range(1, MAX_STEPS_BEFORE_DECAY + 1):
        loss = train_step(LEARNING_RATE * min(1.0, step / WARMUP_STEPS))
        if step % STEPS_BETWEEN_CHECKS == 0:
            accuracy = exact_match(model, tokenizer, validation)
            print(f"step {step:5d}  loss {loss:.3f}  validation accuracy {accuracy:.3f}")
            if accuracy >= DECAY_FROM_ACCURACY:
                break
    else:
        raise RuntimeError(f"accuracy is still below {DECAY_FROM_ACCURACY}; try another --seed")
    for step in range(DECAY_STEPS):
        train_step(LEARNING_RATE * (1 - step / DECAY_STEPS))


def build(output_dir: Path, seed: int) -> None:
    """Build the starter.

    Args:
        output_dir: the folder to write to. It is created if it does not exist.
        seed: seed of the problems, the weights and the order of training.
    """
    torch.set_num_threads(THREADS)
    torch.manual_seed(seed)
    train = generate_problems(SFT_ROWS, seed=3 * seed)
    questions = {problem.question for problem in train}
    heldout = generate_problems(HELDOUT_ROWS, seed=3 * seed + 1, exclude=questions)
    questions |= {problem.question for problem in heldout}
    validation = generate_problems(VALIDATION_ROWS, seed=3 * seed + 2, exclude=questions)
    questions |= {problem.question for problem in validation}
    tuning = generate_problems(TUNING_ROWS, seed=3 * seed + 2, exclude=questions)

    tokenizer = train_tokenizer(train)
    model = make_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens in the vocabulary")
    train_until_understood(model, tokenizer, train, validation, seed)
    print(f"accuracy on the held-out rows: {exact_match(model, tokenizer, heldout):.4f}")

    output_dir.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(output_dir / "model")
    tokenizer.save_pretrained(output_dir / "model")
    write_rows(output_dir / "train.jsonl", train[:SELF_PLAY_ROWS])
    write_rows(output_dir / "heldout.jsonl", heldout)
    write_rows(output_dir / "heldout-new.jsonl", with_new_patterns(heldout, train))
    write_rows(output_dir / "tuning.jsonl", tuning)


def with_new_patterns(problems: Sequence[Problem], train: Sequence[Problem]) -> list[Problem]:
    """Return the problems whose pattern occurs in no training problem."""
    known = {pattern(problem.question) for problem in train}
    return [problem for problem in problems if pattern(problem.question) not in known]


def write_rows(path: Path, problems: Sequence[Problem]) -> None:
    """Write problems as JSON lines. Line ends are Unix line ends on every system."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for problem in problems:
            file.write(json.dumps(asdict(problem)) + "\n")


def main() -> None:
    """Run the command line of this script."""
    parser = argparse.ArgumentParser(description="Rebuild the bundled starter.")
    parser.add_argument("--output", type=Path, default=STARTER_DIR, help="where to write it")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    arguments = parser.parse_args()
    build(arguments.output, arguments.seed)


if __name__ == "__main__":
    main()
