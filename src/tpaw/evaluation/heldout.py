"""Held-out evaluation of one checkpoint: exact match of its responses, and log-probs.

The responses are greedy; the setting `evaluate.temperatures` adds sampled ones. Exact match needs
a checker that can tell right responses. The log-probs need only targets. y is the held-out target.
y_0 is the response of θ_0 to the same prompt; it is sampled once and then fixed. The log-prob
measures are in nats and do not contain λ:

- gap: log π_θ(y) − log π_θ(y_0). It says how much more likely the target is than θ_0's response.
- margin: the gap of θ minus the gap of θ_0. This is the margin of equation [6] against θ_0,
  divided by λ.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tpaw.config.schema import RunConfig
from tpaw.data.examples import Example
from tpaw.data.token_ids import TokenIds, TokenSequence, read_table, write_table
from tpaw.evaluation.checker import Checker
from tpaw.evaluation.items import Item, read_items, write_items
from tpaw.generation.generator import Completion, SamplingParams
from tpaw.runtime.progress import OnDone
from tpaw.runtime.watch import Watch
from tpaw.statistics.over_items import mcnemar, wilson_interval
from tpaw.storage.artifacts import publishing, write_json
from tpaw.team import Player

# Added to the run's seed. With the same seed, these responses would use the same random numbers as
# the responses to the training prompts.
SEED_OF_INITIAL_RESPONSES = 1
# All temperatures use the same random numbers, so a comparison of two temperatures is a paired one.
SEED_OF_SAMPLED_RESPONSES = 2


@dataclass(frozen=True)
class HeldoutEvaluation:
    """Evaluates the checkpoints of one run on its held-out examples.

    Attributes:
        config: the run's configuration.
        checker: tells right responses.
        heldout: the held-out examples.
        folder_of: returns the folder of an evaluation, given the index of the player.
        answer: generates one completion for each prompt, given a player, prompts, sampling
            settings, a seed and a function to report progress to.
        logps: computes the log-probs of sequences under a player: float64, in nats.
        decode: token ids to text.
        params: the run's sampling settings.
        watch: shows progress and checks for a stop.
    """

    config: RunConfig
    checker: Checker
    heldout: Sequence[Example]
    folder_of: Callable[[int], Path]
    answer: Callable[[Player, Sequence[TokenIds], SamplingParams, int, OnDone], list[Completion]]
    logps: Callable[[Player, Sequence[TokenSequence], OnDone], NDArray[np.float64]]
    decode: Callable[[TokenIds], str]
    params: SamplingParams
    watch: Watch

    def publish(self, player: Player) -> None:
        """Evaluate a player and publish the results and the items.

        θ_0 must be evaluated first: later players are compared with it.

        Raises:
            Interrupted: the user asked for a stop; nothing is published.
        """
        self.watch.stop.check()
        started = time.monotonic()
        meta: dict[str, Any] = {"player": player.index, "fingerprint": player.fingerprint}
        with publishing(self.folder_of(player.index), meta) as folder:
            initial_folder = folder if player.index == 0 else self.folder_of(0)
            if player.index == 0:
                self._write_initial_responses(player, folder)
            results: dict[str, Any] = {}
            exact_match = self.config.evaluate.exact_match
            if self.checker.can_check(self.heldout) if exact_match is None else exact_match:
                results["exact_match"] = self._exact_match(player, folder, initial_folder)
                sampled = self._sampled_exact_match(player, folder, initial_folder)
                if sampled:
                    results["sampled_exact_match"] = sampled
            results["logps"] = self._logps(player, folder, initial_folder)
            results["seconds"] = round(time.monotonic() - started, 3)
            write_json(folder / "results.json", meta | results)

    def _write_initial_responses(self, player: Player, folder: Path) -> None:
        """Sample θ_0's responses. The gap of every later checkpoint uses the same responses."""
        seed = self.config.seed + SEED_OF_INITIAL_RESPONSES
        completions = self._generate(player, self.params, seed, "initial responses")
        ids = [completion.token_ids for completion in completions]
        write_table(folder / "initial_answers.parquet", {"token_ids": ids})

    def _exact_match(self, player: Player, folder: Path, initial_folder: Path) -> dict[str, Any]:
        greedy = self.params.greedy(self.config.evaluate.max_new_tokens)
        completions = self._generate(player, greedy, 0, "accuracy")
        return self._checked(completions, folder, initial_folder, "exact_match.jsonl")

    def _sampled_exact_match(
        self, player: Player, folder: Path, initial_folder: Path
    ) -> dict[str, dict[str, Any]]:
        """The results of `evaluate.samples` responses to each prompt, by temperature."""
        greedy = self.params.greedy(self.config.evaluate.max_new_tokens)
        seed = self.config.seed + SEED_OF_SAMPLED_RESPONSES
        results = {}
        for temperature in self.config.evaluate.temperatures:
            params = greedy._replace(temperature=temperature)
            samples = self.config.evaluate.samples
            what = f"accuracy at T = {temperature:g}"
            completions = self._generate(player, params, seed, what, samples)
            file = f"exact_match_at_{temperature:g}.jsonl"
            results[f"{temperature:g}"] = (
                self._checked(completions, folder, initial_folder, file)
                if samples == 1
                else self._all_checked(completions, folder, file)
            )
        return results

    def _checked(
        self, completions: Sequence[Completion], folder: Path, initial_folder: Path, file: str
    ) -> dict[str, Any]:
        items = exact_match_items(self.heldout, completions, self.decode, self.checker)
        write_items(folder / file, items)
        return exact_match_results(items, read_items(initial_folder / file))

    def _all_checked(
        self, completions: Sequence[Completion], folder: Path, file: str
    ) -> dict[str, Any]:
        """Several responses to each prompt; those of all prompts, then of all prompts again."""
        count = len(self.heldout)
        of_sample = [
            exact_match_items(self.heldout, completions[i : i + count], self.decode, self.checker)
            for i in range(0, len(completions), count)
        ]
        by_prompt = list(zip(*of_sample, strict=True))
        write_items(folder / file, [item for items in by_prompt for item in items])
        return several_samples_results(by_prompt)

    def _logps(self, player: Player, folder: Path, initial_folder: Path) -> dict[str, float]:
        initial = read_table(initial_folder / "initial_answers.parquet")["token_ids"]
        sequences = [example.target for example in self.heldout]
        sequences += [
            TokenSequence(example.prompt_ids, ids)
            for example, ids in zip(self.heldout, initial, strict=True)
        ]
        title = self._title(player, "log-probs")
        with self.watch.progress(title, len(sequences), "sequences") as on_done:
            logps = self.logps(player, sequences, on_done)
        count = len(self.heldout)
        items = logp_items(self.heldout, logps[:count], logps[count:])
        write_items(folder / "logps.jsonl", items)
        start = read_items(initial_folder / "logps.jsonl")
        return logp_results(items, start, sum(map(len, initial)))

    def _generate(
        self, player: Player, params: SamplingParams, seed: int, what: str, times: int = 1
    ) -> list[Completion]:
        prompts = [example.prompt_ids for example in self.heldout] * times
        with self.watch.progress(self._title(player, what), len(prompts), "prompts") as on_done:
            return self.answer(player, prompts, params, seed, on_done)

    def _title(self, player: Player, what: str) -> str:
        return f"[{player.index}/{self.config.iterations}] evaluate θ_{player.index}: {what}"


def exact_match_items(
    examples: Sequence[Example],
    completions: Sequence[Completion],
    decode: Callable[[TokenIds], str],
    checker: Checker,
) -> list[Item]:
    """Return one item for each example, in the order of the examples.

    Args:
        examples: held-out examples.
        completions: one completion for each example.
        decode: token ids to text.
        checker: tells right responses.

    Returns:
        Items with `id`, `completion` (text), `finish_reason`, `correct`, and the checker's details:
        of exact match, `answer` (None if there is none) and `expected`.
    """
    items = []
    for example, completion in zip(examples, completions, strict=True):
        text = decode(completion.token_ids)
        items.append(
            {
                "id": example.id,
                "completion": text,
                "finish_reason": completion.finish_reason,
                **checker.details(example, text),
                "correct": checker.is_right(example, text),
            }
        )
    return items


def exact_match_results(items: Sequence[Item], start: Sequence[Item]) -> dict[str, Any]:
    """Compute the accuracy, and compare it with θ_0 on the same items.

    Args:
        items: items of the checkpoint.
        start: items of θ_0, in the same order.

    Returns:
        Counts, `accuracy` as a share in [0, 1], its 95 % Wilson interval, and the exact McNemar
        test against θ_0 as `versus_start`. `no_answer` is a count of exact match alone.
    """
    correct = [item["correct"] for item in items]
    test = mcnemar([item["correct"] for item in start], correct)
    answers = [item["answer"] for item in items if "answer" in item]
    return {
        "items": len(items),
        "correct": sum(correct),
        "accuracy": sum(correct) / len(items),
        "interval_95": list(wilson_interval(sum(correct), len(items))),
        **({"no_answer": answers.count(None)} if answers else {}),
        "truncated": sum(item["finish_reason"] == "length" for item in items),
        "versus_start": test._asdict(),
    }


def several_samples_results(by_prompt: Sequence[Sequence[Item]]) -> dict[str, Any]:
    """Compute the accuracy of several responses to each prompt, and how many right ones differ.

    Args:
        by_prompt: the items of each prompt.

    Returns:
        Counts; `accuracy`, the share of right responses in [0, 1]; and `distinct_correct`, the mean
        number of right responses to a prompt whose texts differ. Responses to a prompt are not
        independent, so there is no Wilson interval.
    """
    items = [item for of_prompt in by_prompt for item in of_prompt]
    right = [{item["completion"] for item in found if item["correct"]} for found in by_prompt]
    correct = sum(item["correct"] for item in items)
    return {
        "items": len(by_prompt),
        "samples": len(by_prompt[0]),
        "correct": correct,
        "accuracy": correct / len(items),
        "distinct_correct": sum(map(len, right)) / len(by_prompt),
        "truncated": sum(item["finish_reason"] == "length" for item in items),
    }


def logp_items(
    examples: Sequence[Example],
    target_logps: NDArray[np.float64],
    initial_answer_logps: NDArray[np.float64],
) -> list[Item]:
    """Return one item for each example, in the order of the examples.

    Args:
        examples: held-out examples.
        target_logps: log-probs of the targets under the checkpoint, in nats, (examples,).
        initial_answer_logps: log-probs of θ_0's responses under the checkpoint, in nats,
            (examples,).
    """
    logps = zip(examples, target_logps.tolist(), initial_answer_logps.tolist(), strict=True)
    return [
        {
            "id": example.id,
            "target_logp": target,
            "target_tokens": len(example.target_ids),
            "initial_answer_logp": initial,
        }
        for example, target, initial in logps
    ]


def logp_results(
    items: Sequence[Item], start: Sequence[Item], initial_tokens: int
) -> dict[str, float]:
    """Compute means over the items. The module's docstring defines gap and margin.

    Args:
        items: items of the checkpoint.
        start: items of θ_0, in the same order.
        initial_tokens: number of tokens of all of θ_0's responses.

    Returns:
        `target_logp`, `target_logp_per_token`, `gap` and `margin` in nats; `nonpositive_gap_share`
        in [0, 1]; and `drift`, how much less likely a token of θ_0's responses is than under θ_0,
        in nats. Where they were sampled at temperature 1, without top_p and top_k, it estimates
        KL(θ_0 ‖ θ_i) per token.
    """
    target = np.array([item["target_logp"] for item in items])
    gap = target - np.array([item["initial_answer_logp"] for item in items])
    start_gap = np.array([item["target_logp"] - item["initial_answer_logp"] for item in start])
    before, now = (sum(i["initial_answer_logp"] for i in found) for found in (start, items))
    return {
        "target_logp": float(target.mean()),
        "target_logp_per_token": float(target.sum() / sum(i["target_tokens"] for i in items)),
        "gap": float(gap.mean()),
        "margin": float((gap - start_gap).mean()),
        "nonpositive_gap_share": float((gap <= 0).mean()),
        "drift": (before - now) / max(1, initial_tokens),
    }
