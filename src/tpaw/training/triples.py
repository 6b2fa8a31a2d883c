"""Triples (x, y, y_gen), and the dataset of them that a trainer reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from tpaw.data.examples import Example
from tpaw.data.token_ids import TokenIds
from tpaw.generation.responses import Response


class Triple(NamedTuple):
    """(x, y, y_gen): an example and what one opponent answered to its prompt."""

    example: Example
    response: Response
    opponent: int

    @property
    def target(self) -> tuple[TokenIds, TokenIds]:
        """Prompt and target ids."""
        return self.example.prompt_ids, self.example.target_ids

    @property
    def generated(self) -> tuple[TokenIds, TokenIds]:
        """Prompt and generated ids."""
        return self.example.prompt_ids, self.response.token_ids


class TripleDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """D_O with its reference log-probs, as `TeamTrainer` reads it."""

    def __init__(
        self,
        triples: Sequence[Triple],
        target_logps_NK: NDArray[np.float64],
        generated_logps_NK: NDArray[np.float64],
    ) -> None:
        self.triples = triples
        self.target_logps_NK = target_logps_NK
        self.generated_logps_NK = generated_logps_NK

    def __len__(self) -> int:
        return len(self.triples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        triple = self.triples[index]
        return {
            "prompt_ids": triple.example.prompt_ids,
            "target_ids": triple.example.target_ids,
            "generated_ids": triple.response.token_ids,
            "player_target_logps": self.target_logps_NK[index],
            "player_generated_logps": self.generated_logps_NK[index],
            "is_truncated": triple.response.finish_reason == "length",
        }
