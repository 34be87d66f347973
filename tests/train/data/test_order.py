"""The order of samples is a bijection, random enough, and the same on every machine."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.data.order import Permutation


def _all(n, seed, epoch):
    return Permutation(n, seed, epoch)(np.arange(n, dtype=np.int64)).tolist()


@given(
    n=st.integers(1, 2000) | st.sampled_from([2**k + d for k in range(1, 12) for d in (-1, 0, 1)]),
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 10**6),
)
def test_bijection(n, seed, epoch):
    assert sorted(_all(n, seed, epoch)) == list(range(n))


@given(n=st.integers(1, 2**40), data=st.data())
def test_any_part_of_a_long_order(n, data):
    order = Permutation(n, seed=1, epoch=2)
    positions = np.array(data.draw(st.lists(st.integers(0, n - 1), max_size=50, unique=True)))
    positions = positions.astype(np.int64)
    together = order(positions)
    assert together.shape == positions.shape
    assert ((together >= 0) & (together < n)).all()
    assert len(np.unique(together)) == len(positions)
    one_by_one = [int(order(positions[i : i + 1])[0]) for i in range(len(positions))]
    assert together.tolist() == one_by_one


def test_seed_and_epoch_change_the_order():
    orders = {tuple(_all(100, seed, epoch)) for seed in range(20) for epoch in range(20)}
    assert len(orders) == 400


@pytest.mark.parametrize("n", [2, 7, 40])
def test_every_sample_is_about_equally_likely_at_every_position(n):
    num_orders = 4000
    counts = np.zeros((n, n))
    for epoch in range(num_orders):
        counts[np.arange(n), _all(n, 0, epoch)] += 1
    expected = num_orders / n
    # (n-1)^2 degrees of freedom; five standard deviations.
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < (n - 1) ** 2 + 5 * np.sqrt(2) * (n - 1) + 5


def test_neighbours_in_the_order_are_not_neighbours_in_the_text():
    steps = np.diff(_all(10_000, 3, 0))
    assert (np.abs(steps) < 10).mean() < 0.01
    assert np.unique(steps).size > 5000


def test_order_never_changes():
    """A checkpoint's position means these samples: a change here breaks every resumed run."""
    assert _all(10, seed=0, epoch=0) == [2, 3, 0, 6, 5, 1, 7, 4, 8, 9]
    ends = Permutation(10**12, seed=7, epoch=3)(np.array([0, 1, 10**12 - 1]))
    assert ends.tolist() == [416544143483, 643503337289, 538452078198]


def test_positions_and_sizes_are_checked():
    with pytest.raises(AssertionError, match="at least one element"):
        Permutation(0, 0, 0)
    with pytest.raises(AssertionError):
        Permutation(10, 0, 0)(np.array([10]))
