"""Short convolutions of sequences that come and go, against each alone."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.cache.recent_inputs import RecentInputs
from stu.mixers import LastInputs
from tests.reference import convolution as reference

LAYERS, WIDTH, MAX_ROWS = 2, 3, 4


def setup(num_taps=3):
    recent = RecentInputs([LastInputs(WIDTH, num_taps)] * LAYERS, MAX_ROWS, torch.float64)
    for inputs in recent._inputs:
        inputs[:-1] = math.nan  # what is read before it is written shows
    return recent, torch.randn(LAYERS, num_taps, WIDTH, dtype=torch.float64)


@given(
    requests=st.lists(
        st.tuples(st.integers(0, 15), st.integers(0, 5), st.integers(1, 12)),
        min_size=1,
        max_size=MAX_ROWS,
    ),
    num_taps=st.integers(2, 4),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=50, deadline=None)
def test_every_sequence_equals_its_direct_sum(requests, num_taps, seed):
    """Requests (arrival step, prompt length, new tokens) run together, with padding behind them;
    every place is used again, after whatever was there."""
    torch.manual_seed(seed)
    recent, taps = setup(num_taps)
    requests = [*requests, *((arrival + 40, *its) for arrival, *its in requests)]
    inputs = [torch.randn(LAYERS, 1, p + n, WIDTH).double() for _, p, n in requests]
    outputs = [torch.full_like(x, math.nan) for x in inputs]
    rows, places = [], [prompt for _, prompt, _ in requests]
    for step in range(70):
        for owner, (arrival, prompt, _) in enumerate(requests):
            if arrival == step:
                recent.admit(owner, 1, 1)
                for layer, its in enumerate(taps):
                    first = recent.prefill(owner, layer, inputs[owner][layer, :, :prompt], its)
                    outputs[owner][layer, :, :prompt] = first
                recent.join(owner)
                rows.append(owner)
        for layer, its in enumerate(taps):
            tokens = [inputs[o][layer, :, places[o]] for o in rows]
            tokens += [torch.ones(1, WIDTH).double()] * (MAX_ROWS - len(rows))
            half = MAX_ROWS // 2
            stepped = [
                recent.step(layer, torch.stack(tokens[:half]), its),
                recent.step(layer, torch.stack(tokens[half:]), its, half),
            ]
            for owner, output in zip(rows, torch.cat(stepped), strict=False):
                outputs[owner][layer, :, places[owner]] = output
        for row in reversed(range(len(rows))):
            owner = rows[row]
            places[owner] += 1
            if places[owner] == sum(requests[owner][1:]):
                recent.leave(row)
                recent.release(owner)
                rows[row] = rows[-1]
                rows.pop()
    for owner in range(len(requests)):
        for layer in range(LAYERS):
            expected = reference.causal(inputs[owner][layer].numpy(), taps[layer].numpy())
            torch.testing.assert_close(outputs[owner][layer], torch.from_numpy(expected))


def test_a_prompt_that_is_given_up_leaves_its_place():
    recent, taps = setup()
    for owner in range(3 * MAX_ROWS):
        recent.admit(owner, 1, 1)
        recent.prefill(owner, 0, torch.ones(1, 5, WIDTH).double(), taps[0])
        recent.release(owner)
    assert recent.num_bytes == LAYERS * (MAX_ROWS + 1) * 2 * WIDTH * 8
    recent.admit(99, 1, 1)
    recent.join(99)
    with pytest.raises(AssertionError, match="sequence 99 is still in the batch"):
        recent.release(99)
