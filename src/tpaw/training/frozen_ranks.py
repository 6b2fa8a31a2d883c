"""A new adapter on top of earlier ones: the earlier ranks take part, but do not change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


class FrozenRanks(TrainerCallback):
    """Trains only the last ranks of an adapter; see `AdaptedBase.policy`.

    The gradient of the others is 0, so that they count neither for clipping nor for an optimizer's
    state. After each step they get their values back, because weight decay, and optimizers that
    mix rows, change weights without a gradient.

    Args:
        policy: a model of PEFT with one adapter.
        trained: ranks at the end that are trained.
    """

    def __init__(self, policy: nn.Module, trained: int) -> None:
        self._frozen: list[tuple[nn.Parameter, slice | tuple[slice, slice], Tensor]] = []
        for name, parameter in policy.named_parameters():
            if not parameter.requires_grad:
                continue
            is_a = ".lora_A." in name
            ranks = slice(parameter.shape[0 if is_a else 1] - trained)
            part = ranks if is_a else (slice(None), ranks)
            self._frozen.append((parameter, part, parameter.detach()[part].clone()))
        self._hooks: list[RemovableHandle] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the gradients of the earlier ranks 0."""
        for parameter, part, _ in self._frozen:

            def without(gradient: Tensor, part: Any = part) -> Tensor:
                gradient = gradient.clone()
                gradient[part] = 0.0
                return gradient

            self._hooks.append(parameter.register_hook(without))  # type: ignore[no-untyped-call]

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the earlier ranks their values back."""
        with torch.no_grad():
            for parameter, part, values in self._frozen:
                parameter[part] = values

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
