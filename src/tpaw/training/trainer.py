"""TeamTrainer: transformers' Trainer with an objective over triples. It holds no reference model.

It trains on any dataset with the columns that its objective needs, so it also serves people who
have a loop of their own. Batching, optimizer, schedule, saving, resuming and trackers are the
Trainer's.

Waits for the device, beside those of the Trainer: one for each batch (`_agree_or_raise`) and one
for each line of the log (`log`). No micro-batch waits.

Shape suffixes: B triples in a micro-batch, K players, S sequences of a micro-batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import DistributedType, send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.utils import logging

from tpaw.errors import DivergenceError, PolicyMismatchError
from tpaw.logprobs.prepare import prepare_for_logprobs
from tpaw.logprobs.response import LogprobHead, response_logps
from tpaw.models.loading import disable_dropout
from tpaw.objectives.base import Objective, ObjectiveNeeds, ObjectiveOutput, PairLogps
from tpaw.training.batching import (
    INITIAL_COLUMN,
    BatchedTriples,
    TripleBatch,
    TripleBatchSampler,
    TripleMicroBatch,
    TripleSizes,
    columns_for,
)
from tpaw.training.first_step import (
    FIRST_STEP_TOLERANCE,
    difference_per_token,
    is_untouched,
    with_policy_in_column,
)

logger = logging.get_logger(__name__)


class _Batches(DataLoader[TripleBatch]):
    """One batch of triples at a time, in another order each epoch."""

    def set_epoch(self, epoch: int) -> None:
        sampler: Any = self.batch_sampler
        sampler.set_epoch(epoch)


class TeamTrainer(Trainer):
    """Minimises the mean loss of an objective over each global batch of triples.

    Args:
        model: the policy. Its weights should be fp32: at learning rates of 1e-7 to 1e-6 a bf16
            weight does not move at all. Pass `bf16=True` in `args` for bf16 computation.
        args: transformers' TrainingArguments.
        train_dataset: rows that can be indexed: `prompt_ids`, `target_ids` and `generated_ids` with
            token ids; `player_target_logps` and `player_generated_logps` with one summed log-prob
            (nats) for each player; optionally `is_truncated`. `columns_for(objective.needs)` names
            those that the objective needs.
        processing_class: the tokenizer, to be saved with the model; it is not used otherwise.
        objective: the loss, `TeamObjective(lambda_=0.1, eta=6.0, gamma=0.5)` for example.
        start_column: column of the player that the policy starts as. Until the first update the two
            count as equal, and training stops if they differ by more than rounding. None: the
            policy starts as none of the players, and nothing is checked.
        first_step_tolerance: the difference that counts as rounding, in nats per token, averaged
            over a micro-batch. Default: `FIRST_STEP_TOLERANCE` for the precision of `args`.
        tokens_per_row: token budget of one forward pass. Each batch is divided into micro-batches
            of about this many tokens. More is faster until memory runs out, and changes results by
            rounding alone. A longer triple gets a micro-batch of its own.
        group_by_prompt: shuffle prompts instead of triples, so that a target with several generated
            responses goes through the model once for all of them.

    Raises:
        TypeError: `objective` is not an Objective.
        ValueError: the dataset is empty, cannot be indexed, lacks a column or has a prompt without
            tokens; `start_column` is not one of its players; or an argument has no effect here.
        PolicyMismatchError: see `start_column`.
        DivergenceError: a log-prob of the policy is NaN or infinite.
    """

    # `compute_loss` divides by the global number of triples, so nothing is left to scale.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        args: TrainingArguments,
        train_dataset: Any,
        processing_class: PreTrainedTokenizerBase | None,
        objective: Objective,
        start_column: int | None = None,
        first_step_tolerance: float | None = None,
        tokens_per_row: int = 8192,
        group_by_prompt: bool = False,
        **kwargs: Any,
    ) -> None:
        _check_objective(objective)
        if kwargs.get("eval_dataset") is not None:
            raise ValueError(
                "eval_dataset: TeamTrainer does not evaluate; evaluate the responses of a "
                "checkpoint instead"
            )
        _check_dataset(train_dataset, objective, start_column)
        _refuse_what_would_do_nothing(args)
        if _format_of(train_dataset) in ("numpy", "torch", "tensorflow", "jax"):
            train_dataset = train_dataset.with_format(None)  # those round log-probs to float32
        args.remove_unused_columns = False
        args.logging_nan_inf_filter = False
        disable_dropout(model)
        responses = ["target_ids", "generated_ids"]
        if objective.needs.initial_responses:
            responses.append(INITIAL_COLUMN)
        self._sizes = TripleSizes(train_dataset, responses)
        self._layout, notes = prepare_for_logprobs(model, self._sizes.longest)
        self._head = LogprobHead.attached_to(model)
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
        self.objective = objective
        self.start_column = start_column
        default = FIRST_STEP_TOLERANCE["bf16" if args.bf16 or args.fp16 else "fp32"]
        self.first_step_tolerance = (
            default if first_step_tolerance is None else first_step_tolerance
        )
        # Since the last log, by metric; and since the last batch, whether something failed.
        self._metric_names: tuple[str, ...] = ()
        self._metric_sums: Tensor | None = None
        self._is_finite: list[Tensor] = []
        self._differences: list[Tensor] = []

    def get_train_dataloader(self) -> DataLoader[TripleBatch]:
        """Batches of `per_device_train_batch_size` triples a process, divided into micro-batches.

        accelerate does not prepare it: it would divide the batches a second time.
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
            BatchedTriples(self.train_dataset, self._layout, self.objective.needs),
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
        """Forward and backward of each micro-batch; processes exchange gradients at the last.

        Raises:
            DivergenceError, PolicyMismatchError: on every process, if it happened on any.
        """
        state = self.accelerator.gradient_state
        is_end_of_step = state.sync_gradients
        exchanges_always = (
            self.accelerator.distributed_type == DistributedType.DEEPSPEED
            or state.plugin_kwargs.get("sync_each_batch", False)
        )
        losses = []
        micro_batches = inputs["micro_batches"]
        for i, micro_batch in enumerate(micro_batches, start=1):
            is_last = i == len(micro_batches)
            # DeepSpeed updates the weights in `backward` unless this flag says that the step has
            # not ended.
            state._set_sync_gradients(is_end_of_step and is_last)
            exchanges = is_last or exchanges_always
            with contextlib.nullcontext() if exchanges else self.accelerator.no_sync(model):
                losses.append(super().training_step(model, micro_batch, num_items_in_batch))
        self._agree_or_raise()
        return torch.stack(losses).sum()

    def floating_point_ops(self, inputs: TripleBatch) -> float:
        """Of forward and backward over the batch: 6 for each weight and token."""
        tokens = (m["packed"]["input_ids_BL"].numel() for m in inputs["micro_batches"])
        return 6.0 * self._weights_per_token * sum(tokens)

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
        """This micro-batch's share of the mean over the global batch; float32 scalar."""
        logps_S = response_logps(model, inputs["packed"], self._head)
        target_B, generated_B, *initial_B = torch.split(logps_S, len(inputs["target_tokens_B"]))
        logps = PairLogps(
            policy_target_B=target_B,
            policy_generated_B=generated_B,
            player_target_BK=inputs["player_target_logps_BK"],
            player_generated_BK=inputs["player_generated_logps_BK"],
            target_tokens_B=inputs["target_tokens_B"],
            generated_tokens_B=inputs["generated_tokens_B"],
            policy_initial_B=initial_B[0] if initial_B else None,
        )
        if self.model.training:
            self._is_finite.append(logps_S.isfinite().all())
            if self.start_column is not None and is_untouched(
                self.state.global_step, self.lr_scheduler
            ):
                logps = self._started(logps, self.start_column)
        output = self.objective(logps)
        if self.model.training:
            self._record(output, logps, inputs)
        triples = len(output.loss_B) if num_items_in_batch is None else num_items_in_batch
        # Gradients are averaged over processes; each holds only its part of the sum.
        scale = 0 if inputs["is_filler"] else self.accelerator.num_processes
        loss = output.loss_B.sum() * scale / triples
        return (loss.float(), output) if return_outputs else loss.float()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics: means over the triples since the last log, of all processes."""
        if self._metric_sums is not None:
            sums = self.accelerator.reduce(self._metric_sums, reduction="sum")
            self._metric_sums = None
            total = dict(zip(self._metric_names, sums.tolist(), strict=True))
            triples = total.pop("triples")
            tokens = {kind: total.pop(f"tokens/{kind}") for kind in ("target", "generated")}
            logs |= {name: value / triples for name, value in total.items()}
            for kind, count in tokens.items():
                if count:
                    logs[f"logps/{kind}_per_token"] = total[f"logps/{kind}"] / count
        super().log(logs, start_time)

    def _started(self, logps: PairLogps, column: int) -> PairLogps:
        """Note how far the policy is from the player that it starts as, and count them as equal."""
        policy = torch.cat([logps.policy_target_B, logps.policy_generated_B])
        player = torch.cat(
            [logps.player_target_BK[:, column], logps.player_generated_BK[:, column]]
        )
        tokens = torch.cat([logps.target_tokens_B, logps.generated_tokens_B])
        self._differences.append(difference_per_token(policy, player, tokens))
        return logps._replace(
            player_target_BK=with_policy_in_column(
                logps.player_target_BK, logps.policy_target_B, column
            ),
            player_generated_BK=with_policy_in_column(
                logps.player_generated_BK, logps.policy_generated_B, column
            ),
        )

    def _record(self, output: ObjectiveOutput, logps: PairLogps, inputs: TripleMicroBatch) -> None:
        """Add the metrics of a micro-batch to the sums, on the device."""
        values = {
            **output.metrics,
            "logps/target": logps.policy_target_B.detach(),
            "logps/generated": logps.policy_generated_B.detach(),
            "share/truncated": inputs["is_truncated_B"],
            "share/identical": inputs["is_identical_B"],
            "tokens/target": inputs["target_tokens_B"],
            "tokens/generated": inputs["generated_tokens_B"],
            "triples": torch.ones_like(inputs["target_tokens_B"]),
        }
        sums = torch.stack([value_B.double() for value_B in values.values()]).sum(dim=1)
        if inputs["is_filler"]:
            sums = torch.zeros_like(sums)
        self._metric_names = tuple(values)
        self._metric_sums = sums if self._metric_sums is None else self._metric_sums + sums

    def _agree_or_raise(self) -> None:
        """Raise on every process what failed on any in this batch. Waits for the device."""
        is_finite, differences = torch.stack(self._is_finite), self._differences
        self._is_finite, self._differences = [], []
        has_changed = self._head.has_changed if self._head is not None else None
        facts = [
            (~is_finite.all()).double(),
            torch.zeros_like(is_finite[0], dtype=torch.float64)
            if has_changed is None
            else has_changed.double(),
            torch.stack(differences).max().double()
            if differences
            else torch.zeros_like(is_finite[0], dtype=torch.float64),
        ]
        gathered = self.accelerator.gather(torch.stack(facts)[None])
        diverged, changed, difference = gathered.amax(dim=0).tolist()
        step = self.state.global_step + 1
        if changed and self._head is not None:
            self._head.has_changed = torch.tensor(True)
            self._head.raise_if_changed()
        if diverged:
            raise DivergenceError(f"step {step}: the policy's log-prob is NaN or infinite")
        # Written as "not (allowed)", so that a NaN stops training too.
        if not difference <= self.first_step_tolerance:
            raise PolicyMismatchError(
                f"before the first update the policy's log-probs differ from those of the player "
                f"that it starts as by {difference:.2g} nats per token; rounding alone stays below "
                f"{self.first_step_tolerance:.2g}. The two were computed from different weights, "
                "token ids, masks, templates or dtypes."
            )


def _check_objective(objective: Any) -> None:
    is_instance = isinstance(objective, Objective) and not isinstance(objective, type)
    if not is_instance or not isinstance(objective.needs, ObjectiveNeeds):
        raise TypeError(
            f"objective: {objective!r:.100} is not an Objective; pass for example "
            "TeamObjective(lambda_=0.1, eta=6.0, gamma=0.5)"
        )


def _check_dataset(dataset: Any, objective: Objective, start_column: int | None) -> None:
    """Refuse a dataset that the objective cannot be computed from.

    Raises:
        ValueError: naming what is missing.
    """
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise ValueError(
            f"train_dataset: {type(dataset).__name__} cannot be indexed; an iterable dataset is "
            "not supported"
        )
    if len(dataset) == 0:
        raise ValueError("train_dataset: it has no rows")
    first, needed = dataset[0], columns_for(objective.needs)
    absent = [name for name in needed if name not in first]
    if absent:
        raise ValueError(
            f"train_dataset: no column {', '.join(absent)}; the objective needs {', '.join(needed)}"
        )
    references = objective.needs.references
    players = 0 if references == "none" else len(first["player_target_logps"])
    if references == "newest" and players != 1:
        raise ValueError(
            f"train_dataset: player_target_logps has {players} players; the objective needs "
            "exactly one"
        )
    if references != "none" and players == 0:
        raise ValueError("train_dataset: player_target_logps has no players")
    if start_column is not None and not 0 <= start_column < players:
        raise ValueError(
            f"start_column: {start_column}; it must be None, or a column of the {players} players "
            "(from 0)"
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
