"""Product of thin matrices for the values that a finished tile adds to the tile after it.

A filter `f[m]` takes a tile of `h` inputs to the outputs after it by the Hankel matrix
`H[q, i] = f[q + i + 1]`, `q` counted forwards and `i` backwards from the boundary between the two.
Spectral filters are integrals of exponentials over decay rates (`stu.filters`), and an exponential
has a Hankel matrix of rank one: the matrices of 24 filters of 16,384 lags share a basis `V` of some
30 columns to the last bit of float32, whatever `h` (a matrix of moments has singular values that
decay exponentially, Beckermann and Townsend 2017). So `H = V S V^T` with a small core `S` for each
channel. Where `V` is that of all outputs after the tile, however late, it is also what a larger
tile needs to know of this one, and the basis of the larger is a small matrix times those of its
halves (the nested bases of H2 matrices, Hackbusch and Boerm 2002): tiles of all sizes together cost
little more than the small ones.

The rank is found, not assumed; filters that have none to speak of are not factored. What is left
out of a channel's matrix is at most an epsilon of the pages' dtype of it, in the Frobenius norm:
about what float32 filters leave uncertain, and any less would be their noise, which has no low
rank. For the same reason taps should be summed in float64. All of this is computed in float64.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST_SAMPLE = 64
"""Random vectors that a space is made of at first; twice as many until they are enough."""
LARGEST_SAMPLE = 128
"""A space that takes more is not worth factoring, and might not fit in memory."""
SPARE = 16
"""Random vectors beyond the rank that they are to find."""
CHANNELS_AT_ONCE = 1024


class NotLowRank(Exception):
    """The filters, or their matrices, have no common basis of few columns."""


@dataclass(frozen=True)
class FilterBasis:
    """Filters `taps @ weights`, each within the tolerance."""

    taps: Tensor
    """`[N, K]` float64, orthogonal, each as large as what the filters have of it."""
    weights: Tensor
    """`[K, F]` float64."""
    tolerance: float
    """How much of a channel may be left out."""


@dataclass(frozen=True)
class TileFactors:
    """Factors of the matrices of one tile size, whose basis `V [h, p]` has a row for each input,
    the oldest first."""

    transfer: Tensor
    """For the smallest tiles `V` itself; for others from the bases of both halves, the older first:
    `[2 p of a half, p]`. Its columns are orthonormal, and so are those of `V`."""
    cores: Tensor
    """`[K, r, p]` of each filter of the basis: takes what `V^T` makes of the inputs to coordinates
    of the outputs."""
    outwards: Tensor | None
    """`[num_outputs, r]` from those to the outputs, where there are fewer than inputs, as no
    sequence is longer than there are taps. None: `V`, its last row first."""


def filter_basis(filters: Tensor, dtype: torch.dtype) -> FilterBasis:
    """As few filters as have all of `filters [N, F]` in their span, each weighed by its share.

    dtype: of the pages they are to be used on. Raises NotLowRank.
    """
    # Spectral filters are known to 1e-13 of the largest: float64 asks for no more than they have.
    tolerance = max(torch.finfo(dtype).eps, 1e-11)
    largest = filters.abs().amax(0)
    scale = torch.where(largest > 0, largest, 1.0).double()

    def blocks() -> Iterator[Tensor]:
        """The filters, of which the largest taps are 1, in float64: few at once, they are many."""
        for start in range(0, filters.shape[1], CHANNELS_AT_ONCE):
            some = slice(start, start + CHANNELS_AT_ONCE)
            yield filters[:, some].double() / scale[some]

    def sample(size: int, random: torch.Generator) -> Tensor:
        mixed = filters.new_zeros(len(filters), size, dtype=torch.float64)
        for block in blocks():
            mixed += block @ _normal(block.shape[1], size, random, block.device)
        return mixed

    def coordinates(basis: Tensor) -> Tensor:
        return torch.cat([basis.T @ block for block in blocks()], dim=1)

    taps, weights = _thin_svd(sample, coordinates, torch.square, filters.shape, tolerance)
    sizes = torch.linalg.vector_norm(weights, dim=1, keepdim=True)
    sizes = torch.where(sizes > 0, sizes, 1.0)
    return FilterBasis(taps * sizes.T, weights / sizes * scale, tolerance)


def tile_factors(filters: FilterBasis, smallest: int) -> Iterator[TileFactors]:
    """For tiles of `smallest`, `2 smallest`, `4 smallest` .. inputs, while there are taps that
    reach beyond. Raises NotLowRank.
    """
    taps, num_taps, length = filters.taps.T, len(filters.taps), smallest
    # What each input, later each coordinate, adds to every later output: [inputs, K, outputs].
    after = torch.stack([taps[:, length - i : num_taps - i] for i in range(length)])
    basis = None
    while num_taps > length:
        transfer, after = _thin_factors(after, filters)
        basis = transfer if basis is None else nested(basis, transfer)
        if num_taps >= 2 * length:
            outwards, cores = None, after[..., :length] @ basis.flip(0)  # [p, K, r]
        else:
            outwards, within = _thin_factors(after.permute(2, 1, 0), filters)
            cores = within.permute(2, 1, 0)
        yield TileFactors(transfer, cores.permute(1, 2, 0).contiguous(), outwards)
        # Outputs begin where the tile does that this one is the newer half of.
        num_later = max(0, num_taps - 2 * length)
        after = torch.cat([after[..., length:], after[..., :num_later]])
        length *= 2


def nested(basis: Tensor, transfer: Tensor) -> Tensor:
    """The basis `[2 h, p]` of tiles from that of their halves, `[h, p of a half]`."""
    return torch.cat([basis @ half for half in transfer.chunk(2)])


def _thin_factors(matrices: Tensor, filters: FilterBasis) -> tuple[Tensor, Tensor]:
    """`[rows, K, columns]`, a matrix for each filter of the basis, as `U [rows, r]`, of orthonormal
    columns that all share, times `[r, K, columns]`."""
    num_rows, num_filters, num_columns = matrices.shape
    flat = matrices.reshape(num_rows, -1)

    def sample(size: int, random: torch.Generator) -> Tensor:
        return flat @ _normal(flat.shape[1], size, random, flat.device)

    def coordinates(basis: Tensor) -> Tensor:
        return basis.T @ flat

    def shares(within: Tensor) -> Tensor:
        """Return the squared share of each coordinate in each channel, a sum of basis filters."""
        factors = within.view(len(within), num_filters, num_columns)
        products, weights = factors @ factors.transpose(1, 2), filters.weights  # [r, K, K], [K, F]
        return torch.stack([((one @ weights) * weights).sum(0) for one in products])

    if num_rows <= LARGEST_SAMPLE:  # twice as many coordinates as a half has, at most
        basis, within = _truncated(flat, shares, filters.tolerance)
    else:
        basis, within = _thin_svd(sample, coordinates, shares, flat.shape, filters.tolerance)
    return basis, within.view(-1, num_filters, num_columns)


def _thin_svd(
    sample: Callable[[int, torch.Generator], Tensor],
    coordinates: Callable[[Tensor], Tensor],
    shares: Callable[[Tensor], Tensor],
    shape: Sequence[int],
    tolerance: float,
) -> tuple[Tensor, Tensor]:
    """A matrix of `shape` as `U [rows, r] @ V [r, columns]`, U with orthonormal columns, from its
    products with random vectors (Halko, Martinsson, Tropp 2011, section 5.1).

    sample: so many of the products, as columns. coordinates: a basis, transposed, times the matrix.
    shares: from coordinates `[r, columns]` to the squares of what each channel has of each, `[r,
    F]`.
    """
    random = torch.Generator().manual_seed(0)  # the same factors in every run
    size = SMALLEST_SAMPLE
    while size <= LARGEST_SAMPLE:
        size = min(size, *shape)
        basis = torch.linalg.qr(sample(size, random)).Q
        left, within = _truncated(coordinates(basis), shares, tolerance)
        if len(within) <= size - SPARE or size == min(shape):
            return basis @ left, within
        size *= 2
    raise NotLowRank(f"more than {LARGEST_SAMPLE - SPARE} columns are needed")


def _truncated(
    matrix: Tensor, shares: Callable[[Tensor], Tensor], tolerance: float
) -> tuple[Tensor, Tensor]:
    """As `U [rows, r] @ V [r, columns]`; the rank is the least for which no channel lacks more than
    the tolerance."""
    # By way of the small triangle: the long singular vectors would cost far more.
    left = torch.linalg.svd(torch.linalg.qr(matrix.T, mode="r").R.T).U
    within = left.T @ matrix
    missing = shares(within).flip(0).cumsum(0).flip(0)  # without this coordinate and the rest
    rank = max(1, int((missing > tolerance**2 * missing[0]).any(1).sum()))
    return left[:, :rank], within[:rank]


def _normal(rows: int, columns: int, random: torch.Generator, device: torch.device) -> Tensor:
    return torch.randn(rows, columns, generator=random, dtype=torch.float64).to(device)
