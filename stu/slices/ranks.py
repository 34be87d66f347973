"""The exchange of tensors among ranks that each have a slice of every sequence.

Rank `i` of `n` has the positions `i S` to `(i + 1) S - 1` of sequences of `n S` tokens. Everything
is built on one collective, in which each rank sends a tensor to each other; its gradient sends
gradients the other way.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class SliceRanks(ABC):
    """The ranks among which sequences are divided, and this one's place among them."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.kept: dict[Hashable, Any] = {}
        """Tables that mixers compute once, by keys of their own."""
        # Not a decorator: this imports the compiler, which takes a second.
        self.uncompiled: Callable[..., Any] = torch.compiler.disable(_call)  # type: ignore[no-untyped-call]
        """Function that calls another one, with its arguments, outside of what torch.compile
        compiles."""

    @abstractmethod
    def swap(self, parts: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Send part i to rank i, and return what rank i has sent here, in the i-th shape.

        Collective, without gradients. Parts are of one dtype; they and what is received may be
        empty.
        """

    def own(self, length: int) -> slice:
        """Return the positions of this rank's slice of sequences of `length` tokens."""
        part = length // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    def channels(self, count: int, rank: int | None = None) -> slice:
        """Return the share of `count` channels of a rank, or of this one, where channels are
        divided instead of positions."""
        rank = self.rank if rank is None else rank
        return slice(rank * count // self.size, (rank + 1) * count // self.size)


def exchange(
    ranks: SliceRanks, parts: Sequence[Tensor], shapes: Sequence[Sequence[int]]
) -> tuple[Tensor, ...]:
    """Exchange tensors as `SliceRanks.swap` does, with gradients.

    The gradients are exchanged in the backward pass, which must reach this call on every rank: let
    the results be part of each rank's loss, even if they are empty.
    """
    received: tuple[Tensor, ...] = ranks.uncompiled(_Exchange.apply, ranks, shapes, *parts)
    return received


def with_earlier(ranks: SliceRanks, x: Tensor, count: int) -> Tensor:
    """Put up to `count` earlier positions, of as many ranks as they reach, before the own ones:
    `[B, S, ..] -> [B, earlier + S, ..]`. There are fewer where the sequence begins."""
    length = x.shape[1]

    def num_sent(sender: int, receiver: int) -> int:
        return max(0, min(length, count - (receiver - sender - 1) * length))

    parts, shapes = [], []
    for other in range(ranks.size):
        sent = num_sent(ranks.rank, other) if other > ranks.rank else 0
        parts.append(x[:, length - sent :])
        due = num_sent(other, ranks.rank) if other < ranks.rank else 0
        shapes.append((x.shape[0], due, *x.shape[2:]))
    received = exchange(ranks, parts, shapes)
    return torch.cat([*received, x], dim=1)  # those of later ranks are empty


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ranks: SliceRanks, shapes: Sequence[Sequence[int]], *parts: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.ranks, ctx.shapes = ranks, [part.shape for part in parts]
        return tuple(ranks.swap(parts, shapes))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return (None, None, *ctx.ranks.swap(grads, ctx.shapes))


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)
