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
import os
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import logging

from tpaw.errors import DivergenceError, PolicyMismatchError
from tpaw.logprobs.prepare import prepare_for_logprobs
from tpaw.logprobs.response import LogprobHead, response_logps
from tpaw.models.loading import disable_dropout
from tpaw.objectives.base import Objective, ObjectiveOutput, PairLogps
from tpaw.training.batching import (
    INITIAL_COLUMN,
    BatchedTriples,
    TripleBatch,
    TripleBatchSampler,
    TripleMicroBatch,
    TripleSizes,
)
from tpaw.training.checks import (
    CheckedRows,
    check_arguments,
    check_objective,
    check_options,
    half_precision_note,
)
from tpaw.training.first_step import is_untouched, started_as, tolerance_for, total_differences

logger = logging.get_logger(__name__)


class _Batches(DataLoader[TripleBatch]):
    """One batch of triples at a time, in another order each epoch."""

    def set_epoch(self, epoch: int) -> None:
        sampler: Any = self.batch_sampler
        sampler.set_epoch(epoch)


class TeamTrainer(Trainer):
    """Minimises the mean loss of an objective over each global batch of triples.

    Args:
        model: the policy, or the path of one, which is loaded in fp32. Its weights should be fp32:
            at learning rates of 1e-7 to 1e-6 a bf16 weight does not move at all. Pass `bf16=True`
            in `args` for bf16 computation.
        args: transformers' TrainingArguments.
        train_dataset: rows that can be indexed: `prompt_ids`, `target_ids` and `generated_ids` with
            token ids; `player_target_logps` and `player_generated_logps` with one summed log-prob
            (nats) for each player; optionally `is_truncated`. `columns_for(objective.needs)` names
            those that the objective needs.
        processing_class: the tokenizer, to be saved with the model; it is not used otherwise.
        objective: the loss, `TeamObjective(lambda_=0.1, eta=6.0, gamma=0.5)` for example.
        start_column: column of the player that the policy starts as. Training stops if the two
            differ by more than rounding. Until the first update the two count as equal. None: a
            forward pass over the first batch finds the column, and a warning says if there is none.
        first_step_tolerance: the difference that counts as rounding, in nats per token, averaged
            over a micro-batch. Default: `FIRST_STEP_TOLERANCE` for the precision of `args`.
        tokens_per_row: token budget of one forward pass. Each batch is divided into micro-batches
            of about this many tokens. More is faster until memory runs out, and changes results by
            rounding alone. A longer triple gets a micro-batch of its own.
        group_by_prompt: shuffle prompts instead of triples, so that a target with several generated
            responses goes through the model once for all of them.

    Raises:
        TypeError: `objective` is not an Objective, or `model` is not a model.
        ValueError: a row of the dataset cannot be trained on (see `CheckedRows`); `start_column` is
            not one of its players; or an argument has no effect here.
        PolicyMismatchError: see `start_column`.
        InputError: the model cannot be used; see `prepare_for_logprobs`.
        DivergenceError: a log-prob of the policy is NaN or infinite.
    """

    # `compute_loss` divides by the global number of triples, so nothing is left to scale.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str,
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
        check_objective(objective)
        check_options(kwargs)
        check_arguments(args)
        if _format_of(train_dataset) in ("numpy", "torch", "tensorflow", "jax"):
            train_dataset = train_dataset.with_format(None)  # those round log-probs to float32
        if isinstance(model, str | os.PathLike):
            model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        elif not isinstance(model, nn.Module):
            raise TypeError(f"model: {model!r:.60}: it must be a loaded model or the path of one")
        rows = CheckedRows(train_dataset, objective.needs, getattr(model, "config", None))
        if start_column is not None and not 0 <= start_column < rows.players:
            raise ValueError(
                f"start_column: {start_column}; it must be None, or a column of the {rows.players} "
                "players (from 0)"
            )
        args.remove_unused_columns = False
        args.logging_nan_inf_filter = False
        disable_dropout(model)
        responses = ["target_ids", "generated_ids"]
        if objective.needs.initial_responses:
            responses.append(INITIAL_COLUMN)
        self._sizes = TripleSizes(rows, responses)
        self._layout, notes = prepare_for_logprobs(model, self._sizes.longest)
        self._head = LogprobHead.attached_to(model)
        for note in (*notes, half_precision_note(model, args.learning_rate)):
            if note is not None:
                logger.warning(note)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
            raise ValueError("fsdp_config: version 1 is untested with TeamTrainer; use version 2")
        count = getattr(model, "num_parameters", None)
        self._weights_per_token = count(exclude_embeddings=True) if count else 0
        self.tokens_per_row = tokens_per_row
        self.group_by_prompt = group_by_prompt
        self.objective = objective
        self.start_column = start_column
        self.first_step_tolerance = (
            tolerance_for(model, args) if first_step_tolerance is None else first_step_tolerance
        )
        # The column that the policy starts as, and the state of the training it was found in.
        self._start = start_column
        self._looks_for_start = start_column is None and objective.needs.references != "none"
        self._looked_in: TrainerState | None = None
        # Since the last log, by metric; and since the last batch, whether something failed.
        self._metric_names: tuple[str, ...] = ()
        self._metric_sums: Tensor | None = None
        self._is_finite: list[Tensor] = []
        self._differences: list[Tensor] = []
        self._first_difference: float | None = None  # until it is logged

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
        micro_batches = inputs["micro_batches"]
        if self._looks_for_start and self._is_untouched and self._looked_in is not self.state:
            self._start, self._looked_in = self._find_start(model, micro_batches), self.state
        exchanges_always = self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch")
        losses = []
        for i, micro_batch in enumerate(micro_batches, start=1):
            exchanges = exchanges_always or i == len(micro_batches)
            with contextlib.nullcontext() if exchanges else self.accelerator.no_sync(model):
                losses.append(super().training_step(model, micro_batch, num_items_in_batch))
        self._agree_or_raise()
        return torch.stack(losses).sum()

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Not supported.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "TeamTrainer only trains; save the model and evaluate its responses instead"
        )

    predict = evaluate

    def floating_point_ops(self, inputs: TripleBatch) -> float:
        """Of forward and backward over the batch: 6 for each weight and token."""
        tokens = (m["packed"]["input_ids_BL"].numel() for m in inputs["micro_batches"])
        return 6.0 * self._weights_per_token * sum(tokens)

    def _prepare_inputs(self, inputs: TripleMicroBatch) -> Any:
        # The Trainer's own leaves `Spans` on the CPU.
        return send_to_device(inputs, self.args.device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: TripleMicroBatch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's share of the mean over the global batch; float32 scalar."""
        logps = self._logps(model, inputs)
        if self.model.training:
            self._is_finite.append(_are_finite(logps))
            if self._start is not None and self._is_untouched:
                if self.start_column is not None:
                    differences_K, tokens = total_differences(logps)
                    self._differences.append(differences_K[self._start] / tokens.clamp(min=1))
                logps = started_as(logps, self._start)
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
        if self._first_difference is not None:
            logs["first_step/difference"] = self._first_difference
            logs["first_step/limit"] = self.first_step_tolerance
            self._first_difference = None
        super().log(logs, start_time)

    def _logps(self, model: nn.Module, inputs: TripleMicroBatch) -> PairLogps:
        logps_S = response_logps(model, inputs["packed"], self._head)
        target_B, generated_B, *initial_B = torch.split(logps_S, len(inputs["target_tokens_B"]))
        return PairLogps(
            policy_target_B=target_B,
            policy_generated_B=generated_B,
            player_target_BK=inputs["player_target_logps_BK"],
            player_generated_BK=inputs["player_generated_logps_BK"],
            target_tokens_B=inputs["target_tokens_B"],
            generated_tokens_B=inputs["generated_tokens_B"],
            policy_initial_B=initial_B[0] if initial_B else None,
        )

    @property
    def _is_untouched(self) -> bool:
        return is_untouched(self.state.global_step, self.lr_scheduler)

    @torch.no_grad()
    def _find_start(self, model: nn.Module, micro_batches: list[TripleMicroBatch]) -> int | None:
        """The column of the player that the policy is, but for rounding; None if it is none.

        It takes a forward pass over a batch of all processes. Waits for the device.
        """
        found = []
        for micro_batch in micro_batches:
            inputs = self._prepare_inputs(micro_batch)
            with self.compute_loss_context_manager():
                differences_K, tokens = total_differences(self._logps(model, inputs))
            sums = torch.cat([differences_K, tokens[None]])
            found.append(torch.zeros_like(sums) if micro_batch["is_filler"] else sums)
        sums = self.accelerator.reduce(torch.stack(found).sum(dim=0), reduction="sum")
        difference_K = (sums[:-1] / sums[-1].clamp(min=1)).nan_to_num(nan=torch.inf)
        column = int(difference_K.argmin())
        difference = float(difference_K[column])
        if difference <= self.first_step_tolerance:
            return column
        logger.warning(
            f"The policy starts as none of the players: the nearest is that of column {column}, "
            f"with log-probs that differ by {difference:.2g} nats per token (rounding alone stays "
            f"below {self.first_step_tolerance:.2g}). If it should start as one of them, check "
            "the weights, token ids, masks, templates and dtypes that the log-probs were computed "
            "with."
        )
        return None

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
        is_compared = bool(differences)
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
        if is_compared:
            self._first_difference = max(difference, self._first_difference or 0.0)


def _are_finite(logps: PairLogps) -> Tensor:
    policy = [logps.policy_target_B, logps.policy_generated_B, logps.policy_initial_B]
    return torch.cat([logps_B for logps_B in policy if logps_B is not None]).isfinite().all()


def _format_of(dataset: Any) -> str | None:
    found = getattr(dataset, "format", None)
    return found.get("type") if isinstance(found, dict) else None


def _as_it_is(batch: Any) -> Any:
    return batch
