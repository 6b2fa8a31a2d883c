"""fp32 weights kept in two halves, so that 8B parameters train on one 80 GB card.

A weight is a bf16 parameter of the model, its upper half, and 16 bits in the optimizer's state, its
lower half. A step joins them, makes the ordinary fp32 update and splits again, so the update is
fp32's at the memory of bf16. Bytes a parameter while training in bf16:

                       fp32 and autocast   split
    weight                     4             2
    its bf16 copy              2             –    autocast's, kept for the backward pass
    lower half                 –             2
    gradient                   4             2
    squared gradient           4             2
    together                  14             8    8.03e9 parameters: 112 GB, 64 GB

Gradients are the same bf16 numbers either way, as autocast multiplies in bf16; but here they are
also summed over micro-batches in bf16, which adds an error of about √N/1000 of the sum for N
micro-batches in a step. Fewer and larger micro-batches have less of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# Elements updated at a time: some 30 bytes each of temporary memory, 0.5 GB in all.
SLICE = 2**24

_NAN_BITS = 0x7FC00000


def split_fp32(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Split into (upper, lower), of which `join_fp32` makes the same bits again.

    The upper half is the nearest bf16. Ties go away from zero: the lower half of a tie that went
    towards it would be +2^15, one more than int16 holds. As in any rounding to nearest, what is
    more than half a step above the largest bf16 (3.39e38) has an upper half of ±inf; it joins to
    what it was. ±inf stays so. Every NaN becomes the same one, as the upper half of some would
    otherwise be infinite or, by overflow, −0.

    Args:
        weight: float32, any shape.

    Returns:
        bfloat16 and int16, of the same shape; fp32 bits = (upper bits << 16) + lower.
    """
    bits = torch.where(weight.isnan(), _NAN_BITS, weight.view(torch.int32))
    upper = (bits + 0x8000) >> 16
    lower = bits - (upper << 16)
    return upper.to(torch.int16).view(torch.bfloat16), lower.to(torch.int16)


def join_fp32(upper: Tensor, lower: Tensor) -> Tensor:
    """The float32 weight of a bfloat16 upper and an int16 lower half of equal shape."""
    bits = upper.view(torch.int16).to(torch.int32) << 16
    return bits.add_(lower).view(torch.float32)


def round_stochastically(value: Tensor, generator: torch.Generator) -> Tensor:
    """Round float32 to one of its two bf16 neighbours, so that the mean is the value.

    An infinity stays what it is.
    """
    noise = torch.randint(
        2**16, value.shape, dtype=torch.int32, device=value.device, generator=generator
    )
    bits = (value.view(torch.int32) + noise) >> 16
    return bits.to(torch.int16).view(torch.bfloat16)


def round_weights(model: nn.Module) -> None:
    """Make a fp32 model's parameters the bf16 ones that it trains with when they are split.

    Buffers stay fp32, as they do in training.
    """
    for parameter in model.parameters():
        parameter.data = split_fp32(parameter.data)[0]


def restore_fp32(optimizer: torch.optim.Optimizer) -> None:
    """End the training: make the parameters of a `SplitRMSprop` whole, and empty its state.

    Args:
        optimizer: also one that accelerate has wrapped.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            lower = optimizer.state.pop(parameter)["lower"]
            parameter.data = join_fp32(parameter.data, lower)


class SplitRMSprop(torch.optim.Optimizer):
    """torch.optim.RMSprop (without momentum, not centred) over split weights.

    The parameters given must be fp32 and become bf16 in place; `restore_fp32` undoes it. With a
    fp32 state the joined weights are those of torch.optim.RMSprop on fp32 weights, bit for bit.

    A bf16 state is rounded stochastically. In one step v moves by 0.01 (g² − v), and the nearest
    bf16 is up to 0.4 % away: rounding to nearest would leave v where it is for every g² within
    20 to 40 % of it. The noise is a function of the number of steps, so a resumed run repeats it;
    it leaves a standard deviation of 1 to 2 % in v, half of that in the length of a step.

    Args:
        params: float32 parameters, or groups of them.
        lr, alpha, eps, weight_decay: as torch.optim.RMSprop.
        state_dtype: of the squared gradients' mean, bfloat16 or float32.

    Raises:
        ValueError: a parameter is not fp32, or a loaded state is not of this optimizer's kind.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        state_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        defaults = {"lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay, "steps": 0}
        super().__init__(params, defaults)
        for parameter in self._parameters():
            if parameter.dtype != torch.float32:
                raise ValueError(f"SplitRMSprop splits fp32 parameters, not {parameter.dtype}")
        for parameter in self._parameters():
            parameter.data, lower = split_fp32(parameter.data.contiguous())
            # All at once: what does not fit should fail here and not in the first step.
            self.state[parameter] = {
                "lower": lower,
                "square_avg": torch.zeros_like(lower, dtype=state_dtype),
            }

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        first = next(self._parameters())
        generator = torch.Generator(first.device).manual_seed(self.param_groups[0]["steps"])
        for group in self.param_groups:
            group["steps"] += 1
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                written = (parameter.data, state["lower"], state["square_avg"])
                slices = [tensor.view(-1).split(SLICE) for tensor in written]
                slices.append(parameter.grad.reshape(-1).split(SLICE))
                for upper, lower, square_avg, grad in zip(*slices, strict=True):
                    _update(upper, lower, square_avg, grad, group, generator)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave, into the tensors that are there.

        torch's own would cast the state to the parameters' type, and so destroy the lower halves.
        """
        state = dict(self.state)
        super().load_state_dict(state_dict | {"state": {}})
        self.state.update(state)
        indices = (index for group in state_dict["param_groups"] for index in group["params"])
        for parameter, index in zip(self._parameters(), indices, strict=True):
            loaded = state_dict["state"].get(index, {})
            for name, tensor in self.state[parameter].items():
                found = loaded.get(name)
                if found is None or (found.dtype, found.shape) != (tensor.dtype, tensor.shape):
                    raise ValueError(
                        f"the state to load holds no {name} of type {tensor.dtype} and shape "
                        f"{tuple(tensor.shape)} for parameter {index}"
                    )
                tensor.copy_(found)

    def _parameters(self) -> Any:
        return (parameter for group in self.param_groups for parameter in group["params"])


def _update(
    upper: Tensor,
    lower: Tensor,
    square_avg: Tensor,
    grad: Tensor,
    group: dict[str, Any],
    generator: torch.Generator,
) -> None:
    """torch.optim.RMSprop's operations in their order; writes into the first three."""
    weight, grad, alpha = join_fp32(upper, lower), grad.float(), group["alpha"]
    if group["weight_decay"] != 0:
        grad = grad.add(weight, alpha=group["weight_decay"])
    average = square_avg.float().mul_(alpha).addcmul_(grad, grad, value=1 - alpha)
    weight.addcdiv_(grad, average.sqrt().add_(group["eps"]), value=-group["lr"])
    new_upper, new_lower = split_fp32(weight)
    upper.copy_(new_upper)
    lower.copy_(new_lower)
    if square_avg.dtype == torch.float32:
        square_avg.copy_(average)
    else:
        square_avg.copy_(round_stochastically(average, generator))
