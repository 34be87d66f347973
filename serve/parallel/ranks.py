"""Exchange of tensors among the ranks of a group through torch.distributed."""

import os
import sys
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from stu.common.errors import UserError
from stu.slices.channels import ChannelRanks

_all_gather: Callable[[Tensor, Tensor], object] = (
    dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
)
"""torch 2.13 renames it."""
MEETING_SECONDS = 600.0
"""Time that ranks wait for one another while they start."""


class DistributedRanks(ChannelRanks):
    """A rank of torch's process group: NCCL on CUDA, where a captured step includes what it
    exchanges, and gloo on the CPU.

    Args:
        rank: Number of this rank.
        size: Number of ranks.
        device: This rank's device.
        in_order: Add in the order of ranks, so that a sum does not depend on the place of its
            elements. Slower.
    """

    def __init__(self, rank: int, size: int, device: torch.device, in_order: bool) -> None:
        super().__init__(rank, size)
        self._device, self._in_order = device, in_order

    def all(self, part: Tensor) -> Tensor:
        parts = part.new_empty(self.size, *part.shape)
        _all_gather(parts.view(-1), part.contiguous().view(-1))
        return parts

    def sum(self, part: Tensor) -> Tensor:
        if self._in_order:
            return super().sum(part)
        summed = part.contiguous()
        dist.all_reduce(summed)
        return summed

    def smallest(self, number: int) -> int:
        smallest = torch.tensor([number], device=self._device)
        dist.all_reduce(smallest, dist.ReduceOp.MIN)
        return int(smallest)


def meeting_place(size: int) -> TCPStore:
    """Return a place, on this host alone, where `size` ranks find one another."""
    if dist.is_initialized():
        message = "this process is in a process group of torch.distributed already"
        raise UserError("tensor_parallel", size, "1 here", message)
    timeout = timedelta(seconds=MEETING_SECONDS)
    return TCPStore("127.0.0.1", 0, size, True, timeout, wait_for_workers=False)


def join(
    place: TCPStore | int, rank: int, size: int, device: str, in_order: bool
) -> DistributedRanks:
    """Meet the other ranks and return this one.

    place: The first rank's meeting place; for other ranks, the number of its port.
    """
    timeout = timedelta(seconds=MEETING_SECONDS)
    own = torch.device(device)
    if isinstance(place, int):
        place = TCPStore("127.0.0.1", place, size, False, timeout)
    if own.type == "cuda":
        torch.cuda.set_device(own)
        dist.init_process_group("nccl", store=place, rank=rank, world_size=size, device_id=own)
    else:
        # Ranks of one host need not know its name, which may resolve to nothing.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
        dist.init_process_group("gloo", store=place, rank=rank, world_size=size, timeout=timeout)
    return DistributedRanks(rank, size, own, in_order)


def leave() -> None:
    """Leave the process group, if this process is in one."""
    if dist.is_initialized() and dist.get_backend() == "nccl":
        release()
    elif dist.is_initialized():
        dist.destroy_process_group()


def release() -> None:
    """Let this process no longer wait for other ranks on its GPU. On a CPU nothing waits for a rank
    that has ended."""
    if dist.is_initialized() and dist.get_backend() == "nccl":
        dist.distributed_c10d._abort_process_group()
