"""Thin factors of Hankel matrices against the matrices themselves."""

import numpy as np
import pytest
import torch

from serve.cache.low_rank import NotLowRank, filter_basis, nested, tile_factors
from stu.filters import spectral_filters


def spectral(num_taps, num_channels, dtype, seed=0):
    """Filters as a model has them: random sums of spectral filters, at even lags."""
    filters = torch.from_numpy(spectral_filters(2 * num_taps, 24)[::2])
    weights = torch.from_numpy(np.random.default_rng(seed).normal(size=(24, num_channels)))
    return (filters @ weights).to(dtype)


def hankel(taps, length):
    """`H[q, i] = taps[q + i + 1]`, as many rows as there are taps for: the definition."""
    num_outputs = min(length, len(taps) - length)
    return np.array([[taps[q + i + 1] for i in range(length)] for q in range(num_outputs)])


def factored(filters, smallest, num_doublings=0):
    """The number of columns, and the products of the factors: `[F, num_outputs, h]`."""
    filters_basis = filter_basis(filters, filters.dtype)
    for number, its in enumerate(tile_factors(filters_basis, smallest)):
        basis = its.transfer if number == 0 else nested(basis, its.transfer)  # noqa: F821
        if number == num_doublings:
            break
    assert torch.allclose(basis.T @ basis, torch.eye(basis.shape[1]).double())
    outwards = basis.flip(0) if its.outwards is None else its.outwards
    cores = torch.einsum("kf,krp->frp", filters_basis.weights, its.cores)
    return basis.shape[1], outwards @ cores @ basis.T.flip(1)


SIZES = [(1, 0), (1, 8), (2, 0), (7, 3), (16, 0), (16, 4), (25, 2), (75, 1), (100, 0), (299, 0)]
"""Of the smallest tiles, and how often it is doubled."""


@pytest.mark.parametrize(("smallest", "num_doublings"), SIZES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-7), (torch.float64, 2e-11)])
def test_spectral_filters(smallest, num_doublings, dtype, tolerance):
    """Channels of very different size, each to the precision of its own."""
    filters = spectral(300, 40, dtype) * torch.logspace(-6, 6, 40).to(dtype)
    rank, products = factored(filters, smallest, num_doublings)
    length = smallest * 2**num_doublings
    assert rank <= (28 if dtype == torch.float32 else 36)
    for channel in range(40):
        expected = hankel(filters[:, channel].double().numpy(), length)
        error = np.linalg.norm(products[channel].numpy() - expected)
        assert error <= tolerance * np.linalg.norm(expected)


def test_rank_hardly_grows_with_the_length():
    filters = filter_basis(spectral(8192, 50, torch.float32), torch.float32)
    assert filters.taps.shape[1] == 24
    ranks = [its.transfer.shape[1] for its in tile_factors(filters, 16)]
    assert len(ranks) == 9
    assert ranks[:-1] == sorted(ranks[:-1])  # the last has few outputs
    assert ranks[-2] <= 36


@pytest.mark.parametrize(("num_taps", "num_channels"), [(2, 1), (5, 90), (300, 3), (120, 110)])
@pytest.mark.parametrize(("smallest", "num_doublings"), [(1, 0), (1, 6), (4, 0), (30, 1), (110, 0)])
def test_filters_without_structure(num_taps, num_channels, smallest, num_doublings):
    """Random taps, more or fewer than channels, and than the tile is long; a channel of zeros."""
    filters = torch.randn(num_taps, num_channels, generator=torch.Generator().manual_seed(1))
    filters[:, -1] *= num_channels == 1
    length = smallest * 2**num_doublings
    if length >= num_taps:
        factors = list(tile_factors(filter_basis(filters, filters.dtype), smallest))
        assert len(factors) <= num_doublings
        return
    _, products = factored(filters, smallest, num_doublings)
    for channel in range(num_channels):
        expected = hankel(filters[:, channel].double().numpy(), length)
        error = np.linalg.norm(products[channel].numpy() - expected)
        assert error <= 1e-6 * max(np.linalg.norm(expected), 1e-9)


def test_filters_of_zeros():
    _, products = factored(torch.zeros(10, 4), 8)
    assert products.abs().max() == 0


def test_same_factors_every_time():
    filters = spectral(300, 7, torch.float32)
    assert torch.equal(factored(filters, 64)[1], factored(filters, 64)[1])


def test_filters_that_are_not_low_rank_say_so():
    filters = torch.randn(2000, 400, generator=torch.Generator().manual_seed(1))
    with pytest.raises(NotLowRank, match="more than 112 columns are needed"):
        filter_basis(filters, torch.float32)
    basis = filter_basis(filters[:, :3], torch.float32)
    with pytest.raises(NotLowRank):
        list(tile_factors(basis, 100))


@pytest.mark.parametrize("width", [64, 4096])
def test_a_model_s_own_filters_in_float32(width):
    """What a model stores, rounded to float32, still has few columns: as many as it would unrounded
    and no more than its rounding warrants."""
    filters = torch.from_numpy(spectral_filters(8192, 24)[::2]).float()
    weights = torch.randn(24, width, generator=torch.Generator().manual_seed(0))
    basis = filter_basis(filters.double() @ weights.double(), torch.float32)
    assert basis.taps.shape[1] == 24
    assert all(its.transfer.shape[1] <= 30 for its in tile_factors(basis, 16))
