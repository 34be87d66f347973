"""What a finished tile adds to the tile after it, as a product of thin matrices.

A filter `f[m]` takes a tile of `h` inputs to the outputs after it by the Hankel matrix
`H[q, i] = f[q + i + 1]`, `q` counted forwards and `i` backwards from the boundary between the two.
Spectral filters are integrals of exponentials over decay rates (`stu.filters`), and an exponential
has a Hankel matrix of rank one: the matrices of 24 filters of 16,384 lags share a basis `U` of some
30 columns to the last bit of float32, whatever `h` (a matrix of moments has singular values that
decay exponentially, Beckermann and Townsend 2017). So `H = U S V^T` with a small core `S` for each
channel: two matrix products in place of the transforms of an FFT, several times as fast and with
no work space. The rank is found, not assumed: filters of any kind come out right, at the cost of
more columns. All of this is computed in float64.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST_SAMPLE = 64
"""Random vectors that a space is made of at first; twice as many until they are enough."""
SPARE = 16
"""Of them beyond the rank they are to find."""
CHANNELS_AT_ONCE = 1024


@dataclass(frozen=True)
class FilterBasis:
    """Filters `taps @ weights`, to the last bit of the dtype they came in."""

    taps: Tensor
    """`[N, K]` float64."""
    weights: Tensor
    """`[K, F]` float64."""
    tolerance: float
    """What may be left out, relative to what is largest."""


def filter_basis(filters: Tensor) -> FilterBasis:
    """As few filters as have all of `filters [N, F]` in their span, each weighed by its share."""
    # For each channel to be right by itself, what all of them share must be right to a part of it.
    # Spectral filters are known to 1e-13 of the largest: float64 asks for no more than they have.
    tolerance = max(torch.finfo(filters.dtype).eps / 2, 1e-11) / math.sqrt(filters.shape[1])
    largest = filters.abs().amax(0)
    scale = torch.where(largest > 0, largest, 1.0)

    def blocks() -> Iterator[Tensor]:
        """The filters, of which the largest taps are 1, in float64: few at once, they are many."""
        for start in range(0, filters.shape[1], CHANNELS_AT_ONCE):
            some = slice(start, start + CHANNELS_AT_ONCE)
            yield filters[:, some].double() / scale[some].double()

    def sample(size: int, random: torch.Generator) -> Tensor:
        mixed = filters.new_zeros(len(filters), size, dtype=torch.float64)
        for block in blocks():
            mixed += block @ _normal(block.shape[1], size, random, block.device)
        return mixed

    def coordinates(basis: Tensor) -> Tensor:
        return torch.cat([basis.T @ block for block in blocks()], dim=1)

    basis, shares, weights = _thin_svd(sample, coordinates, filters.shape, tolerance)
    return FilterBasis(basis * shares, weights * scale, tolerance)


def tile_factors(filters: FilterBasis, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """For a tile of `length` inputs `U [num_outputs, r]`, `V [length, p]`, both with orthonormal
    columns, and the core of each filter of the basis, `[K, r, p]`.

    As many outputs as inputs, or as many as there are taps for: no sequence is longer than that.
    """
    num_taps, num_filters = filters.taps.shape
    num_outputs = min(length, num_taps - length)
    assert num_outputs > 0, f"{num_taps} taps do not reach beyond a tile of {length}"
    taps = filters.taps[1 : length + num_outputs]

    def basis(num_rows: int) -> Tensor:
        """Of what all matrices of so many rows span."""
        num_columns = length + num_outputs - num_rows

        def sample(size: int, random: torch.Generator) -> Tensor:
            """Matrices of random filters of the span, each applied to a random vector."""
            mixed = taps @ _normal(num_filters, size, random, taps.device)
            return _hankel_times(mixed, _normal(num_columns, size, random, taps.device))

        def coordinates(basis: Tensor) -> Tensor:
            rows = [_hankel_times(its[:, None], basis).T for its in taps.T]
            return torch.cat(rows, dim=1)

        shape = num_rows, num_filters * num_columns
        return _thin_svd(sample, coordinates, shape, filters.tolerance)[0]

    outputs = basis(num_outputs)
    inputs = outputs if num_outputs == length else basis(length)
    cores = [outputs.T @ _hankel_times(its[:, None], inputs) for its in taps.T]
    return outputs, inputs, torch.stack(cores)


def _hankel_times(taps: Tensor, vectors: Tensor) -> Tensor:
    """`sum_i taps[q + i] vectors[i]` for every q: taps `[n, r]` or `[n, 1]`, vectors `[k, r]` ->
    `[n + 1 - k, r]`."""
    size = len(taps) + len(vectors)
    spectrum = torch.fft.rfft(taps, n=size, dim=0) * torch.fft.rfft(vectors.flip(0), n=size, dim=0)
    products: Tensor = torch.fft.irfft(spectrum, n=size, dim=0)[len(vectors) - 1 : len(taps)]
    return products


def _thin_svd(
    sample: Callable[[int, torch.Generator], Tensor],
    coordinates: Callable[[Tensor], Tensor],
    shape: Sequence[int],
    tolerance: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix of `shape` as `U * s @ V`, without what is below the tolerance, from its products
    with random vectors (Halko, Martinsson, Tropp 2011, section 5.1).

    sample: so many of the products, as columns. coordinates: a basis, transposed, times the matrix.
    """
    random = torch.Generator().manual_seed(0)  # the same factors in every run
    size = SMALLEST_SAMPLE
    while True:
        size = min(size, *shape)
        basis = torch.linalg.qr(sample(size, random)).Q
        within = coordinates(basis)
        left, singular, right = torch.linalg.svd(within, full_matrices=False)
        rank = max(1, int((singular > tolerance * singular[0]).sum()))
        if rank <= size - SPARE or size == min(shape):
            return basis @ left[:, :rank], singular[:rank], right[:rank]
        size *= 2


def _normal(rows: int, columns: int, random: torch.Generator, device: torch.device) -> Tensor:
    return torch.randn(rows, columns, generator=random, dtype=torch.float64).to(device)
