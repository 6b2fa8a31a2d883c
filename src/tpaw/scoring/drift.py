"""How far the log-probs of a generation server are from TPAW's own.

A server rounds differently, and it may serve other weights than it should. Training uses TPAW's own
log-probs alone, so a difference does not bias them. It tells whether θ_t has answered.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from tpaw.data.token_ids import TokenIds, TokenSequence
from tpaw.generation.responses import Responses
from tpaw.scoring.sequences import sequence_keys
from tpaw.scoring.store import LogprobStore

# In nats per token. A guess: fp32 on a CPU gave 1e-8, and bf16 was not measured.
LARGE = 0.05


class Drift(NamedTuple):
    """The server's log-probs minus TPAW's own, under the same player.

    Attributes:
        responses: number of responses compared.
        tokens: number of their tokens.
        mean: sum of the differences of the responses, divided by the tokens; nats per token.
        mean_abs: the same with the absolute difference of each response.
    """

    responses: int
    tokens: int
    mean: float
    mean_abs: float

    def described(self) -> str:
        """One line for the user."""
        text = (
            f"log-probs of the server minus TPAW's own: {self.mean:+.2g} nats per token, "
            f"absolute {self.mean_abs:.2g} ({self.responses:,} responses)"
        )
        if self.mean_abs < LARGE:
            return text
        return (
            f"Warning: {text}. Other weights than those of the checkpoint may have answered; check "
            "what the server serves, and its precision."
        )


def server_drift(
    prompts: Iterable[TokenIds], responses: Responses, store: LogprobStore
) -> Drift | None:
    """Compare the log-probs of a server with those of the store.

    Args:
        prompts: int32 token ids, one array for each response.
        responses: of the player, with the log-probs that the server gave.
        store: the log-probs under the same player.

    Returns:
        The difference; None if no response has a log-prob of the server and one in the store.
    """
    if responses.server_logps is None:
        return None
    keys = sequence_keys(map(TokenSequence, prompts, responses.token_ids))
    compared = ~np.isnan(responses.server_logps) & store.contains(keys)
    tokens = int(responses.token_ids.lengths[compared].sum())
    if not tokens:
        return None
    differences = responses.server_logps[compared] - store.logps(keys[compared])
    return Drift(
        int(compared.sum()),
        tokens,
        float(differences.sum() / tokens),
        float(np.abs(differences).sum() / tokens),
    )
