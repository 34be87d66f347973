"""Ranks that each have a part of a model's channels, and the tensors that they exchange.

Every rank has the whole residual stream of every sequence. Of a layer it has the weights of some
channels, heads or hidden units, and remembers only their past; of the vocabulary it has some
tokens. (Shoeybi et al. 2019, "Megatron-LM", arXiv:1909.08053.)
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class ChannelRanks(ABC):
    """The ranks among which a model's channels are divided, and this one's place among them.

    Methods that exchange tensors are collective: every rank calls the same ones in the same order,
    with tensors of one shape and dtype.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    @abstractmethod
    def all(self, part: Tensor) -> Tensor:
        """Return every rank's tensor, `[..] -> [size, ..]`."""

    def gather(self, part: Tensor) -> Tensor:
        """Return the channels of all ranks: `[.., C] -> [.., size C]`."""
        return self.all(part).movedim(0, -2).flatten(-2)

    def sum(self, part: Tensor) -> Tensor:
        """Return the sum of every rank's tensor, which it may overwrite. Terms are added in the
        order of ranks, so that the sum of an element does not depend on its place."""
        parts = self.all(part)
        total = parts[0].clone()
        for other in parts[1:]:
            total += other
        return total

    def largest(self, part: Tensor) -> Tensor:
        """Return the largest of every rank's elements, in the shape of `part`, or NaN if one is."""
        return self.all(part).amax(0)  # gloo's own reduction may lose a NaN

    def smallest(self, number: int) -> int:
        """Return the smallest of every rank's numbers."""
        return int(self.all(torch.tensor([number])).min())

    def own(self, count: int) -> slice:
        """Return this rank's part of `count` channels, which the number of ranks divides."""
        part = count // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    def __deepcopy__(self, memo: object) -> "ChannelRanks":
        """Return the same ranks: a model's copy is divided among them too."""
        return self


@dataclass(frozen=True)
class Divided:
    """Way to divide a tensor among ranks: in equal parts along one dim, the last of which zeros
    fill up."""

    dim: int
    groups: int = 1
    """Tensors that lie one after the other along `dim`, such as those of queries, keys and values.
    A rank has its part of each."""

    def shape(self, whole: Sequence[int], num_ranks: int) -> tuple[int, ...]:
        """Return the shape of a rank's part of a tensor."""
        before, after = whole[: self.dim], whole[self.dim + 1 :]
        return (*before, -(-whole[self.dim] // num_ranks), *after)

    def part(self, stored: Any, whole: Sequence[int], ranks: ChannelRanks) -> Tensor:
        """Return a rank's part of a tensor of the shape `whole`.

        stored: The tensor, or a slice of a safetensors file, which reads what it is asked for.
        """
        count = whole[self.dim] // self.groups
        most = -(-count // ranks.size)
        start, stop = (min(count, (ranks.rank + i) * most) for i in (0, 1))
        before, firsts = (slice(None),) * self.dim, [i * count for i in range(self.groups)]
        parts = [stored[(*before, slice(first + start, first + stop))] for first in firsts]
        missing = list(self.shape(whole, ranks.size))
        missing[self.dim] -= len(parts) * (stop - start)
        if missing[self.dim]:
            parts.append(parts[0].new_zeros(missing))
        return torch.cat(parts, self.dim) if len(parts) > 1 else parts[0].contiguous()
