"""Low-rank factors of the matrices by which a finished tile adds to the tile after it.

A filter `f[m]` maps a tile of `h` inputs to the outputs after it by the Hankel matrix
`H[q, i] = f[q + i + 1]`, with `q` counted forwards and `i` backwards from the tile's end. Spectral
filters are integrals of exponentials over decay rates (`stu.filters`), and an exponential has a
Hankel matrix of rank one. The matrices of 24 filters of 16,384 lags therefore share a basis `V` of
about 30 columns, to the last bit of float32 and for any `h` (a matrix of moments has singular
values that decay exponentially, Beckermann and Townsend 2017). So `H = V S V^T` with a small core
`S` for each channel. If `V` covers all later outputs, and not only those of the next tile, then
larger tiles can be computed from it: their basis is a small matrix times the bases of their halves
(nested bases of H2 matrices, Hackbusch and Boerm 2002), and tiles of all sizes together cost little
more than the small ones.

The rank is measured, not assumed, and filters without a low one are not factored. The part of a
channel's matrix that is left out is at most an epsilon of the pages' dtype of the whole, in the
Frobenius norm. That is about the rounding error of float32 filters, and rounding errors have no low
rank; for the same reason taps should be summed in float64. All of this is computed in float64.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST_SAMPLE = 64
"""Random vectors with which the search for a basis begins; doubled until they are enough."""
LARGEST_SAMPLE = 128
"""Most random vectors: a larger basis is not worth factoring, and might not fit in memory."""
SPARE = 16
"""Random vectors beyond the rank that is looked for."""
CHANNELS_AT_ONCE = 1024


class NotLowRank(Exception):
    """The filters, or their matrices, have no common basis of few columns."""


@dataclass(frozen=True)
class FilterBasis:
    """A basis of filters: each filter is a column of `taps @ weights`, within the tolerance."""

    taps: Tensor
    """Basis filters `[N, K]`, float64 and orthogonal, scaled by their shares in the filters."""
    weights: Tensor
    """`[K, F]` float64."""
    tolerance: float
    """Largest error of a channel, relative to its norm."""


@dataclass(frozen=True)
class TileFactors:
    """Factors of the matrices of one tile size.

    Their basis `V [h, p]` has a row for each input, oldest first.
    """

    transfer: Tensor
    """`V` of the smallest tiles; for others, the matrix `[2 p of a half, p]` that makes `V` from
    the bases of both halves, older half first. Its columns and those of `V` are orthonormal."""
    cores: Tensor
    """`[K, r, p]`: maps, one for each basis filter, from `V^T inputs` to coordinates of outputs."""
    outwards: Tensor | None
    """`[num_outputs, r]`: maps coordinates to outputs, if the taps end before the next tile does.
    None: that map is `V` with its rows reversed."""


def filter_basis(filters: Tensor, dtype: torch.dtype) -> FilterBasis:
    """Return the smallest basis of `filters [N, F]`.

    dtype: Dtype of the pages that the factors are used on. Raises NotLowRank.
    """
    # Spectral filters are known to 1e-13 of the largest: float64 asks for no more than they have.
    tolerance = max(torch.finfo(dtype).eps, 1e-11)
    largest = filters.abs().amax(0)
    scale = torch.where(largest > 0, largest, 1.0).double()

    def blocks() -> Iterator[Tensor]:
        """Yield the filters, in float64 and scaled to a largest tap of 1, a few at a time."""
        for start in range(0, filters.shape[1], CHANNELS_AT_ONCE):
            part = slice(start, start + CHANNELS_AT_ONCE)
            yield filters[:, part].double() / scale[part]

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
    """Yield the factors for tiles of `smallest`, `2 smallest`, `4 smallest` .. inputs, as long as
    taps reach beyond the tile. Raises NotLowRank.
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
        # As the older and the newer half of the next tile: outputs begin at that tile's end.
        num_later = max(0, num_taps - 2 * length)
        after = torch.cat([after[..., length:], after[..., :num_later]])
        length *= 2


def nested(basis: Tensor, transfer: Tensor) -> Tensor:
    """Return the basis `[2 h, p]` of tiles from the basis `[h, p of a half]` of their halves."""
    return torch.cat([basis @ half for half in transfer.chunk(2)])


def _thin_factors(matrices: Tensor, filters: FilterBasis) -> tuple[Tensor, Tensor]:
    """Factor `matrices [rows, K, columns]`, one for each basis filter, into a shared `U [rows, r]`
    with orthonormal columns and coordinates `[r, K, columns]`."""
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
        return torch.stack([((product @ weights) * weights).sum(0) for product in products])

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
    """Factor a matrix into `U [rows, r] @ V [r, columns]`, where U has orthonormal columns.

    The basis comes from products with random vectors (Halko, Martinsson, Tropp 2011, section 5.1).

    Args:
        sample: Returns the matrix times the given number of random vectors, as columns.
        coordinates: Returns the transpose of a basis times the matrix.
        shares: Returns the squared share of each coordinate in each channel, `[r, F]`, from
            coordinates `[r, columns]`.
        shape: Shape of the matrix.
        tolerance: Largest error of a channel, relative to its norm.
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
    """Factor `matrix` into `U [rows, r] @ V [r, columns]` of the least rank that keeps the error of
    every channel within the tolerance."""
    # By way of the small triangle: the long singular vectors would cost far more.
    left = torch.linalg.svd(torch.linalg.qr(matrix.T, mode="r").R.T).U
    within = left.T @ matrix
    missing = shares(within).flip(0).cumsum(0).flip(0)  # without this coordinate and the rest
    rank = max(1, int((missing > tolerance**2 * missing[0]).any(1).sum()))
    return left[:, :rank], within[:rank]


def _normal(rows: int, columns: int, random: torch.Generator, device: torch.device) -> Tensor:
    return torch.randn(rows, columns, generator=random, dtype=torch.float64).to(device)
