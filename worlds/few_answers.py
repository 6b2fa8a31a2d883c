"""Few answers, many prompts: is what SFT gained a reward? The world W3.

π_0 has seen noisy walks (`worlds.noisy_walks`): one target in three has a wrong sum. π_1 is π_0
after SFT on 200 clean ones. 8,000 more prompts have no target. π_1 answers each of them four times,
and of each prompt one answer is chosen, for example by

    reward = log π_1(answer) − log π_0(answer)

Then π_1 is trained on what was chosen.

    python -m worlds.noisy_walks studies/worlds/noisy_walks
    python -m worlds.few_answers studies/worlds/noisy_walks results.json
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import random
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2ForCausalLM,
)

from worlds import walks
from worlds.making import IGNORED_LABEL, Row, batch_of, distinct, fine_tune, responses, without_end

TARGETS, PROMPTS, HELDOUT, SAMPLES = 200, 8000, 600, 4
BATCH, AT_ONCE = 64, 500
STEPS_OF_SFT, RATE_OF_SFT = 25, 1e-3  # 8 epochs of the 200 targets
STEPS_OF_CHOSEN, RATE_OF_CHOSEN = 250, 3e-4  # 2 epochs of the 8,000 prompts
CHOICES = ("any", "log π_1", "log π_1 − log π_0", "right, if one is")


class Policy:
    """A model with its tokenizer."""

    def __init__(self, model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
        self.model, self.tokenizer = model, tokenizer

    @classmethod
    def of(cls, world: Path) -> Policy:
        """The SFT model of a world, from the folder of that world."""
        tokenizer = AutoTokenizer.from_pretrained(world / "model", padding_side="left")
        return cls(AutoModelForCausalLM.from_pretrained(world / "model").eval(), tokenizer)

    def trained(self, rows: list[Row], steps: int, rate: float, seed: int) -> Policy:
        """This policy after SFT on some rows."""
        model = copy.deepcopy(self.model).train()
        source = _shuffled(rows, seed)
        fine_tune(model, self.tokenizer, source, steps=steps, batch_size=BATCH, learning_rate=rate)
        return Policy(model.eval(), self.tokenizer)

    def answers(self, prompts: list[str], temperature: float) -> list[str]:
        """One answer to each prompt."""
        return [
            text
            for begin in range(0, len(prompts), AT_ONCE)
            for text in responses(
                self.model,
                self.tokenizer,
                prompts[begin : begin + AT_ONCE],
                temperature=temperature,
                max_new_tokens=walks.WORLD.longest,
            )
        ]

    @torch.no_grad()
    def logps(self, rows: list[Row]) -> torch.Tensor:
        """log π of each row's target given its prompt, its end included."""
        found = []
        for begin in range(0, len(rows), AT_ONCE):
            batch = batch_of(self.tokenizer, rows[begin : begin + AT_ONCE])
            logits = self.model(input_ids=batch["input_ids"]).logits[:, :-1]
            labels = batch["labels"][:, 1:]
            counts = labels != IGNORED_LABEL
            picked = logits.log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
            found.append((picked * counts).sum(1))
        return torch.cat(found)

    def accuracy(self, rows: list[Row], temperature: float) -> float:
        """Share of right answers."""
        texts = self.answers([row.prompt for row in rows], temperature)
        pairs = zip(rows, texts, strict=True)
        return statistics.fmean(walks.is_right(row.prompt, "", text) for row, text in pairs)


def _shuffled(rows: list[Row], seed: int) -> Iterator[Row]:
    rng = random.Random(seed)
    while True:
        yield from rng.sample(rows, len(rows))


def chosen_by(
    choice: str, prompts: list[str], answers: list[list[str]], first: Policy, base: Policy
) -> list[Row]:
    """One of the answers to each prompt.

    Args:
        answers: several lists with one answer to each prompt.
        first: π_1.
        base: π_0.
    """
    rows = [[Row(p, text) for p, text in zip(prompts, part, strict=True)] for part in answers]
    if choice == "any":
        return rows[0]
    if choice == "right, if one is":
        rewards = torch.tensor(
            [[float(walks.is_right(row.prompt, "", row.target)) for row in part] for part in rows]
        )
    else:
        rewards = torch.stack([first.logps(part) for part in rows])
        if choice == "log π_1 − log π_0":
            rewards = rewards - torch.stack([base.logps(part) for part in rows])
    best = rewards.argmax(0).tolist()
    return [rows[number][i] for i, number in enumerate(best)]


def measure(folder: Path, seed: int) -> dict[str, dict[str, float]]:
    """Accuracy of each policy, and of the answers that it was trained on."""
    base = Policy.of(folder)
    used: set[str] = set()
    heldout = distinct(walks.draw, HELDOUT, 1, used)
    targets = distinct(walks.draw, TARGETS, 100 + seed, used)
    others = without_end(walks.draw, 200 + seed)
    prompts = list(
        itertools.islice((row.prompt for row in others if row.prompt not in used), PROMPTS)
    )
    torch.manual_seed(seed)
    first = base.trained(targets, STEPS_OF_SFT, RATE_OF_SFT, seed)
    found = {"π_0": _measured(base, heldout), "π_1: SFT on 200 targets": _measured(first, heldout)}
    more = first.trained(targets, STEPS_OF_CHOSEN, RATE_OF_CHOSEN, seed)
    found["π_1 and more SFT on the 200"] = _measured(more, heldout)
    answers = [first.answers(prompts, 1.0) for _ in range(SAMPLES)]
    for choice in CHOICES:
        rows = chosen_by(choice, prompts, answers, first, base)
        right = statistics.fmean(walks.is_right(row.prompt, "", row.target) for row in rows)
        policy = first.trained(rows, STEPS_OF_CHOSEN, RATE_OF_CHOSEN, seed)
        found[f"π_1 and SFT on answers: {choice}"] = _measured(policy, heldout) | {"chosen": right}
    return found


def _measured(policy: Policy, rows: list[Row]) -> dict[str, float]:
    return {
        "greedy": policy.accuracy(rows, 0.0),
        "T = 0.7": policy.accuracy(rows, 0.7),
        "T = 1": policy.accuracy(rows, 1.0),
        "log-prob": policy.logps(rows).mean().item(),
    }


def check_noisy_walks(parser: argparse.ArgumentParser, argument: str, folder: Path) -> None:
    """End the program with an error if the folder has no world in it."""
    if not (folder / "model").is_dir():
        parser.error(
            f"{argument}: {folder} has no folder model; make the world first: "
            f"python -m worlds.noisy_walks {folder}"
        )


def main() -> None:
    """Measure with several seeds; write and print the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of the world noisy_walks")
    parser.add_argument("results", type=Path, help="JSON file to write")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(6)))
    arguments = parser.parse_args()
    check_noisy_walks(parser, "folder", arguments.folder)
    torch.set_num_threads(1)
    results = {seed: measure(arguments.folder, seed) for seed in arguments.seeds}
    arguments.results.write_text(json.dumps(results, indent=1, ensure_ascii=False), "utf-8")
    for name, first in results[arguments.seeds[0]].items():
        means = {
            key: statistics.fmean(of_seed[name][key] for of_seed in results.values())
            for key in first
        }
        print(name, *(f"{key} {value:.3f}" for key, value in means.items()), sep="  ")


if __name__ == "__main__":
    main()
