"""What contenders are given and what they give back."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

# η is 1, or the target weight "one": then the objective with one player is DPO's sigmoid loss.
DPO_OBJECTIVE: Mapping[str, Any] = {
    "lambda_": 0.1,
    "eta": 1.0,
    "gamma": 0.5,
    "target_weight": "one",
}
PAPER_OBJECTIVE: Mapping[str, Any] = {"lambda_": 0.1, "eta": 6.0, "gamma": 0.5}


@dataclass(frozen=True)
class Settings:
    """What all contenders of a comparison share.

    Attributes:
        batch: triples in an optimizer step.
        lean_optimizer: update tensor by tensor. On a GPU torch otherwise makes a temporary as large
            as all weights; the speed is the same where tensors are large. Ours only.
        watch: keep each step's loss, the first step's gradient and the final weights, for the gate.
        split_weights: as `train.weights: split`.
    """

    batch: int
    objective: Mapping[str, Any]
    bf16: bool = False
    learning_rate: float = 1e-6
    epochs: int = 1
    checkpointing: bool = False
    lean_optimizer: bool = False
    split_weights: bool = False
    watch: bool = False


@dataclass
class Training:
    """What one training gave.

    Attributes:
        seconds: from the first batch's collation to the end of the last optimizer step.
        step_seconds: the same, step by step.
        losses: of each step; only if watched.
        gradient: of the first step after clipping, all weights in one vector; only if watched.
        weights: after the last step, in one vector; only if watched.
    """

    seconds: float
    step_seconds: list[float]
    losses: list[float] = field(default_factory=list)
    gradient: Tensor | None = None
    weights: Tensor | None = None


class StepClock(TrainerCallback):
    """Times the steps of a transformers Trainer, and watches them if asked to."""

    def __init__(self, device: torch.device, watch: bool) -> None:
        self.device = device
        self.watch = watch
        self.marks: list[float] = []
        self.gradient: Tensor | None = None

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        """Begin before the first batch is collated."""
        if not self.marks:
            self._mark()

    def on_pre_optimizer_step(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        """Keep the first gradient."""
        if self.watch and self.gradient is None:
            self.gradient = flat_gradient(model)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """A step has ended, its update included."""
        self._mark()

    def training(self, model: nn.Module, log_history: list[dict[str, float]]) -> Training:
        """Everything seen, once training has ended."""
        steps = [b - a for a, b in zip(self.marks, self.marks[1:], strict=False)]
        return Training(
            seconds=self.marks[-1] - self.marks[0],
            step_seconds=steps,
            losses=[line["loss"] for line in log_history if "loss" in line],
            gradient=self.gradient,
            weights=flat_weights(model) if self.watch else None,
        )

    def _mark(self) -> None:
        synchronize(self.device)
        self.marks.append(time.perf_counter())


def synchronize(device: torch.device) -> None:
    """Wait for the GPU, if it is one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def flat_weights(model: nn.Module) -> Tensor:
    """All weights in one float32 vector on the CPU."""
    return torch.cat([p.detach().reshape(-1).float().cpu() for p in model.parameters()])


def flat_gradient(model: nn.Module) -> Tensor:
    """All gradients, in the order of `flat_weights`; zeros where there is none."""
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([part.reshape(-1).float().cpu() for part in parts])
