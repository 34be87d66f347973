"""Online convolutions against a direct float64 sum, and the costs they count."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stu.futurefill import Continuous, Epoched, future_fill
from stu.online_convolution import Naive
from tests.reference import convolution as reference

KINDS = {
    "naive": Naive,
    "epoched": Epoched,
    "continuous": Continuous,
    "continuous, pages of 1": lambda *args: Continuous(*args, page_columns=1),
    "continuous, pages of 4": lambda *args: Continuous(*args, page_columns=4),
}


def decode(online, inputs, prompt_lengths):
    """Prefill each row with its own prompt, then step all rows; outputs `[layers, B, T, D]`.

    Row b of `inputs` has its prompt right-aligned: it ends where decoding starts.
    """
    layers, batch, length, _ = inputs.shape
    prompt = length - online.max_new_tokens
    outputs = torch.full_like(inputs, math.nan)
    for layer in range(layers):
        for row in range(batch):
            rows, positions = slice(row, row + 1), slice(prompt - prompt_lengths[row], prompt)
            if prompt_lengths[row]:
                outputs[layer, rows, positions] = online.prefill(
                    layer, inputs[layer, rows, positions], rows
                )
    for position in range(prompt, length):
        for layer in range(layers):
            outputs[layer, :, position] = online.step(layer, inputs[layer, :, position])
        online.advance()
    return outputs


@pytest.mark.parametrize("kind", KINDS)
@given(
    prompts=st.lists(st.integers(0, 70), min_size=1, max_size=3),
    new_tokens=st.integers(1, 150),
    lag_step=st.integers(1, 3),
    spare_taps=st.integers(-5, 5),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=25, deadline=None)
def test_equals_direct_sum(kind, prompts, new_tokens, lag_step, spare_taps, seed):
    torch.manual_seed(seed)
    length = max(prompts) + new_tokens
    num_taps = max(1, -(-length // lag_step) + spare_taps)
    inputs = torch.randn(2, len(prompts), length, 3)
    taps = torch.randn(2, num_taps, 3) / math.sqrt(num_taps)
    online = KINDS[kind](taps, len(prompts), new_tokens, lag_step)
    actual = decode(online, inputs, prompts)
    for layer in range(2):
        filters = reference.spread(taps[layer].double().numpy(), lag_step)
        for row, prompt in enumerate(prompts):
            start = max(prompts) - prompt
            own = inputs[layer, row : row + 1, start:].double().numpy()
            expected = torch.from_numpy(reference.causal(own, filters))[0]
            error = (actual[layer, row, start:] - expected).abs().max()
            assert error <= 2e-6 * expected.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_long_run_in_float32(kind):
    """Several doublings of the tile: relative error below 2e-6 of a float64 sum."""
    torch.manual_seed(0)
    inputs, taps = torch.randn(1, 2, 3000, 2), torch.randn(1, 1500, 2) / 40
    expected = reference.causal(
        inputs[0].double().numpy(), reference.spread(taps[0].double().numpy(), 2)
    )
    actual = decode(KINDS[kind](taps, 2, 2990, 2), inputs, [10, 10])[0].numpy()
    assert np.abs(actual - expected).max() <= 2e-6 * np.abs(expected).max()


@given(
    past=st.integers(1, 50),
    outputs=st.integers(1, 50),
    num_taps=st.integers(1, 120),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_future_fill_is_the_tail_of_a_full_convolution(past, outputs, num_taps, seed):
    rng = np.random.default_rng(seed)
    v, w = rng.standard_normal(past), rng.standard_normal(num_taps)
    full = np.concatenate([np.convolve(v, w, "full"), np.zeros(past + outputs)])
    actual = future_fill(torch.from_numpy(v), torch.from_numpy(w), outputs)
    np.testing.assert_allclose(actual, full[past : past + outputs], atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_caller_may_reuse_its_input_and_output(kind):
    torch.manual_seed(0)
    taps = torch.randn(1, 40, 2)
    inputs = torch.randn(1, 1, 40, 2)
    online, expected = KINDS[kind](taps, 1, 40), decode(KINDS[kind](taps, 1, 40), inputs, [0])
    buffer = torch.empty(1, 2)
    for position in range(40):
        output = online.step(0, buffer.copy_(inputs[0, :, position]))
        torch.testing.assert_close(output, expected[0, :, position], rtol=0, atol=0)
        output.fill_(math.nan)
        buffer.fill_(math.nan)
        online.advance()


@pytest.mark.parametrize("kind", KINDS)
def test_one_token_too_many(kind):
    online = KINDS[kind](torch.randn(1, 8, 2), 1, 2)
    for _ in range(2):
        online.step(0, torch.randn(1, 2))
        online.advance()
    with pytest.raises(ValueError, match="max_new_tokens=2"):
        online.step(0, torch.randn(1, 2))


def test_no_tokens_to_decode():
    with pytest.raises(ValueError, match="max_new_tokens=0 is not allowed"):
        Continuous(torch.randn(1, 8, 2), 1, 0)


def count(kind, length, lag_step=1):
    online = kind(torch.randn(1, -(-length // lag_step), 1), 1, length, lag_step)
    for _ in range(length):
        online.step(0, torch.zeros(1, 1))
        online.advance()
    return online.multiply_adds


def test_costs_grow_as_stated():
    lengths = [2**10, 2**12, 2**14]
    naive = [count(Naive, n) / n**2 for n in lengths[:2]]
    epoched = [count(Epoched, n) / (n**1.5 * math.sqrt(math.log2(n))) for n in lengths]
    continuous = [count(Continuous, n) / (n * math.log2(n) ** 2) for n in lengths]
    assert naive == pytest.approx([0.5, 0.5], rel=0.01)
    assert max(epoched) / min(epoched) < 1.25
    assert max(continuous) / min(continuous) < 1.6
    # A quadratic law would multiply each of these by 16 from one length to the next.
    assert count(Continuous, 2**14) < 0.2 * count(Epoched, 2**14) < 0.1 * count(Naive, 2**14)


def test_taps_at_even_lags_only_are_counted_once():
    assert count(Naive, 4096, lag_step=2) == pytest.approx(0.5 * count(Naive, 4096), rel=1e-3)
    assert count(Continuous, 4096, lag_step=2) < count(Continuous, 4096)


def test_prompt_cache_is_as_small_as_the_number_of_tokens_to_generate():
    taps = torch.randn(1, 4096, 4)
    sizes = set()
    for prompt in (1, 100, 3000):
        online = Continuous(taps, 2, 512)
        online.prefill(0, torch.randn(2, prompt, 4))
        sizes.add(online.cache_bytes)
        held = [value for value in vars(online).values() if isinstance(value, torch.Tensor)]
        cache = [t for t in held if t is not online.taps and t is not online._filters]
        assert sum(t.numel() for t in cache) * 4 == online.cache_bytes  # nothing else is kept
    slot_bytes = 2 * 4 * 4
    pages = 2 * 32 * slot_bytes  # the current page and its transpose
    assert sizes == {512 * slot_bytes + pages}
    naive = Naive(taps, 2, 512)
    naive.prefill(0, torch.randn(2, 3000, 4))
    assert naive.cache_bytes == (3000 + 512 + Naive.LINE_COLUMNS) * slot_bytes


def test_direct_sums_have_room_for_the_longest_prompt_alone():
    torch.manual_seed(0)
    inputs, taps = torch.randn(2, 2, 60, 3), torch.randn(2, 30, 3)
    wide, narrow = Naive(taps, 2, 50, 2), Naive(taps, 2, 50, 2, max_prompt_tokens=10)
    expected, actual = (decode(online, inputs, [10, 7]) for online in (wide, narrow))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    assert narrow._inputs.shape[-1] == 5 + 25 + Naive.LINE_COLUMNS
    with pytest.raises(ValueError, match="has 11 tokens, and there is room for 10; raise max"):
        narrow.prefill(0, inputs[0, :, :11])
