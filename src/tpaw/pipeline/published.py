"""What the stages of a run have published, as the objects that training and scoring take."""

from __future__ import annotations

from collections.abc import Sequence

from tpaw.data.examples import Example
from tpaw.generation.responses import read_responses
from tpaw.scoring.store import LogprobStore
from tpaw.storage.run_directory import RunDirectory
from tpaw.team import Player
from tpaw.training.triples import Triples


class Published:
    """Responses and log-probs of a run directory. Every process that has the directory can read it.

    Args:
        run: the run directory.
    """

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self._stores: dict[str, LogprobStore] = {}

    def triples(self, examples: Sequence[Example], opponents: Sequence[Player]) -> Triples:
        """D_O: every example with the response of every opponent.

        Raises:
            ArtifactError: responses on disk belong to other examples.
        """
        indices = [opponent.index for opponent in opponents]
        return Triples(
            examples, [(i, read_responses(self.run.iteration(i).responses)) for i in indices]
        )

    def store(self, player: Player) -> LogprobStore:
        """The log-probs under a player. It is read once."""
        if player.fingerprint not in self._stores:
            folder = self.run.logprobs(player.fingerprint)
            self._stores[player.fingerprint] = LogprobStore(folder)
        return self._stores[player.fingerprint]
