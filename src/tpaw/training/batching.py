"""Triples to batches: which triples make a step, how they lie in rows, who computes which row.

Shape suffixes: B triples in a row, K main players.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from tpaw.data.token_ids import token_ids
from tpaw.logprobs.packing import Layout, PackedBatch, PromptGroup

COLUMNS = (
    "prompt_ids",
    "target_ids",
    "generated_ids",
    "player_target_logps",
    "player_generated_logps",
)


class TripleMicroBatch(TypedDict):
    """Triples that go through the model in one forward pass.

    Attributes:
        rows: the sequences, targets first, then the generated responses; see `layout.PackedBatch`.
        player_target_logps_BK, player_generated_logps_BK: float64, newest player first.
        target_tokens_B, generated_tokens_B: int64, response tokens.
        is_truncated_B: bool, the generated response was cut at the length limit.
        is_identical_B: bool, the generated response equals the target.
        counts: false for a row that only keeps a process in step with the others.
    """

    rows: PackedBatch
    player_target_logps_BK: Tensor
    player_generated_logps_BK: Tensor
    target_tokens_B: Tensor
    generated_tokens_B: Tensor
    is_truncated_B: Tensor
    is_identical_B: Tensor
    counts: bool


class TripleBatch(TypedDict):
    """One process's part of a batch of triples.

    Attributes:
        rows: as many as every other process has.
        triples: in the whole batch, over all processes.
    """

    rows: list[TripleMicroBatch]
    triples: int


class _Part(NamedTuple):
    """Indices of the triples of each row, and the size of the whole batch."""

    rows: list[list[int]]
    triples: int


class TripleSizes:
    """Lengths of all triples, and which of them share prompt and target."""

    def __init__(self, dataset: Any) -> None:
        lengths, group_of, groups = [], [], dict[tuple[bytes, bytes], int]()
        for i in range(len(dataset)):
            row = dataset[i]
            prompt, target = token_ids(row["prompt_ids"]), token_ids(row["target_ids"])
            if len(prompt) == 0:
                raise ValueError(f"train_dataset: row {i}: a prompt without tokens")
            lengths.append((len(prompt), len(target), len(row["generated_ids"])))
            key = (prompt.tobytes(), target.tobytes())
            group_of.append(groups.setdefault(key, len(groups)))
        self.lengths = np.array(lengths, dtype=np.int64).reshape(-1, 3)
        self.group_of = np.array(group_of, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and response."""
        return int((self.lengths[:, 0] + self.lengths[:, 1:].max(axis=1)).max())

    def units(self, triples: Sequence[int], layout: Layout, tokens_per_row: int) -> list[list[int]]:
        """Triples that share prompt and target, as long as they fit into one forward pass."""
        groups: dict[int, list[int]] = {}
        for i in triples:
            groups.setdefault(int(self.group_of[i]), []).append(i)
        units = []
        for group in groups.values():
            if layout.size(self.unit(group)) > tokens_per_row:
                units += [[i] for i in group]
            else:
                units.append(group)
        return units

    def unit(self, triples: Sequence[int]) -> PromptGroup:
        """The size of triples that share prompt and target."""
        prompt, target, _ = self.lengths[triples[0]]
        return PromptGroup.of(int(prompt), [int(target), *map(int, self.lengths[triples, 2])])


class TripleBatchSampler(Sampler[Any]):
    """Shuffles, cuts into batches of a number of triples, and shares each out to rows.

    Every process computes the same plan and takes its rows of it, so all have as many, whatever
    the lengths. The order depends on seed and epoch alone.

    Args:
        triples_per_batch: over all processes; the last batch of an epoch may be smaller.
        group_by_prompt: shuffle prompts and not triples, so that those of a prompt come together
            and its target goes through the model once for all of them.
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
            yield self._part(order[begin : begin + self.triples_per_batch])

    def _order(self) -> list[int]:
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(len(self.sizes))
        if self.group_by_prompt:
            rank_of = rng.permutation(int(self.sizes.group_of.max()) + 1)
            order = order[np.argsort(rank_of[self.sizes.group_of[order]], kind="stable")]
        return [int(i) for i in order]

    def _part(self, triples: list[int]) -> _Part:
        units = self.sizes.units(triples, self.layout, self.tokens_per_row)
        rows = self.layout.cut(
            [self.sizes.unit(unit) for unit in units], self.tokens_per_row, self.processes
        )
        mine = rows[self.process :: self.processes]
        return _Part([[i for u in row for i in units[u]] for row in mine], len(triples))


class BatchedTriples(Dataset[Any]):
    """A dataset of triples that is indexed by what `TripleBatchSampler` yields."""

    def __init__(self, dataset: Any, layout: Layout) -> None:
        self.dataset = dataset
        self.layout = layout

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        row: Mapping[str, Any] = self.dataset[index]
        return row

    def __getitems__(self, part: _Part) -> TripleBatch:
        rows = []
        for triples in part.rows:
            # A process without a triple of its own repeats any, so that collectives line up.
            chosen = [self.dataset[i] for i in triples or [0]]
            rows.append(collate_triples(chosen, self.layout) | {"counts": bool(triples)})
        return {"rows": rows, "triples": part.triples}


def collate_triples(triples: Sequence[Mapping[str, Any]], layout: Layout) -> TripleMicroBatch:
    """PackedBatch of a dataset with `COLUMNS` to the input of one forward pass."""
    ids = {name: [token_ids(t[name]) for t in triples] for name in COLUMNS[:3]}
    targets = list(zip(ids["prompt_ids"], ids["target_ids"], strict=True))
    generated = list(zip(ids["prompt_ids"], ids["generated_ids"], strict=True))

    def stacked(name: str) -> Tensor:
        return torch.tensor([[float(x) for x in t[name]] for t in triples], dtype=torch.float64)

    return {
        "rows": layout.rows(targets + generated),
        "player_target_logps_BK": stacked("player_target_logps"),
        "player_generated_logps_BK": stacked("player_generated_logps"),
        "target_tokens_B": torch.tensor([len(y) for y in ids["target_ids"]]),
        "generated_tokens_B": torch.tensor([len(g) for g in ids["generated_ids"]]),
        "is_truncated_B": torch.tensor([bool(t.get("is_truncated", False)) for t in triples]),
        "is_identical_B": torch.tensor(
            [
                np.array_equal(y, g)
                for y, g in zip(ids["target_ids"], ids["generated_ids"], strict=True)
            ]
        ),
        "counts": True,
    }
