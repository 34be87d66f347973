"""States of constant size against the filters they stand for."""

import tracemalloc

import numpy as np
import pytest
import torch

from stu import realisation
from stu.filters import spectral_filters
from stu.realisation import NoRealisation, fitting_realisation, realise


def basis(length, num_filters=24, lag_step=2, dtype=np.float64):
    return spectral_filters(length, num_filters).astype(dtype).astype(np.float64)[::lag_step]


@pytest.mark.parametrize(
    ("length", "num_filters", "rank", "error"),
    [
        (2, 1, 2, 1e-15),
        (3, 2, 4, 1e-15),
        (25, 8, 16, 1e-6),
        (100, 7, 24, 1e-9),
        (1024, 24, 36, 1e-5),
        (1024, 24, 44, 1e-8),
    ],
)
def test_taps_are_sums_of_exponentials(length, num_filters, rank, error):
    """`filter_k[m + 1] = sum_i C[k, i] exp(-x_i m)`, one step at a time."""
    taps = basis(length, num_filters, lag_step=1)
    found = realise(taps, rank)
    assert found.rank == rank
    state, made = np.ones(rank), []
    for _ in range(length - 1):
        made.append(found.outputs @ state)
        state = np.exp(-found.rates) * state
    largest = np.abs(taps).max(0)
    assert (np.abs(np.array(made) - taps[1:]).max(0) < error * largest).all()
    np.testing.assert_allclose(np.array(made) - taps[1:], found.errors, atol=1e-12)


def test_states_read_inputs_and_give_outputs():
    """The state after some inputs, its advance, and what it adds to later outputs."""
    taps, rng = basis(600), np.random.default_rng(0)
    found = realise(taps, 36)
    inputs, count = rng.standard_normal(100), 50
    state = found.decays(100).T @ inputs[::-1]
    wanted = np.stack([np.convolve(inputs, filter_)[100 : 100 + count] for filter_ in taps.T], 1)
    given = found.decays(count) @ (found.outputs * state).T
    assert (np.abs(given - wanted).max(0) < 1e-6 * np.abs(wanted).max(0)).all()
    more = rng.standard_normal(30)
    stepped = state
    for number in more:
        stepped = np.exp(-found.rates) * stepped + number
    at_once = found.decays(31)[30] * state + found.decays(30).T @ more[::-1]
    np.testing.assert_allclose(at_once, stepped, atol=1e-11)


@pytest.mark.parametrize(
    ("length", "rank"), [(300, 24), pytest.param(2560, 28, marks=pytest.mark.slow)]
)
def test_better_rates_give_smaller_errors(length, rank):
    """With all channels alike, by a factor of 50, from rates that still never let a state grow."""
    taps = basis(length)
    usual, better = realise(taps, rank), realise(taps, rank, refine=True)
    sizes = [np.linalg.norm(found.errors) for found in (usual, better)]
    assert sizes[1] < sizes[0] / 50
    assert (np.diff(better.rates) >= 0).all()
    assert np.exp(-better.rates * len(taps)).max() < 0.7
    made = better.decays(len(taps) - 1) @ better.outputs.T
    np.testing.assert_allclose(made - taps[1:], better.errors, atol=1e-12)


@pytest.mark.parametrize("length", [2, 100, 65536])
def test_states_never_grow_without_end(length):
    rates = realise(np.ones((length, 1)), 64).rates
    assert (rates > 0).all()
    assert np.exp(-rates * length).max() < 0.4


@pytest.mark.parametrize(
    ("length", "rank", "dtype"),
    [
        (1024, 32, np.float64),
        pytest.param(8192, 34, np.float64, marks=pytest.mark.slow),
        pytest.param(8192, 34, np.float32, marks=pytest.mark.slow),
        pytest.param(131072, 40, np.float32, marks=pytest.mark.slow),
    ],
)
def test_the_rank_is_small(length, rank, dtype):
    taps = torch.from_numpy(basis(length, dtype=dtype))
    torch.manual_seed(0)
    weights = [torch.randn(24, 200).double() * torch.logspace(-3, 3, 200) for _ in range(3)]
    found, error = fitting_realisation(taps, weights, torch.float32)
    assert found.rank <= rank
    made = torch.from_numpy(found.errors)
    worst = max(
        ((made @ own).abs().amax(0) / (taps @ own).abs().amax(0)).max().item() for own in weights
    )
    assert error == pytest.approx(worst)
    assert error < 1e-7


def test_the_rank_rises_until_the_worst_channel_is_right():
    """A channel that is all filter 24, whose largest singular value is the smallest."""
    taps = torch.from_numpy(basis(2048))
    usual, single = torch.ones(24, 1).double(), torch.eye(24).double()[:, -1:]
    low, _ = fitting_realisation(taps, [usual], torch.float32)
    high, error = fitting_realisation(taps, [usual, single], torch.float32)
    assert high.rank > low.rank
    assert error <= realisation.LARGEST_ERRORS[torch.float32]


def test_channels_without_taps_do_no_harm():
    weights = torch.cat([torch.zeros(24, 1), torch.ones(24, 1)], 1).double()
    _, error = fitting_realisation(torch.from_numpy(basis(512)), [weights], torch.float32)
    assert error < 1e-7


@pytest.mark.parametrize(
    ("taps", "why"),
    [
        (torch.randn(400, 3, generator=torch.Generator().manual_seed(0)), "of its largest tap"),
        (torch.ones(1, 3), "a single tap"),
        (torch.from_numpy(basis(512)).bfloat16(), r"differ by \d\.\de-0\d of its largest tap"),
    ],
)
def test_other_filters_are_refused_with_their_error(taps, why):
    with pytest.raises(NoRealisation, match=why):
        fitting_realisation(taps.double(), [None], torch.float32)


@pytest.mark.slow
def test_float64_outputs_get_what_the_filters_allow():
    """Filters rounded to float32 are no sums of exponentials beyond that, which is refused."""
    torch.manual_seed(0)
    weights, taps = [torch.randn(24, 50).double()], basis(4096)
    found, error = fitting_realisation(torch.from_numpy(taps), weights, torch.float64)
    assert error < 1e-11
    assert found.rank <= 48
    rounded = torch.from_numpy(basis(4096, dtype=np.float32))
    _, error = fitting_realisation(rounded, weights, torch.float32)
    assert error < 1e-7
    why = r"largest tap, or its outputs by \d\.\de-08, and float64 accepts 1e-08"
    with pytest.raises(NoRealisation, match=why):
        fitting_realisation(rounded, weights, torch.float64)


@pytest.mark.slow
def test_long_contexts_in_bounded_memory():
    """For 131,072 positions a dense Hankel matrix of one filter would take 34 GB."""
    taps = basis(131072)
    tracemalloc.start()
    found = realise(taps, 44)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 5e7
    assert (np.abs(found.errors).max(0) < 5e-7 * np.abs(taps).max(0)).all()
