"""Short convolutions of sequences that come and go, against each alone."""

import math
from itertools import count

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
    every row is used again, after whatever was there, prompts come in two chunks, and each step
    continues from snapshots."""
    torch.manual_seed(seed)
    recent, taps = setup(num_taps)
    requests = [*requests, *((arrival + 40, *lengths) for arrival, *lengths in requests)]
    inputs = [torch.randn(LAYERS, 1, p + n, WIDTH).double() for _, p, n in requests]
    outputs = [torch.full_like(x, math.nan) for x in inputs]
    running, places = {}, [prompt for _, prompt, _ in requests]  # request by row
    for now in range(70):
        for number, (arrival, prompt, _) in enumerate(requests):
            if arrival == now:
                row = next(row for row in count() if row not in running)
                recent.admit(row, 1, 1)
                for layer, own_taps in enumerate(taps):
                    for part in (slice(0, prompt // 2), slice(prompt // 2, prompt)):
                        first = recent.prefill(row, layer, inputs[number][layer, :, part], own_taps)
                        outputs[number][layer, :, part] = first
                running[row] = number
        rows = sorted(running)
        for row in rows:
            snapshot = recent.snapshot(row, places[running[row]])
            for kept in recent._inputs:
                kept[row] = math.nan
            recent.restore(row, snapshot)
        recent.begin_step(rows, alone=False)
        for layer, own_taps in enumerate(taps):
            tokens = [inputs[running[row]][layer, :, places[running[row]]] for row in rows]
            tokens += [torch.ones(1, WIDTH).double()] * (MAX_ROWS - len(rows))
            half = MAX_ROWS // 2
            stepped = [
                recent.step(layer, torch.stack(tokens[:half]), own_taps),
                recent.step(layer, torch.stack(tokens[half:]), own_taps, half),
            ]
            for row, output in zip(rows, torch.cat(stepped), strict=False):
                outputs[running[row]][layer, :, places[running[row]]] = output
        for row in rows:
            places[running[row]] += 1
            if places[running[row]] == sum(requests[running[row]][1:]):
                recent.release(row)
                del running[row]
    for number in range(len(requests)):
        for layer in range(LAYERS):
            expected = reference.causal(inputs[number][layer].numpy(), taps[layer].numpy())
            torch.testing.assert_close(outputs[number][layer], torch.from_numpy(expected))
    assert recent.num_bytes == LAYERS * (MAX_ROWS + 1) * (num_taps - 1) * WIDTH * 8
