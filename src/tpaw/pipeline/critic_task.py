"""Fit the critic of an iteration, let it judge the newest responses, and publish both."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from tpaw.config.schema import RunConfig, at_iteration
from tpaw.critic.comparisons import Comparisons, comparisons, halves, split
from tpaw.critic.encoding import Reader
from tpaw.critic.fit import Fitted, fit
from tpaw.critic.model import (
    load_critic,
    reader_of,
    scores_of,
    set_padding,
    small_critic,
    with_lora,
    with_stored_lora,
)
from tpaw.critic.selection import choose, write_scores
from tpaw.data.inputs import Inputs, load_inputs
from tpaw.data.token_ids import TokenIds
from tpaw.errors import InputError
from tpaw.evaluation.checker import Checker, checker_of
from tpaw.generation.responses import Responses, read_responses
from tpaw.models.loading import pick_device
from tpaw.runtime.progress import OnDone
from tpaw.runtime.shards import Do
from tpaw.storage.artifacts import publishing, remove_artifacts, write_json
from tpaw.team import Player

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tpaw.pipeline.worker import Worker

SEED_OF_CRITIC = 3


class CriticTask(NamedTuple):
    """Fits and publishes the critic of an iteration; a shard is t.

    Attributes:
        opponents: the critic learns to tell targets from their responses.
    """

    opponents: tuple[Player, ...]

    @contextlib.contextmanager
    def opened(self, worker: Worker) -> Iterator[Do[int, None]]:
        """See `ShardTask`."""
        worker.players.release()  # the critic takes the place of the policy
        yield lambda t, on_done: _CriticOfIteration(worker, t).publish(self.opponents, on_done)

    def title(self, shard: int) -> str:
        """See `ShardTask`."""
        return f"the critic of iteration {shard + 1} is fitted"


class _CriticOfIteration:
    def __init__(self, worker: Worker, t: int) -> None:
        self.config: RunConfig = worker.config
        self.run = worker.run
        self.stop = worker.stop
        self.t = t
        self.iteration = worker.run.iteration(t)
        self.inputs: Inputs = load_inputs(worker.run.inputs, worker.config)
        self.device = pick_device(worker.config.device)

    def publish(self, opponents: Sequence[Player], on_done: OnDone) -> None:
        """Fit, measure, judge and publish; nothing if it is published."""
        config, count = self.config, len(self.inputs.examples)
        reader = reader_of(
            config.critic, self.inputs.tokenizer, self.inputs.stop_ids, config.max_length
        )
        parts = {o.index: self._responses(o.index).in_parts_of(count) for o in opponents}
        pairs = comparisons(
            self.inputs.examples, [part for of in parts.values() for part in of], reader.encode
        )
        learned, held = split(pairs.prompts, config.critic.heldout, config.seed)
        watched, measured = halves(pairs.prompts, held)
        prompts = len(np.unique(pairs.prompts[measured][pairs.counts[measured].any(axis=1)]))
        if not (pairs.counts[learned].any() and pairs.counts[watched].any()) or prompts < 2:
            raise InputError(
                f"iteration {self.iteration.number}: the critic has too little to compare: whole "
                "responses that differ from their target belong to "
                f"{int(pairs.counts.any(axis=1).sum())} of {count} records, and to {prompts} of "
                "the prompts that it is measured on (at least 2 are needed); use more records, "
                f"raise critic.heldout from {config.critic.heldout:g}, or raise "
                f"generate.max_new_tokens from {config.generate.max_new_tokens} if responses are "
                "truncated"
            )
        with publishing(self.iteration.critic, {"iteration": self.iteration.number}) as folder:
            model = self._started(reader).to(self.device)
            fitted = self._fitted(model, pairs, learned, watched, reader, on_done)
            model.save_pretrained(str(folder))
            facts = fitted._asdict() | self._measured(model, pairs, measured)
            newest = parts[self.t]
            scores = self._judged(model, newest, reader)
            write_scores(folder, scores)
            facts |= self._of_responses(newest, scores, measured)
            facts |= self._by_first_critic(newest, scores, reader)
            write_json(folder / "results.json", facts)
        remove_artifacts(self.iteration.critic_training)

    def _responses(self, t: int) -> Responses:
        return read_responses(self.run.iteration(t).responses)

    def _started(self, reader: Reader) -> PreTrainedModel:
        """The critic before its fit."""
        config = self.config.critic
        if config.each_iteration == "continue" and self.t > 0:
            return self._stored(self.t - 1, reader)
        seed = np.random.SeedSequence((self.config.seed, SEED_OF_CRITIC)).generate_state(1)[0]
        with torch.random.fork_rng():
            torch.manual_seed(int(seed))
            if config.path is None:
                return small_critic(config, reader.tokenizer)
            model = self._base(config.path, reader)
            return model if config.lora_rank is None else with_lora(model, config.lora_rank)

    def _base(self, path: str, reader: Reader) -> PreTrainedModel:
        model = load_critic(path)
        set_padding(model, reader.tokenizer)
        return model

    def _stored(self, t: int, reader: Reader) -> PreTrainedModel:
        """The critic of an earlier iteration."""
        folder, config = str(self.run.iteration(t).critic), self.config.critic
        if config.path is None or config.lora_rank is None:
            return load_critic(folder)
        return with_stored_lora(self._base(config.path, reader), folder)

    def _fitted(
        self,
        model: PreTrainedModel,
        pairs: Comparisons,
        learned: NDArray[np.int64],
        watched: NDArray[np.int64],
        reader: Reader,
        on_done: OnDone,
    ) -> Fitted:
        seeds = np.random.SeedSequence((self.config.seed, self.t, SEED_OF_CRITIC))
        return fit(
            model,
            pairs.pairs(learned),
            pairs.pairs(watched),
            self.config.critic,
            reader.tokenizer,
            steps=at_iteration(self.config.critic.steps, self.t),
            seed=int(seeds.generate_state(1)[0] % 2**31),
            use_cpu=self.device.type == "cpu",
            saved_steps=self.iteration.critic_training,
            log_file=self.iteration.critic_log,
            resume_from=self.iteration.last_saved_step_of_critic(),
            advance=lambda count, note="": on_done(count),
            stop=self.stop,
        )

    def _measured(
        self, model: PreTrainedModel, pairs: Comparisons, measured: NDArray[np.int64]
    ) -> dict[str, Any]:
        """The AUC on prompts that had no part in the fit."""
        count, samples = pairs.counts.shape
        targets, responses = np.full(count, math.nan), np.full((count, samples), math.nan)
        targets[measured] = scores_of(model, [pairs.targets[row] for row in measured])
        read = [pairs.responses[k * count + row] for k in range(samples) for row in measured]
        responses[measured] = scores_of(model, read).reshape(samples, len(measured)).T
        return {
            "auc": pairs.auc(measured, targets, responses).as_json(),
            "auc_of_like_length": pairs.auc(
                measured, targets, responses, of_like_length=True
            ).as_json(),
            "auc_of_length_alone": pairs.auc_of_length(measured).as_json(),
        }

    def _judged(
        self, model: PreTrainedModel, newest: Sequence[Responses], reader: Reader
    ) -> NDArray[np.float64]:
        """The scores of all responses of θ_t by the team of critics, newest first."""
        read = self._read(newest, reader)
        scores = [scores_of(model, read)]
        for before in range(1, min(self.config.critic.team, self.t + 1)):
            critic = self._stored(self.t - before, reader)
            scores.append(scores_of(critic.to(self.device), read))
        return np.stack(scores)

    def _read(self, newest: Sequence[Responses], reader: Reader) -> list[TokenIds]:
        """What a critic reads of each response."""
        prompts = self.inputs.examples.prompt_ids
        return [
            reader.encode(prompt, response)
            for part in newest
            for prompt, response in zip(prompts, part.token_ids, strict=True)
        ]

    def _by_first_critic(
        self, newest: Sequence[Responses], scores: NDArray[np.float64], reader: Reader
    ) -> dict[str, float]:
        """What a critic says that does not change: the one of iteration 1."""
        if self.t == 0:
            own = scores[0]
        else:
            first = self._stored(0, reader).to(self.device)
            own = scores_of(first, self._read(newest, reader))
        return {"score_by_first_critic": float(own.mean()), "spread_of_scores": float(own.std())}

    def _of_responses(
        self, newest: Sequence[Responses], scores: NDArray[np.float64], measured: NDArray[np.int64]
    ) -> dict[str, Any]:
        """What there is to choose from, and how right the choice is where that can be checked."""
        examples = self.inputs.examples
        texts = [list(part.texts) for part in newest]
        kept, number = choose(scores, newest, self.config.critic.agree)
        different = [len(set(of_prompt)) for of_prompt in zip(*texts, strict=True)]
        found: dict[str, Any] = {
            "samples": len(newest),
            "prompts": len(examples),
            "chosen": len(kept),
            "different_share": sum(different) / (len(examples) * len(newest)),
        }
        checker: Checker = checker_of(self.config.checker)
        if not checker.can_check(examples):
            return found
        right = np.array(
            [
                [
                    checker.is_right(example, text)
                    for example, text in zip(examples, part, strict=True)
                ]
                for part in texts
            ]
        )
        best = right[number, kept]
        unseen = np.isin(kept, measured)
        return found | {
            "right_share": float(right.mean()),
            "best_right_share": float(best.mean()),
            "best_right_share_heldout": float(best[unseen].mean()) if unseen.any() else None,
            "right_share_heldout": float(right[:, measured].mean()),
            "any_right_share": float(right.any(axis=0).mean()),
        }
