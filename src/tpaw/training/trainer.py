"""TeamTrainer: transformers' Trainer with the team objective. No reference model is in memory.

It trains on any dataset with the columns of `COLUMNS`, so it also serves people who keep their own
loop. Batching, optimizer, schedule, saving, resuming and trackers are the Trainer's own.

Shape suffixes: B triples in a row, K main players.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate.utils import DistributedType, send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.utils import logging

from tpaw.errors import DivergenceError, PolicyMismatchError
from tpaw.logprobs.prepare import prepare_for_logprobs
from tpaw.logprobs.response import response_logps
from tpaw.models.loading import disable_dropout
from tpaw.objectives.tpaw import TeamLoss, team_loss
from tpaw.training.batching import (
    COLUMNS,
    BatchedTriples,
    TripleBatch,
    TripleBatchSampler,
    TripleMicroBatch,
    TripleSizes,
)

logger = logging.get_logger(__name__)

# At the first step the policy is the newest player, so |log π_θ − log π_θt| per token is rounding
# alone: 1e-8 in fp32 and 4e-5 in bf16 on a CPU (docs/log.md). GPUs choose kernels by batch shape,
# so there is room above that; a wrong template, mask or checkpoint gives 0.1 and more.
FIRST_STEP_TOLERANCE: Mapping[str, float] = {"fp32": 1e-4, "bf16": 2e-2}

ADVICE = (
    "lower train.learning_rate, remove the iteration's training folder and training.jsonl, and run "
    "again (values for iterations that have not begun may change)"
)


class _Batches(DataLoader[TripleBatch]):
    """One batch of triples at a time, in an order of its own each epoch."""

    def set_epoch(self, epoch: int) -> None:
        sampler: Any = self.batch_sampler
        sampler.set_epoch(epoch)


class TeamTrainer(Trainer):
    """Minimises the mean of `team_loss` over each global batch of triples.

    Args:
        model: the policy. Weights should be fp32: at learning rates of 1e-7 to 1e-6 a bf16 weight
            does not move at all. Pass `bf16=True` in `args` for bf16 computation.
        args: transformers' TrainingArguments.
        train_dataset: rows with the columns of `COLUMNS`; the first three hold token ids, the last
            two one summed log-prob per main player, newest first. `is_truncated` is optional.
        processing_class: the tokenizer, to be saved with the model; it is not used otherwise.
        objective: keyword arguments of `tpaw.objectives.tpaw.team_loss`.
        tokens_per_row: what goes through the model at a time. A batch of triples is shared out to
            rows of about this many tokens; more per row is faster until memory runs out, and
            changes results by rounding alone. A triple that is longer gets a row of its own.
        group_by_prompt: shuffle prompts instead of triples, so that a target that occurs with
            several generated responses goes through the model once for all of them.
        first_step_tolerance: stop if, before the first update, |log π_θ − log π_j| of the newest
            player exceeds this, in nats per token, averaged over a row. Within it the two
            count as equal. None switches this off, for loops in which the policy does not start as
            a player.

    Raises:
        ValueError: the dataset lacks a column, is not one that can be indexed or has a prompt
            without tokens; or an argument that would do nothing here.
        PolicyMismatchError: see `first_step_tolerance`.
        DivergenceError: a log-prob of the policy is not a number.
    """

    # `compute_loss` divides by the global number of triples, so nothing is left to scale.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        args: TrainingArguments,
        train_dataset: Any,
        processing_class: PreTrainedTokenizerBase | None,
        objective: Mapping[str, Any],
        tokens_per_row: int = 8192,
        group_by_prompt: bool = False,
        first_step_tolerance: float | None = None,
        **kwargs: Any,
    ) -> None:
        if not hasattr(train_dataset, "__getitem__") or kwargs.get("eval_dataset") is not None:
            raise ValueError(
                "TeamTrainer takes a train_dataset that can be indexed, and no eval_dataset: "
                "evaluate a checkpoint by its answers instead"
            )
        absent = [name for name in COLUMNS if name not in train_dataset[0]]
        if absent:
            raise ValueError(f"train_dataset lacks {', '.join(absent)}; it needs {COLUMNS}")
        _refuse_what_would_do_nothing(args)
        if _format_of(train_dataset) in ("numpy", "torch", "tensorflow", "jax"):
            train_dataset = train_dataset.with_format(None)  # those round log-probs to float32
        args.remove_unused_columns = False
        args.logging_nan_inf_filter = False
        disable_dropout(model)
        self._sizes = TripleSizes(train_dataset)
        self._layout, notes = prepare_for_logprobs(model, self._sizes.longest)
        for note in notes:
            logger.warning(note)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        count = getattr(model, "num_parameters", None)
        self._weights_per_token = count(exclude_embeddings=True) if count else 0
        self.tokens_per_row = tokens_per_row
        self.group_by_prompt = group_by_prompt
        self.objective = dict(objective)
        self.first_step_tolerance = first_step_tolerance
        self._sums: defaultdict[str, float] = defaultdict(float)

    def get_train_dataloader(self) -> DataLoader[TripleBatch]:
        """Batches of `per_device_train_batch_size` triples a process, each in rows.

        Not prepared by accelerate, which would share them out a second time.
        """
        sampler = TripleBatchSampler(
            self._sizes,
            self._layout,
            triples_per_batch=self.args.train_batch_size * self.accelerator.num_processes,
            tokens_per_row=self.tokens_per_row,
            group_by_prompt=self.group_by_prompt,
            seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
            process=self.accelerator.process_index,
            processes=self.accelerator.num_processes,
        )
        return _Batches(
            BatchedTriples(self.train_dataset, self._layout),
            batch_sampler=sampler,
            collate_fn=_as_it_is,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[TripleBatch], num_batches: int, device: torch.device
    ) -> tuple[list[TripleBatch], int]:
        """The batches of a step, and the number of triples in it over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, sum(batch["triples"] for batch in batches)

    def training_step(
        self,
        model: nn.Module,
        inputs: TripleBatch,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Forward and backward of each row; processes exchange gradients at the last."""
        state = self.accelerator.gradient_state
        is_end_of_step = state.sync_gradients
        exchanges_always = (
            self.accelerator.distributed_type == DistributedType.DEEPSPEED
            or state.plugin_kwargs.get("sync_each_batch", False)
        )
        losses = []
        for i, row in enumerate(inputs["rows"], start=1):
            is_last = i == len(inputs["rows"])
            # DeepSpeed updates the weights in `backward` unless told otherwise, in this way alone.
            state._set_sync_gradients(is_end_of_step and is_last)
            exchanges = is_last or exchanges_always
            with contextlib.nullcontext() if exchanges else self.accelerator.no_sync(model):
                losses.append(super().training_step(model, row, num_items_in_batch))
        return torch.stack(losses).sum()

    def floating_point_ops(self, inputs: TripleBatch) -> float:
        """Of forward and backward over the batch: 6 for each weight and token."""
        rows = (row["rows"]["input_ids_BL"].numel() for row in inputs["rows"])
        return 6.0 * self._weights_per_token * sum(rows)

    def _prepare_inputs(self, inputs: TripleMicroBatch) -> Any:
        # The Trainer's own would round log-probs to bf16 under DeepSpeed.
        return send_to_device(inputs, self.args.device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: TripleMicroBatch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This row's share of the mean over the global batch; float32 scalar."""
        logps_2B = response_logps(model, inputs["rows"])
        target_logps_B, generated_logps_B = logps_2B.chunk(2)
        if not bool(logps_2B.isfinite().all()):
            step = self.state.global_step + 1
            raise DivergenceError(f"step {step}: a log-prob of the policy is no number; {ADVICE}")
        player_target_logps_BK = inputs["player_target_logps_BK"]
        player_generated_logps_BK = inputs["player_generated_logps_BK"]
        if self.model.training and self.first_step_tolerance is not None and self._is_untouched():
            self._check_policy_is_newest_player(target_logps_B, generated_logps_B, inputs)
            # The newest player's rewards are 0 here, and [4] asks for their sign: not of rounding.
            player_target_logps_BK = _with_newest(player_target_logps_BK, target_logps_B)
            player_generated_logps_BK = _with_newest(player_generated_logps_BK, generated_logps_B)
        team = team_loss(
            target_logps_B,
            generated_logps_B,
            player_target_logps_BK,
            player_generated_logps_BK,
            **self.objective,
        )
        if self.model.training:
            self._record(team, target_logps_B, generated_logps_B, inputs)
        triples = len(team.loss_B) if num_items_in_batch is None else num_items_in_batch
        # Gradients are averaged over processes; each holds only its part of the sum.
        loss = team.loss_B.sum() * inputs["counts"] * self.accelerator.num_processes / triples
        return (loss.float(), team) if return_outputs else loss.float()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means, over triples since the last log, of what the objective reported."""
        names = sorted(self._sums)
        if names:
            sums = torch.tensor([self._sums[n] for n in names], dtype=torch.float64)
            sums = self.accelerator.reduce(sums.to(self.args.device), reduction="sum")
            self._sums.clear()
            total = dict(zip(names, sums.tolist(), strict=True))
            triples = total.pop("triples")
            tokens = {kind: total.pop(f"tokens/{kind}") for kind in ("target", "generated")}
            logs |= {name: value / triples for name, value in total.items()}
            for kind, count in tokens.items():
                if count:
                    logs[f"logps/{kind}_per_token"] = total[f"logps/{kind}"] / count
        super().log(logs, start_time)

    def _record(
        self,
        team: TeamLoss,
        target_logps_B: Tensor,
        generated_logps_B: Tensor,
        inputs: TripleMicroBatch,
    ) -> None:
        by_player = {
            "rewards/target": team.target_reward_BK,
            "rewards/generated": team.generated_reward_BK,
            "rewards/margins": team.margin_BK,
            "rewards/accuracies": (team.margin_BK > 0).double(),
        }
        values: dict[str, Tensor] = {}
        for name, value_BK in by_player.items():
            values[name] = value_BK.mean(dim=1)
            for k, value_B in enumerate(value_BK.unbind(dim=1)):
                values[f"{name}/player_{k}"] = value_B
        values["weights/target"] = (team.target_weight_BK > 1).double().mean(dim=1)
        for k, value_B in enumerate(team.player_weight_BK.unbind(dim=1)):
            values[f"weights/player_{k}"] = value_B
        values["logps/target"] = target_logps_B.detach()
        values["logps/generated"] = generated_logps_B.detach()
        values["share/truncated"] = inputs["is_truncated_B"].double()
        values["share/identical"] = inputs["is_identical_B"].double()
        values["tokens/target"] = inputs["target_tokens_B"].double()
        values["tokens/generated"] = inputs["generated_tokens_B"].double()
        values["triples"] = torch.ones_like(target_logps_B)
        names, stacked = zip(*values.items(), strict=True)
        for name, value in zip(names, torch.stack(stacked).sum(dim=1).tolist(), strict=True):
            # The name is there in any case: `log` adds up over all processes.
            self._sums[name] += value if inputs["counts"] else 0.0

    def _is_untouched(self) -> bool:
        """Whether the weights are still those that training began with.

        That is so before the first update, and before the second where warming up makes the first
        at a learning rate of 0. A function of the step alone, so that resuming changes nothing.
        """
        rates: Any = getattr(self.lr_scheduler, "lr_lambdas", None)
        first_rate_is_zero = rates is not None and rates[0](0) == 0
        return bool(self.state.global_step <= int(first_rate_is_zero))

    def _check_policy_is_newest_player(
        self, target_logps_B: Tensor, generated_logps_B: Tensor, inputs: TripleMicroBatch
    ) -> None:
        newest_2B = torch.cat(
            [inputs["player_target_logps_BK"][:, 0], inputs["player_generated_logps_BK"][:, 0]]
        )
        policy_2B = torch.cat([target_logps_B, generated_logps_B]).detach()
        tokens = int(inputs["target_tokens_B"].sum() + inputs["generated_tokens_B"].sum())
        difference = float((policy_2B - newest_2B).abs().sum()) / max(1, tokens)
        # Written as "not (allowed)", so that a NaN stops the run too.
        if not difference <= (self.first_step_tolerance or 0.0):
            raise PolicyMismatchError(
                f"before the first update the policy's log-probs differ from its newest player's "
                f"by {difference:.2g} nats a token; rounding alone stays below "
                f"{self.first_step_tolerance:.2g}. The two were computed from different weights, "
                "token ids, masks, templates or dtypes."
            )


def _refuse_what_would_do_nothing(args: TrainingArguments) -> None:
    """Arguments that batches of triples in packed rows have no use for.

    Raises:
        ValueError: naming the argument and what to do.
    """
    instead = {
        "auto_find_batch_size": "lower tokens_per_row",
        "dataloader_drop_last": "every triple is trained on",
        "include_num_input_tokens_seen": "tokens are logged by TeamTrainer's own names",
        "label_smoothing_factor": "the objective has no labels",
        "neftune_noise_alpha": "the policy must start as its newest player",
        "use_liger_kernel": "log-probs are computed without logits anyway",
        "parallelism_config": "processes are data-parallel, with DDP, FSDP or DeepSpeed",
    }
    for name, reason in instead.items():
        value = getattr(args, name, None)
        if value not in (None, False, 0, "no"):
            raise ValueError(f"{name}: {value}: not with TeamTrainer: {reason}")
    if args.train_sampling_strategy != "random":
        raise ValueError(
            f"train_sampling_strategy: {args.train_sampling_strategy}: TeamTrainer shuffles, by "
            "triple or with group_by_prompt"
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible to one process: start one process for each with "
            "torchrun or accelerate launch, or set CUDA_VISIBLE_DEVICES"
        )


def _format_of(dataset: Any) -> str | None:
    found = getattr(dataset, "format", None)
    return found.get("type") if isinstance(found, dict) else None


def _as_it_is(batch: Any) -> Any:
    return batch


def _with_newest(player_logps_BK: Tensor, policy_logps_B: Tensor) -> Tensor:
    """The players' log-probs, with the policy's own in the place of the newest player's."""
    return torch.cat([policy_logps_B.detach()[:, None], player_logps_BK[:, 1:]], dim=1)
