"""What a finished tile adds to the tile after it, as a product of thin matrices.

A filter `f[m]` takes a tile of `h` inputs to the outputs after it by the Hankel matrix
`H[q, i] = f[q + i + 1]`, `q` counted forwards and `i` backwards from the boundary between the two.
Spectral filters are integrals of exponentials over decay rates (`stu.filters`), and an exponential
has a Hankel matrix of rank one: the matrices of 24 filters of 16,384 lags share a basis `U` of some
30 columns to the last bit of float32, whatever `h` (a matrix of moments has singular values that
decay exponentially, Beckermann and Townsend 2017). So `H = U S V^T` with a small core `S` for each
channel: two matrix products in place of the transforms of an FFT, with little work space. The rank
is found, not assumed; filters that have none to speak of are not factored. All of this is computed
in float64.

What is left out of a channel's matrix is at most an epsilon of the pages' dtype of it, in the
Frobenius norm: about what float32 filters leave uncertain, and any less would be their noise, which
has no low rank. For the same reason taps should be summed in float64.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stu.convolution import fast_fft_length

SMALLEST_SAMPLE = 64
"""Random vectors that a space is made of at first; twice as many until they are enough."""
LARGEST_SAMPLE = 256
"""A space that takes more is not worth factoring, and might not fit in memory."""
SPARE = 16
"""Of them beyond the rank they are to find."""
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


def tile_factors(filters: FilterBasis, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """For a tile of `length` inputs `U [num_outputs, r]`, `V [length, p]`, both with orthonormal
    columns, and the core of each filter of the basis, `[K, r, p]`.

    As many outputs as inputs, or as many as there are taps for: no sequence is longer than that.
    Raises NotLowRank.
    """
    num_taps, num_filters = filters.taps.shape
    num_outputs = min(length, num_taps - length)
    assert num_outputs > 0, f"{num_taps} taps do not reach beyond a tile of {length}"
    taps = filters.taps[1 : length + num_outputs].T.contiguous()  # [K, n]

    def basis(num_rows: int) -> Tensor:
        """Of what all matrices of so many rows span."""
        num_columns = length + num_outputs - num_rows

        def sample(size: int, random: torch.Generator) -> Tensor:
            """Matrices of random filters of the span, each applied to a random vector."""
            mixed = _normal(size, num_filters, random, taps.device) @ taps
            return _hankel_times(mixed, _normal(size, num_columns, random, taps.device)).T

        def coordinates(basis: Tensor) -> Tensor:
            return _every_hankel_times(taps, basis.T).transpose(0, 1).flatten(1)

        def shares(within: Tensor) -> Tensor:
            """What each channel, a sum of filters of the basis, has of each coordinate, squared."""
            its = within.view(len(within), num_filters, num_columns)
            products, weights = its @ its.transpose(1, 2), filters.weights  # [r, K, K], [K, F]
            return torch.stack([((one @ weights) * weights).sum(0) for one in products])

        shape = num_rows, num_filters * num_columns
        return _thin_svd(sample, coordinates, shares, shape, filters.tolerance)[0]

    outputs = basis(num_outputs)
    inputs = outputs if num_outputs == length else basis(length)
    cores = _every_hankel_times(taps, inputs.T) @ outputs  # [K, p, r]
    return outputs, inputs, cores.transpose(1, 2).contiguous()


def _hankel_times(taps: Tensor, vectors: Tensor) -> Tensor:
    """`sum_i taps[q + i] vectors[i]` for every q: taps `[.., n]`, vectors `[.., k]` ->
    `[.., n + 1 - k]`."""
    length, size = taps.shape[-1], vectors.shape[-1]
    n = fast_fft_length(length)  # the wrap-around falls on what is not returned
    spectrum = torch.fft.rfft(taps, n=n) * torch.fft.rfft(vectors.flip(-1), n=n)
    products: Tensor = torch.fft.irfft(spectrum, n=n)[..., size - 1 : length]
    return products


def _every_hankel_times(taps: Tensor, vectors: Tensor) -> Tensor:
    """Each of `taps [K, n]` with each of `vectors [r, k]`: `[K, r, n + 1 - k]`."""
    return torch.stack([_hankel_times(its, vectors) for its in taps])


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
    F]`. The rank is the least for which no channel lacks more than the tolerance.
    """
    random = torch.Generator().manual_seed(0)  # the same factors in every run
    size = SMALLEST_SAMPLE
    while size <= LARGEST_SAMPLE:
        size = min(size, *shape)
        basis = torch.linalg.qr(sample(size, random)).Q
        within = coordinates(basis)
        # By way of the small triangle: the long singular vectors would cost far more.
        left = torch.linalg.svd(torch.linalg.qr(within.T, mode="r").R.T).U
        within = left.T @ within
        missing = shares(within).flip(0).cumsum(0).flip(0)  # without this coordinate and the rest
        rank = max(1, int((missing > tolerance**2 * missing[0]).any(1).sum()))
        if rank <= size - SPARE or size == min(shape):
            return basis @ left[:, :rank], within[:rank]
        size *= 2
    raise NotLowRank(f"more than {LARGEST_SAMPLE - SPARE} columns are needed")


def _normal(rows: int, columns: int, random: torch.Generator, device: torch.device) -> Tensor:
    return torch.randn(rows, columns, generator=random, dtype=torch.float64).to(device)
