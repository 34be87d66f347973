"""Context parallelism: neighbouring ranks divide each sequence, and every rank has a slice.

All ranks compute as many tokens, so means over the tokens of a sequence are means over ranks, of
losses and gradients alike: strategies average over all ranks and need not know of the division.
"""

from collections.abc import Sequence
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from stu.sequences.base import WHOLE, Sequences
from stu.sequences.slices import SequenceSlices
from stu.slices.ranks import SliceRanks


class ContextRanks(SliceRanks):
    """Ranks of a process group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(dist.get_rank(group), dist.get_world_size(group))
        self._group = group

    def swap(self, parts: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        dtype = parts[0].dtype
        # As bytes, since gloo does not know all dtypes.
        sent = [part.contiguous().view(-1).view(torch.uint8) for part in parts]
        sizes = [prod(shape) * dtype.itemsize for shape in shapes]
        received = sent[0].new_empty(sum(sizes))
        dist.all_to_all_single(
            received, torch.cat(sent), sizes, [part.numel() for part in sent], self._group
        )
        found = zip(torch.split(received, sizes), shapes, strict=True)
        return [part.view(dtype).view(*shape) for part, shape in found]


def divide_sequences(context: int, seq_len: int) -> tuple[Sequences, slice]:
    """Divide each sequence over `context` neighbouring ranks; return this one's slices, and their
    positions.

    Collective, once the process group has been initialised.
    """
    if context == 1:
        return WHOLE, slice(0, seq_len)
    group, _ = dist.new_subgroups(context)  # type: ignore[no-untyped-call]
    ranks = ContextRanks(group)
    return SequenceSlices(ranks), ranks.own(seq_len)
