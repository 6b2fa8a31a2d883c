"""fp32 weights stored in two halves, so that a model with 8B parameters trains on one 80 GB GPU.

The upper half of a weight is a bf16 parameter of the model. The lower half is 16 bits in the state
of the optimizer. A step joins both halves, computes the ordinary fp32 update and splits the result
again. So the update has fp32 precision, and forward and backward need only the memory of bf16.
The optimizer clips gradients itself, because torch would compute their norm and scale them in bf16.

Bytes for each parameter during training in bf16:

                       fp32 and autocast   split
    weight                     4             2
    bf16 copy                  2             –    autocast keeps it for the backward pass
    lower half                 –             2
    gradient                   4             2
    squared gradient           4             2
    sum                       14             8    with 8.03e9 parameters: 112 GB, 64 GB

The gradient of one micro-batch is the same in both columns, because autocast multiplies in bf16
too. But with split weights the sum over micro-batches is bf16 as well. For N micro-batches in a
step this adds an error of about √N/1000 of the sum. Fewer and larger micro-batches reduce it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# Elements that one update handles at a time. Each needs about 30 bytes of temporary memory: 0.5 GB
# in total.
SLICE = 2**24

_NAN_BITS = 0x7FC00000


def split_fp32(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Split fp32 weights into two halves. `join_fp32` restores the same bits.

    The upper half is the nearest bf16 number. Special cases:

    - A tie rounds away from zero. If it rounded towards zero, the lower half would be +2^15, which
      int16 cannot hold.
    - A number more than half a step above the largest bf16 number (3.39e38) has the upper half
      ±inf. `join_fp32` still restores it.
    - ±inf stays ±inf.
    - Every NaN becomes the same NaN. Otherwise the upper half of some NaNs would be infinite or, by
      overflow, −0.

    Args:
        weight: float32, any shape.

    Returns:
        The upper half (bfloat16) and the lower half (int16), both of the same shape.
        fp32 bits = (upper bits << 16) + lower.
    """
    bits = torch.where(weight.isnan(), _NAN_BITS, weight.view(torch.int32))
    upper = (bits + 0x8000) >> 16
    lower = bits - (upper << 16)
    return upper.to(torch.int16).view(torch.bfloat16), lower.to(torch.int16)


def join_fp32(upper: Tensor, lower: Tensor) -> Tensor:
    """Join the halves of `split_fp32`.

    Args:
        upper: bfloat16, any shape.
        lower: int16, the same shape.

    Returns:
        float32, the same shape.
    """
    bits = upper.view(torch.int16).to(torch.int32) << 16
    return bits.add_(lower).view(torch.float32)


def round_stochastically(value: Tensor, generator: torch.Generator) -> Tensor:
    """Round to one of the two nearest bf16 numbers at random, so that the expected value is exact.

    ±inf stays ±inf.

    Args:
        value: float32, any shape.
        generator: gives the random numbers; on the device of `value`.

    Returns:
        bfloat16, the same shape.
    """
    noise = torch.randint(
        2**16, value.shape, dtype=torch.int32, device=value.device, generator=generator
    )
    bits = (value.view(torch.int32) + noise) >> 16
    return bits.to(torch.int16).view(torch.bfloat16)


def round_weights(model: nn.Module) -> None:
    """Round the parameters of an fp32 model to bf16, in place.

    The result equals the bf16 parameters that `SplitRMSprop` trains with. Buffers stay fp32, as in
    training.
    """
    for parameter in model.parameters():
        parameter.data = split_fp32(parameter.data)[0]


def restore_fp32(optimizer: torch.optim.Optimizer) -> None:
    """Join the parameters of a `SplitRMSprop` to fp32 after training, and empty its state.

    Args:
        optimizer: a `SplitRMSprop`, or accelerate's wrapper of one.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            lower = optimizer.state.pop(parameter)["lower"]
            parameter.data = join_fp32(parameter.data, lower)


class SplitRMSprop(torch.optim.Optimizer):
    """torch.optim.RMSprop for split weights, without momentum and not centred.

    It converts the given fp32 parameters to bf16 in place. `restore_fp32` undoes this. With an fp32
    state, the joined weights equal those of torch.optim.RMSprop on fp32 weights, bit for bit.

    A bf16 state is rounded stochastically. One step changes the mean of squared gradients v by
    0.01 (g² − v), but the nearest bf16 number is up to 0.4 % away. With rounding to nearest, v
    would not change if g² is within 20 to 40 % of v. The random numbers depend only on the number
    of steps, so a resumed run repeats them. The rounding adds a standard deviation of 1 to 2 % to
    v, and half of that to the step size.

    Args:
        params: float32 parameters, or parameter groups.
        lr, alpha, eps, weight_decay: as in torch.optim.RMSprop.
        state_dtype: dtype of v: bfloat16 or float32.
        max_grad_norm: the longest gradient, over all parameters; longer ones are scaled down, in
            fp32. 0 means no limit. Set the `max_grad_norm` of TrainingArguments to 0 then.

    Raises:
        ValueError: a parameter is not fp32, `max_grad_norm` is negative or NaN, or there are
            several processes.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        state_dtype: torch.dtype = torch.bfloat16,
        max_grad_norm: float = 0.0,
    ) -> None:
        if not max_grad_norm >= 0:
            raise ValueError(f"max_grad_norm is {max_grad_norm}; it must be at least 0")
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise ValueError("SplitRMSprop is untested in several processes; start only one")
        self.max_grad_norm = max_grad_norm
        defaults = {"lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay, "steps": 0}
        super().__init__(params, defaults)
        for parameter in self._parameters():
            if parameter.dtype != torch.float32:
                raise ValueError(
                    f"SplitRMSprop splits fp32 parameters, not {parameter.dtype}; "
                    "load the model in float32"
                )
        for parameter in self._parameters():
            parameter.data, lower = split_fp32(parameter.data.contiguous())
            # Allocate the whole state now, so that a lack of memory shows before the first step.
            self.state[parameter] = {
                "lower": lower,
                "square_avg": torch.zeros_like(lower, dtype=state_dtype),
            }

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Args:
            closure: computes the loss and the gradients; usually None.

        Returns:
            The loss of the closure, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale = self._scale()
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
                    _update(upper, lower, square_avg, grad.float() * scale, group, generator)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy a state that `state_dict` returned into the existing tensors.

        torch's own method would cast the state to the dtype of the parameters. This would destroy
        the lower halves.

        Raises:
            ValueError: the state lacks a tensor, or a tensor has another dtype or shape.
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

    def _scale(self) -> Tensor | float:
        """What the gradients are multiplied with, as in `torch.nn.utils.clip_grad_norm_`."""
        grads = [p.grad for p in self._parameters() if p.grad is not None]
        if self.max_grad_norm == 0 or not grads:
            return 1.0
        norms = [torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in grads]
        total = torch.linalg.vector_norm(torch.stack(norms))
        return torch.clamp(self.max_grad_norm / (total + 1e-6), max=1.0)

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
    """Update the first three tensors in place.

    The operations and their order are those of torch.optim.RMSprop, so that the results are equal
    bit for bit. The gradient is fp32.
    """
    weight, alpha = join_fp32(upper, lower), group["alpha"]
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
