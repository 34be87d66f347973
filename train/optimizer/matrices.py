"""Matrices that an optimizer transforms as a whole, while each rank holds only parts of them.

Each matrix is dealt to one rank, so that no rank repeats another's work. If all ranks hold copies
(DDP, ZeRO's stage 0), the rank of a matrix broadcasts the result. If they hold parts (ZeRO's
stages 1 to 3, FSDP2), they send them to that rank, and get back their parts of the result: of a
matrix of n elements, n elements are sent there and n back, over all ranks. Matrices are taken in
buckets, so that buffers stay small.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

BUCKET_ELEMENTS = 2**25
"""Elements of the matrices in a bucket for each rank, if one matrix is not larger."""

Transform = Callable[[Tensor], Tensor]
"""Function of a batch of matrices `[B, rows, columns]` that returns one of the same shape."""


@dataclass(frozen=True)
class Part:
    """The consecutive elements of a weight that this rank updates. Lower ranks have earlier ones,
    unless all ranks have the whole weight."""

    held: Tensor
    """Tensor that the optimizer updates: the weight, or one with parts of several weights."""
    offset: int
    """First element in the flattened `held`, on this rank."""
    size: int
    """Number of elements; may be 0."""
    shape: tuple[int, ...]
    """Shape of the whole weight."""
    count: int
    """Number of matrices of which the weight is a stack along its first dim."""


@dataclass(frozen=True)
class Matrix:
    """One of the matrices of a weight."""

    weight: int
    """Number of the weight."""
    start: int
    """First element in the flattened weight."""
    rows: int
    columns: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.rows * self.columns


@dataclass(frozen=True)
class Piece:
    """Elements of a matrix that this rank updates."""

    held: Tensor
    elements: slice
    """Place in the flattened `held`, on this rank."""
    matrix: Matrix


class MatrixExchange:
    """Division of the matrices of some weights among the ranks; its construction is collective.

    Args:
        parts: Parts of all weights on this rank, in the same order on all ranks.
        device: Device on which matrices are transformed and exchanged.
        group: Process group of the ranks that hold the weights.
    """

    def __init__(
        self, parts: Sequence[Part], device: torch.device, group: dist.ProcessGroup | None
    ) -> None:
        self._parts, self._device, self._group = parts, device, group
        is_alone = not dist.is_initialized()
        self._rank, self._num_ranks = 0, 1
        if not is_alone:
            self._rank, self._num_ranks = dist.get_rank(group), dist.get_world_size(group)
        own = torch.tensor([part.size for part in parts], device=device)
        sizes = [torch.empty_like(own) for _ in range(self._num_ranks)]
        if is_alone:
            sizes = [own]
        else:
            dist.all_gather(sizes, own, group)
        self._set_ranges([rank_sizes.tolist() for rank_sizes in sizes])
        matrices = [
            matrix for number, part in enumerate(parts) for matrix in _matrices(number, part)
        ]
        matrices.sort(key=lambda matrix: (-matrix.size, matrix.rows))
        self._buckets: list[list[Matrix]] = []
        room = 0
        for first in range(0, len(matrices), self._num_ranks):
            dealt = matrices[first : first + self._num_ranks]  # one to each rank
            taken = sum(matrix.size for matrix in dealt)
            if taken > room:
                self._buckets.append([])
                room = BUCKET_ELEMENTS * self._num_ranks
            room -= taken
            self._buckets[-1] += dealt

    def transformed(
        self, read: Callable[[Piece], Tensor], transform: Transform, dtype: torch.dtype
    ) -> Iterator[tuple[Piece, Tensor]]:
        """Yield all pieces that this rank updates, each with its elements of the transformed
        matrix; collective.

        Args:
            read: Function that returns the elements of a piece before the transform.
            transform: Function of batches of whole matrices.
            dtype: Dtype in which matrices are transformed and sent.
        """
        for bucket in self._buckets:
            dealt = [bucket[rank :: self._num_ranks] for rank in range(self._num_ranks)]
            exchange = self._exchange_copies if self._are_copies else self._exchange_parts
            yield from exchange(dealt, read, transform, dtype)

    def _exchange_copies(
        self,
        dealt: list[list[Matrix]],
        read: Callable[[Piece], Tensor],
        transform: Transform,
        dtype: torch.dtype,
    ) -> Iterator[tuple[Piece, Tensor]]:
        own = [read(self._piece(self._rank, matrix)) for matrix in dealt[self._rank]]
        own = [values.to(self._device, dtype) for values in own]
        results = _transformed(dealt[self._rank], own, transform)
        for owner, matrices in enumerate(dealt):
            if not matrices:
                continue
            sizes = [matrix.size for matrix in matrices]
            if owner == self._rank:
                buffer = torch.cat(results)
            else:
                buffer = torch.empty(sum(sizes), dtype=dtype, device=self._device)
            if self._num_ranks > 1:
                source = owner if self._group is None else dist.get_global_rank(self._group, owner)
                dist.broadcast(buffer, source, self._group)
            for matrix, result in zip(matrices, buffer.split_with_sizes(sizes), strict=True):
                yield self._piece(self._rank, matrix), result

    def _exchange_parts(
        self,
        dealt: list[list[Matrix]],
        read: Callable[[Piece], Tensor],
        transform: Transform,
        dtype: torch.dtype,
    ) -> Iterator[tuple[Piece, Tensor]]:
        own = dealt[self._rank]
        # By rank: what it gets of what is here, and what it has of this rank's matrices.
        outward = [[self._overlap(self._rank, matrix) for matrix in owned] for owned in dealt]
        inward = [
            [self._overlap(rank, matrix) for matrix in own] for rank in range(self._num_ranks)
        ]
        sent_sizes = [sum(map(len, ranges)) for ranges in outward]
        received_sizes = [sum(map(len, ranges)) for ranges in inward]
        pieces = [self._piece(self._rank, matrix) for owned in dealt for matrix in owned]
        sent = torch.empty(sum(sent_sizes), dtype=dtype, device=self._device)
        places = sent.split_with_sizes([len(found) for ranges in outward for found in ranges])
        for piece, place in zip(pieces, places, strict=True):
            place.copy_(read(piece))
        received = torch.empty(sum(received_sizes), dtype=dtype, device=self._device)
        dist.all_to_all_single(received, sent, received_sizes, sent_sizes, self._group)
        # [rank][matrix] -> [matrix][rank]: lower ranks have earlier elements.
        by_rank = iter(
            received.split_with_sizes([len(found) for ranges in inward for found in ranges])
        )
        arrived = [[next(by_rank) for _ in own] for _ in range(self._num_ranks)]
        by_matrix = list(zip(*arrived, strict=True))
        results = _transformed(own, [torch.cat(found) for found in by_matrix], transform)
        for result, found in zip(results, by_matrix, strict=True):
            for place, values in zip(
                found, result.split_with_sizes([len(part) for part in found]), strict=True
            ):
                place.copy_(values)
        dist.all_to_all_single(sent, received, sent_sizes, received_sizes, self._group)
        yield from zip(pieces, places, strict=True)

    def _set_ranges(self, sizes: list[list[int]]) -> None:
        """Find each rank's range of each weight from the sizes of parts, `[rank][weight]`."""
        whole = [prod(part.shape) for part in self._parts]
        self._are_copies = all(rank_sizes == whole for rank_sizes in sizes)
        if self._are_copies:
            self._ranges = [[range(size) for size in whole] for _ in sizes]
            return
        self._ranges = [[] for _ in sizes]
        for number, size in enumerate(whole):
            stops = list(accumulate(rank_sizes[number] for rank_sizes in sizes))
            assert stops[-1] == size, "parts of a weight are missing or overlap"
            for ranges, start, stop in zip(self._ranges, [0, *stops], stops, strict=False):
                ranges.append(range(start, stop))

    def _overlap(self, rank: int, matrix: Matrix) -> range:
        """Return which elements of a matrix's weight, of those of the matrix, a rank has."""
        held = self._ranges[rank][matrix.weight]
        first = min(max(held.start, matrix.start), matrix.start + matrix.size)
        return range(first, max(first, min(held.stop, matrix.start + matrix.size)))

    def _piece(self, rank: int, matrix: Matrix) -> Piece:
        part, found = self._parts[matrix.weight], self._overlap(rank, matrix)
        first = part.offset + found.start - self._ranges[rank][matrix.weight].start
        return Piece(part.held, slice(first, first + len(found)), matrix)


def flat(tensor: Tensor) -> Tensor:
    """Return a view `[n]` of the elements of a contiguous tensor that are on this rank."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.detach().view(-1)


def _matrices(number: int, part: Part) -> Iterator[Matrix]:
    columns = part.shape[-1]
    rows = prod(part.shape) // (part.count * columns)
    for place in range(part.count):
        yield Matrix(number, place * rows * columns, rows, columns)


def _transformed(
    matrices: Sequence[Matrix], values: Sequence[Tensor], transform: Transform
) -> list[Tensor]:
    """Transform flattened matrices, those of one shape at once. They come with the largest first,
    so those of one shape follow each other."""
    results: list[Tensor] = []
    pairs = zip(matrices, values, strict=True)
    for (rows, columns), alike in groupby(pairs, key=lambda pair: (pair[0].rows, pair[0].columns)):
        batch = torch.stack([found.view(rows, columns) for _, found in alike])
        results += transform(batch).reshape(len(batch), -1).unbind()
    return results
