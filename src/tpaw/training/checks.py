"""What `TeamTrainer` refuses before it trains: objectives, arguments and datasets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from datasets import IterableDataset
from numpy.typing import NDArray
from torch import nn
from transformers import TrainingArguments

from tpaw.data.token_ids import TokenIds
from tpaw.objectives.base import Objective, ObjectiveNeeds
from tpaw.training.batching import PLAYER_COLUMNS, columns_for

_NO_EVALUATION = "TeamTrainer does not evaluate; evaluate the responses of a checkpoint instead"

# Options of transformers' and TRL's trainers. The value says what to do instead.
_OTHER_OPTIONS: Mapping[str, str] = {
    "eval_dataset": _NO_EVALUATION,
    "compute_metrics": _NO_EVALUATION,
    "preprocess_logits_for_metrics": _NO_EVALUATION,
    "data_collator": "TeamTrainer makes its batches itself, from the columns of train_dataset",
    "compute_loss_func": "pass the loss as objective",
    "model_init": "pass a loaded model or its path as model",
    "ref_model": "the references are the columns player_target_logps and player_generated_logps",
    "peft_config": "pass model=peft.get_peft_model(model, peft_config)",
}

# TrainingArguments that batches of triples have no use for. The value says what to do, or why.
_OTHER_ARGUMENTS: Mapping[str, str] = {
    "auto_find_batch_size": "lower tokens_per_row",
    "dataloader_drop_last": "every triple is trained on",
    "include_num_input_tokens_seen": "tokens are logged by TeamTrainer's own names",
    "label_smoothing_factor": "the objective has no labels",
    "neftune_noise_alpha": "the policy must start as its newest player",
    "use_liger_kernel": "log-probs are computed without logits anyway",
    "parallelism_config": "processes are data-parallel, with DDP or FSDP2",
    "deepspeed": "it is untested; use DDP or FSDP2",
    "deepspeed_plugin": "it is untested; use DDP or FSDP2",
}


def check_objective(objective: Any) -> None:
    """Refuse what does not satisfy the protocol `Objective`.

    Raises:
        TypeError: see above.
    """
    is_instance = isinstance(objective, Objective) and not isinstance(objective, type)
    if not is_instance or not isinstance(objective.needs, ObjectiveNeeds):
        raise TypeError(
            f"objective: {objective!r:.100} is not an Objective; pass for example "
            "TeamObjective(lambda_=0.1, eta=6.0, gamma=0.5)"
        )


def check_options(options: dict[str, Any]) -> None:
    """Refuse, and take out, the options of other trainers that would have no effect.

    Raises:
        ValueError: naming the option and what to do.
    """
    for name, instead in _OTHER_OPTIONS.items():
        if options.pop(name, None) is not None:
            raise ValueError(f"{name}: not with TeamTrainer: {instead}")


def check_arguments(args: TrainingArguments) -> None:
    """Refuse arguments that would have no effect or have never been tested.

    Raises:
        ValueError: naming the argument and what to do.
    """
    for name, reason in _OTHER_ARGUMENTS.items():
        value = getattr(args, name, None)
        if value not in (None, False, "no"):  # 0 equals False
            raise ValueError(f"{name}: {value!r:.40}: not with TeamTrainer: {reason}")
    # Written as "not (allowed)", so that NaN is refused too.
    if not args.learning_rate <= torch.finfo(torch.float32).max:
        raise ValueError(
            f"learning_rate: {args.learning_rate}: it must be a float32 number, at most 3.4e38"
        )
    if args.train_sampling_strategy != "random":
        raise ValueError(
            f"train_sampling_strategy: {args.train_sampling_strategy}: TeamTrainer shuffles, by "
            "triple or with group_by_prompt"
        )
    if args.save_strategy == "best":
        raise ValueError(
            "save_strategy: best: TeamTrainer does not evaluate, so nothing would be saved; use "
            "'steps', 'epoch' or 'no'"
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible to one process: start one process for each with "
            "torchrun or accelerate launch, or set CUDA_VISIBLE_DEVICES"
        )


def half_precision_note(model: nn.Module, learning_rate: float) -> str | None:
    """A warning if weights that are trained have fewer bits than fp32; None if they do not."""
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")):
        if any(p.dtype == dtype for p in model.parameters() if p.requires_grad):
            return (
                f"The weights of the model are {name}. At a small learning rate, such as "
                f"{learning_rate:g}, most updates are lost, because they are smaller than half the "
                "distance to the next number. Load the model with dtype=torch.float32. For "
                f"{name} computation pass {name}=True in args."
            )
    return None


class CheckedRows:
    """The rows of a dataset, each checked when it is read.

    Attributes:
        players: in each row; 0 if the objective needs no references.

    Args:
        dataset: rows with the columns that `columns_for(needs)` names.
        needs: of the objective.
        config: of the model; None if it has none, and then vocabulary and positions are not known.

    Raises:
        ValueError: the dataset is empty or cannot be indexed, or its first row cannot be used.
    """

    def __init__(self, dataset: Any, needs: ObjectiveNeeds, config: Any = None) -> None:
        kind = type(dataset).__name__
        if isinstance(dataset, Mapping):
            raise ValueError(
                f"train_dataset: {kind} is a mapping; pass one of its values: "
                f"{', '.join(map(repr, dataset))}"
            )
        is_iterable = isinstance(dataset, (IterableDataset, torch.utils.data.IterableDataset))
        if is_iterable or not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise ValueError(
                f"train_dataset: {kind} cannot be indexed; an iterable dataset is not supported. "
                "Load it without streaming"
            )
        if len(dataset) == 0:
            raise ValueError("train_dataset: it has no rows")
        self.dataset = dataset
        self.needed = columns_for(needs)
        text = config.get_text_config() if hasattr(config, "get_text_config") else None
        self.vocabulary = getattr(text, "vocab_size", None)
        positions = getattr(text, "max_position_embeddings", None)
        self.positions: float = positions if positions is not None and positions > 0 else math.inf
        self.players = self._players_of(0, self._complete(0)[0])
        if needs.references == "newest" and self.players != 1:
            raise ValueError(
                f"train_dataset: player_target_logps has {self.players} players; the objective "
                "needs exactly one"
            )
        if needs.references != "none" and self.players == 0:
            raise ValueError("train_dataset: player_target_logps has no players")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Mapping[str, TokenIds]:
        """Token ids of a row, by column.

        Raises:
            ValueError: the row cannot be trained on; names the row and the column.
        """
        row, ids = self._complete(index)
        if len(ids["prompt_ids"]) == 0:
            raise ValueError(f"train_dataset: row {index}: prompt_ids is empty")
        for name in ids.keys() - {"prompt_ids"}:
            tokens = len(ids["prompt_ids"]) + len(ids[name])
            if tokens > self.positions:
                raise ValueError(
                    f"train_dataset: row {index}: prompt_ids and {name} have {tokens} tokens; the "
                    f"model has only {self.positions} positions"
                )
        players = self._players_of(index, row)
        if players != self.players:
            raise ValueError(
                f"train_dataset: row {index}: player_target_logps has {players} players; "
                f"row 0 has {self.players}"
            )
        return ids

    def _complete(self, index: int) -> tuple[Mapping[str, Any], dict[str, TokenIds]]:
        row = self.dataset[index]
        absent = [name for name in self.needed if name not in row]
        if absent:
            raise ValueError(
                f"train_dataset: row {index}: no column {', '.join(absent)}; the objective needs "
                f"{', '.join(self.needed)}"
            )
        names = (name for name in self.needed if name not in PLAYER_COLUMNS)
        return row, {name: self._ids_of(index, name, row[name]) for name in names}

    def _ids_of(self, index: int, name: str, value: Any) -> TokenIds:
        try:
            ids = np.asarray(value)
        except (TypeError, ValueError):  # lists of unequal lengths
            ids = np.empty((0, 0))
        if ids.ndim != 1 or (ids.dtype.kind not in "iu" and ids.size > 0):
            raise ValueError(
                f"train_dataset: row {index}: {name} is {value!r:.60}; it must be a list of token "
                "ids"
            )
        limit = self.vocabulary or 2**31
        # As unsigned numbers, negative ids are too large as well.
        if ids.size > 0 and ids.astype(np.uint64).max() >= limit:
            position = int(np.argmax(ids.astype(np.uint64) >= limit))
            advice = (
                "this is no token id but a masked label; leave such tokens out"
                if ids[position] == -100
                else f"it must be from 0 to {limit - 1}, as the model's vocabulary"
            )
            raise ValueError(
                f"train_dataset: row {index}: {name} has id {ids[position]} at position "
                f"{position}; {advice}"
            )
        return ids.astype(np.int32, copy=False)

    def _players_of(self, index: int, row: Mapping[str, Any]) -> int:
        """The number of players, which both columns must agree in."""
        found = [
            self._logps_of(index, name, row[name]) for name in PLAYER_COLUMNS if name in self.needed
        ]
        if not found:
            return 0
        target, generated = map(len, found)
        if target != generated:
            raise ValueError(
                f"train_dataset: row {index}: player_generated_logps has {generated} players; "
                f"player_target_logps has {target}"
            )
        return target

    def _logps_of(self, index: int, name: str, value: Any) -> NDArray[np.float64]:
        try:
            logps = np.asarray(value, dtype=np.float64)
        except (TypeError, ValueError):
            logps = np.empty((0, 0))
        if logps.ndim != 1:
            raise ValueError(
                f"train_dataset: row {index}: {name} is {value!r:.60}; it must be a list with one "
                "summed log-prob for each player"
            )
        if np.isnan(logps).any():
            raise ValueError(f"train_dataset: row {index}: {name} is NaN")
        return logps
