"""What the stages of a run have published, as the objects that training and scoring take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tpaw.critic.selection import Agree, best_of, choose, read_scores
from tpaw.data.examples import Example, Examples
from tpaw.evaluation.checker import Checker
from tpaw.generation.responses import Response, Responses, read_responses
from tpaw.objectives.base import ObjectiveNeeds
from tpaw.scoring.store import LogprobStore
from tpaw.storage.run_directory import RunDirectory
from tpaw.team import Player
from tpaw.training.triples import Triples


class Published:
    """Responses and log-probs of a run directory. Every process that has the directory can read it.

    Args:
        run: the run directory.
        checker: tells right responses.
    """

    def __init__(self, run: RunDirectory, checker: Checker) -> None:
        self.run = run
        self.checker = checker
        self._stores: dict[str, LogprobStore] = {}

    def triples(
        self,
        examples: Sequence[Example],
        opponents: Sequence[Player],
        needs: ObjectiveNeeds | None = None,
    ) -> Triples:
        """D_O: every example with the responses of every opponent, or those that are right.

        Args:
            examples: those that the iteration uses.
            opponents: newest first.
            needs: of the objective. Default: all responses, without those of θ_0.

        Raises:
            ArtifactError: responses on disk belong to other examples.
        """
        needs = needs or ObjectiveNeeds()
        count = len(examples)
        return Triples(
            examples,
            [(o.index, part) for o in opponents for part in self._responses(o.index, count)],
            self._responses(0, count) if needs.initial_responses else (),
            self._is_right if needs.responses == "correct" else None,
        )

    def likeliest(self, triples: Triples, player: Player) -> Triples:
        """Of each prompt, the triple whose whole response has the highest log-prob.

        Args:
            triples: D_O, with every response of every opponent.
            player: its log-probs of these responses are stored.
        """
        logps = self.store(player).logps(triples.generated_keys)
        by_prompt = (len(triples.responses), len(triples.examples))
        is_whole = ~triples.is_truncated.reshape(by_prompt)
        prompts, numbers = best_of(logps.reshape(by_prompt), is_whole)
        return triples.only(np.sort(numbers * len(triples.examples) + prompts))

    def triples_of_chosen(self, chosen: Chosen, opponents: Sequence[Player]) -> Triples:
        """D_O of method critic: each chosen response against the opponents' other responses.

        Args:
            chosen: the chosen responses as targets.
            opponents: newest first.
        """
        return Triples(
            chosen.examples,
            [
                (o.index, Responses.of(part[int(i)] for i in chosen.prompts))
                for o in opponents
                for part in self._responses(o.index, chosen.of)
            ],
            keeps=_differ,
        )

    def chosen(self, examples: Examples, t: int, agree: Agree) -> Chosen:
        """The responses of θ_t that the critics like best, as the targets of their prompts.

        Args:
            examples: all examples of the run.
            t: the iteration that trains θ_{t+1}; counts from 0.
            agree: see `critic.agree`.
        """
        newest = self._responses(t, len(examples))
        scores = read_scores(self.run.iteration(t).critic)
        prompts, numbers = choose(scores, newest, agree)
        return Chosen(
            Examples.of(
                examples[int(i)]._replace(
                    target_ids=newest[k].token_ids[int(i)], target_text=newest[k].texts[int(i)]
                )
                for i, k in zip(prompts, numbers, strict=True)
            ),
            prompts,
            len(examples),
        )

    def _responses(self, t: int, count: int) -> list[Responses]:
        """The responses of θ_t, one for each of `count` examples in each part."""
        responses = read_responses(self.run.iteration(t).responses)
        return responses.in_parts_of(count)

    def store(self, player: Player) -> LogprobStore:
        """The log-probs under a player. It is read once."""
        if player.fingerprint not in self._stores:
            folder = self.run.logprobs(player.fingerprint)
            self._stores[player.fingerprint] = LogprobStore(folder)
        return self._stores[player.fingerprint]

    def _is_right(self, example: Example, response: Response) -> bool:
        return self.checker.is_right(example, response.text)


class Chosen(NamedTuple):
    """What method critic trains on.

    Attributes:
        examples: the prompts with a response, each with the chosen one as its target.
        prompts: their places among all examples, int64, of shape (chosen,).
        of: number of all examples.
    """

    examples: Examples
    prompts: NDArray[np.int64]
    of: int


def _differ(example: Example, response: Response) -> bool:
    return not np.array_equal(example.target_ids, response.token_ids)
