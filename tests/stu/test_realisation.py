"""States of constant size against the filters they stand for."""

import tracemalloc

import numpy as np
import platformdirs
import pytest
import torch

from stu import realisation
from stu.filters import spectral_filters
from stu.realisation import NoRealisation, fitting_realisation, realise


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A cache on disk that the tests of this file share."""
    folder = tmp_path_factory.getbasetemp() / "realisations"
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: folder / name)
    return folder / "stu"


def basis(length, num_filters=24, lag_step=2, dtype=np.float64):
    return spectral_filters(length, num_filters).astype(dtype).astype(np.float64)[::lag_step]


@pytest.mark.parametrize(("length", "num_filters"), [(2, 1), (3, 2), (25, 8), (100, 7), (1024, 24)])
@pytest.mark.parametrize("tolerance", [1e-8, 1e-10])
def test_taps_follow_from_powers_of_the_transition(length, num_filters, tolerance):
    """`filter_k[m + 1] = C_k (A^T)^m V[0]`, one step at a time."""
    taps = basis(length, num_filters, lag_step=1)
    found = realise(taps, tolerance)
    state, made = found.inputs[0], []
    for _ in range(length - 1):
        made.append(found.outputs @ state)
        state = found.transition.T @ state
    largest = np.abs(taps).max(0)
    assert (np.abs(np.array(made) - taps[1:]).max(0) / largest < 3e3 * tolerance).all()
    np.testing.assert_allclose(np.array(made) - taps[1:], found.errors, atol=1e-13)


def test_states_read_inputs_and_give_outputs():
    """The state after some inputs, its advance without inputs, and what it adds to later outputs,
    one by one and through `V S_k`."""
    taps, rng = basis(600), np.random.default_rng(0)
    found = realise(taps, 1e-10)
    inputs, count = rng.standard_normal(100), 50
    state = found.inputs[:100].T @ inputs[::-1]
    wanted = np.stack([np.convolve(inputs, filter_)[100 : 100 + count] for filter_ in taps.T], 1)
    scale = np.abs(wanted).max(0)
    one_by_one = np.stack([found.outputs @ found.power(q) @ state for q in range(count)])
    assert (np.abs(one_by_one - wanted).max(0) < 1e-6 * scale).all()
    at_once = np.stack([found.inputs[:count] @ hankel @ state for hankel in found.hankels], 1)
    assert (np.abs(at_once - wanted).max(0) < 1e-6 * scale).all()
    more = rng.standard_normal(30)
    stepped = state
    for number in more:
        stepped = found.transition.T @ stepped + found.inputs[0] * number
    np.testing.assert_allclose(
        found.power(30) @ state + found.inputs[:30].T @ more[::-1], stepped, atol=1e-10
    )


@pytest.mark.parametrize(
    ("length", "rank", "dtype"),
    [
        (1024, 30, np.float64),
        (8192, 36, np.float64),
        (8192, 37, np.float32),
        pytest.param(131072, 44, np.float32, marks=pytest.mark.slow),
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
    assert error <= realisation.LARGEST_ERROR


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


def test_realisations_are_kept_by_their_filters(cache, monkeypatch):
    taps = basis(300)
    first = realisation.cached_realisation(taps, 1e-9)
    monkeypatch.setattr(realisation, "realise", None)  # must not be needed again
    again = realisation.cached_realisation(taps.copy(), 1e-9)
    np.testing.assert_array_equal(first.transition, again.transition)
    with pytest.raises(TypeError):
        realisation.cached_realisation(2 * taps, 1e-9)


def test_blocks_of_rows_make_no_difference(monkeypatch):
    taps = basis(1000)
    whole = realise(taps, 1e-9)
    realisation._exponentials.cache_clear()
    monkeypatch.setattr(realisation, "BLOCK_ROWS", 77)
    blocked = realise(taps, 1e-9)
    realisation._exponentials.cache_clear()
    assert abs(blocked.rank - whole.rank) <= 1
    assert np.abs(blocked.errors).max() < 1e-7


@pytest.mark.slow
def test_long_contexts_in_bounded_memory():
    """For 131,072 positions a dense Hankel matrix of one filter would take 34 GB."""
    taps = basis(131072)
    realisation._exponentials.cache_clear()
    tracemalloc.start()
    realise(taps, 1e-8)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 5e8
