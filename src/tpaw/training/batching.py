"""Triples become micro-batches: which triples make a step, and which process computes which.

Shape suffixes: B triples in a micro-batch, K players.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from tpaw.data.columns import KeyArray, key_array
from tpaw.data.token_ids import TokenSequence, token_ids
from tpaw.logprobs.packing import Layout, PackedBatch, PromptGroup
from tpaw.objectives.base import ObjectiveNeeds
from tpaw.scoring.store import sequence_key

TOKEN_COLUMNS = ("prompt_ids", "target_ids", "generated_ids")
PLAYER_COLUMNS = ("player_target_logps", "player_generated_logps")
INITIAL_COLUMN = "initial_ids"


def columns_for(needs: ObjectiveNeeds) -> tuple[str, ...]:
    """The columns that a dataset must have for an objective."""
    return (
        *TOKEN_COLUMNS,
        *((INITIAL_COLUMN,) if needs.initial_responses else ()),
        *(() if needs.references == "none" else PLAYER_COLUMNS),
    )


class TripleMicroBatch(TypedDict):
    """Triples that go through the model in one forward pass.

    Attributes:
        packed: all sequences: targets, then generated responses, then initial ones if needed.
        player_target_logps_BK, player_generated_logps_BK: float64; K is 0 without references.
        target_tokens_B, generated_tokens_B: int64, response tokens.
        is_truncated_B: bool, the generated response was cut at the length limit.
        is_identical_B: bool, the generated response equals the target.
        is_filler: true if it only keeps this process in step with the others; it counts nothing.
    """

    packed: PackedBatch
    player_target_logps_BK: Tensor
    player_generated_logps_BK: Tensor
    target_tokens_B: Tensor
    generated_tokens_B: Tensor
    is_truncated_B: Tensor
    is_identical_B: Tensor
    is_filler: bool


class TripleBatch(TypedDict):
    """One process's part of a batch of triples.

    Attributes:
        micro_batches: as many as every other process has.
        triples: in the whole batch, over all processes.
    """

    micro_batches: list[TripleMicroBatch]
    triples: int


class _Part(NamedTuple):
    """Indices of the triples of each micro-batch of this process, and the size of the batch."""

    micro_batches: list[list[int]]
    triples: int


class TripleSizes:
    """Lengths of all triples, and which of them share prompt and target.

    Args:
        dataset: rows with `TOKEN_COLUMNS`.
        response_columns: the columns that hold responses, the target first.
    """

    def __init__(
        self, dataset: Any, response_columns: Sequence[str] = ("target_ids", "generated_ids")
    ) -> None:
        lengths = array("q")
        keys = bytearray()
        for i in range(len(dataset)):
            row = dataset[i]
            prompt, target = token_ids(row["prompt_ids"]), token_ids(row["target_ids"])
            lengths.extend((len(prompt), *(len(row[name]) for name in response_columns)))
            keys += sequence_key(TokenSequence(prompt, target))
        self.lengths = np.frombuffer(lengths, dtype=np.int64).reshape(-1, 1 + len(response_columns))
        self.group_of = _numbers_by_first_occurrence(key_array(keys))

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt plus response."""
        return int((self.lengths[:, 0] + self.lengths[:, 1:].max(axis=1)).max())

    def group(self, triples: Sequence[int], layout: Layout, tokens_per_row: int) -> list[list[int]]:
        """Put triples that share prompt and target together, if they fit into one forward pass."""
        by_target: dict[int, list[int]] = {}
        for i in triples:
            by_target.setdefault(int(self.group_of[i]), []).append(i)
        groups = []
        for members in by_target.values():
            if layout.size(self.size(members)) > tokens_per_row:
                groups += [[i] for i in members]
            else:
                groups.append(members)
        return groups

    def size(self, triples: Sequence[int]) -> PromptGroup:
        """The size of triples that share prompt and target."""
        prompt, target, *_ = self.lengths[triples[0]]
        others = self.lengths[triples, 2:].ravel()
        return PromptGroup.of(int(prompt), [int(target), *map(int, others)])


def _numbers_by_first_occurrence(keys: KeyArray) -> NDArray[np.int64]:
    """A number for each key, from 0 in the order in which the keys occur first."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    numbers = np.empty(len(first), dtype=np.int64)
    numbers[np.argsort(first)] = np.arange(len(first))
    return numbers[inverse]


class TripleBatchSampler(Sampler[Any]):
    """Shuffles, cuts into batches of a number of triples, and divides each into micro-batches.

    Every process computes the same plan and takes its share of it, so all have as many
    micro-batches, whatever the lengths. The order depends on seed and epoch alone.

    Args:
        triples_per_batch: over all processes; the last batch of an epoch may be smaller.
        group_by_prompt: shuffle prompts instead of triples, so that the triples of a prompt come
            together and its target goes through the model once for all of them.
    """

    def __init__(
        self,
        sizes: TripleSizes,
        layout: Layout,
        *,
        triples_per_batch: int,
        tokens_per_row: int,
        group_by_prompt: bool,
        seed: int,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        self.sizes = sizes
        self.layout = layout
        self.triples_per_batch = triples_per_batch
        self.tokens_per_row = tokens_per_row
        self.group_by_prompt = group_by_prompt
        self.seed = seed
        self.process = process
        self.processes = processes
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.sizes) // self.triples_per_batch)

    def __iter__(self) -> Iterator[_Part]:
        order = self._order()
        for begin in range(0, len(order), self.triples_per_batch):
            yield self._part(order[begin : begin + self.triples_per_batch].tolist())

    def _order(self) -> NDArray[np.int64]:
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(len(self.sizes))
        if self.group_by_prompt:
            rank_of = rng.permutation(int(self.sizes.group_of.max()) + 1)
            order = order[np.argsort(rank_of[self.sizes.group_of[order]], kind="stable")]
        return order

    def _part(self, triples: list[int]) -> _Part:
        groups = self.sizes.group(triples, self.layout, self.tokens_per_row)
        assigned = self.layout.assign(
            [self.sizes.size(group) for group in groups], self.tokens_per_row, self.processes
        )
        mine = assigned[self.process :: self.processes]
        return _Part([[i for g in members for i in groups[g]] for members in mine], len(triples))


class BatchedTriples(Dataset[Any]):
    """A dataset of triples that is indexed by what `TripleBatchSampler` yields."""

    def __init__(self, dataset: Any, layout: Layout, needs: ObjectiveNeeds | None = None) -> None:
        self.dataset = dataset
        self.layout = layout
        self.needs = needs or ObjectiveNeeds()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        row: Mapping[str, Any] = self.dataset[index]
        return row

    def __getitems__(self, part: _Part) -> TripleBatch:
        micro_batches = []
        for triples in part.micro_batches:
            # A process without a triple of its own repeats one, so that collectives line up.
            rows = [self.dataset[i] for i in triples or [0]]
            micro_batch = collate_triples(rows, self.layout, self.needs)
            micro_batch["is_filler"] = not triples
            micro_batches.append(micro_batch)
        return {"micro_batches": micro_batches, "triples": part.triples}


def collate_triples(
    rows: Sequence[Mapping[str, Any]], layout: Layout, needs: ObjectiveNeeds | None = None
) -> TripleMicroBatch:
    """Rows of a dataset become the input of one forward pass."""
    needs = needs or ObjectiveNeeds()
    response_columns = ["target_ids", "generated_ids"]
    if needs.initial_responses:
        response_columns.append(INITIAL_COLUMN)
    prompts = [token_ids(row["prompt_ids"]) for row in rows]
    responses = {name: [token_ids(row[name]) for row in rows] for name in response_columns}
    sequences = [
        TokenSequence(prompt, ids)
        for name in response_columns
        for prompt, ids in zip(prompts, responses[name], strict=True)
    ]

    def players(name: str) -> Tensor:
        if needs.references == "none":
            return torch.empty((len(rows), 0), dtype=torch.float64)
        return torch.tensor([[float(x) for x in row[name]] for row in rows], dtype=torch.float64)

    targets, generated = responses["target_ids"], responses["generated_ids"]
    return {
        "packed": layout.collate(sequences),
        "player_target_logps_BK": players("player_target_logps"),
        "player_generated_logps_BK": players("player_generated_logps"),
        "target_tokens_B": torch.tensor([len(y) for y in targets]),
        "generated_tokens_B": torch.tensor([len(g) for g in generated]),
        "is_truncated_B": torch.tensor([bool(row.get("is_truncated", False)) for row in rows]),
        "is_identical_B": torch.tensor(
            [np.array_equal(y, g) for y, g in zip(targets, generated, strict=True)]
        ),
        "is_filler": False,
    }
