"""A model that is spread over the processes of a group by FSDP2: each holds a part of every weight.

Each process calls the model as often as the others, because each call gathers the weights layer by
layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray


class Member(NamedTuple):
    """This process as a member of its group.

    Attributes:
        rank: counts from 0.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    def sum(self, numbers: NDArray[np.float64], device: torch.device) -> NDArray[np.float64]:
        """The sum over all processes, each of which gives an array of the same shape."""
        if self.size == 1:
            return numbers
        import torch
        import torch.distributed

        total = torch.from_numpy(numbers).to(device)
        torch.distributed.all_reduce(total)
        summed: NDArray[np.float64] = total.cpu().numpy()
        return summed


ALONE = Member()


def join_group(address: str, member: Member, backend: str) -> None:
    """Wait until all processes of the group are here.

    Args:
        address: host:port of the process of rank 0, where nobody else listens.
        member: this process.
        backend: nccl for GPUs, gloo for CPUs.
    """
    import torch.distributed

    torch.distributed.init_process_group(
        backend, init_method=f"tcp://{address}", rank=member.rank, world_size=member.size
    )


def shard(model: torch.nn.Module, device: torch.device) -> None:
    """Spread a model over the group, in place: layer by layer, and the rest as one part.

    Args:
        model: a model of transformers on the CPU.
        device: where the parts go.
    """
    import torch.distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    layers = set(getattr(model, "_no_split_modules", None) or ())
    for module in list(model.modules()):
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
