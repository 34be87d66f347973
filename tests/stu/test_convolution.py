"""Whole-sequence convolution against direct sums, and its gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stu.convolution import causal_convolution, fast_fft_length
from tests.reference import convolution as reference

lengths = st.integers(1, 40)


def random(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype)


@given(
    length=lengths,
    num_taps=lengths,
    lag_step=st.integers(1, 3),
    extra_outputs=st.integers(-10, 30),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_convolution_equals_direct_sum(length, num_taps, lag_step, extra_outputs, seed):
    torch.manual_seed(seed)
    num_outputs = max(1, length + extra_outputs)
    inputs, taps = random(2, length, 3), random(num_taps, 3)
    filters = reference.spread(taps.numpy(), lag_step)
    expected = torch.from_numpy(reference.causal(inputs.numpy(), filters, num_outputs))
    actual = causal_convolution(inputs, taps, lag_step, num_outputs)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    single = causal_convolution(inputs.float(), taps.float(), lag_step, num_outputs)
    assert (single - expected).abs().max() <= 2e-6 * expected.abs().max()


@pytest.mark.parametrize(("length", "num_taps", "lag_step"), [(1, 1, 1), (6, 9, 2), (7, 3, 2)])
def test_gradients(length, num_taps, lag_step):
    torch.manual_seed(0)
    inputs = random(2, length, 3).requires_grad_()
    taps = random(num_taps, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: causal_convolution(x, w, lag_step), (inputs, taps))


def test_gradient_of_one_argument_alone():
    torch.manual_seed(0)
    inputs, taps = random(1, 5, 2), random(5, 2)
    assert torch.autograd.gradcheck(lambda x: causal_convolution(x, taps), inputs.requires_grad_())
    inputs = inputs.detach()
    assert torch.autograd.gradcheck(lambda w: causal_convolution(inputs, w), taps.requires_grad_())


def test_blocks_of_channels_cover_every_channel(monkeypatch):
    torch.manual_seed(0)
    inputs, taps = random(2, 33, 10).requires_grad_(), random(33, 10).requires_grad_()
    grad = random(2, 33, 10)
    results = []
    for elements in (1, 3 * 4 * 128, 2**20):  # one channel, three, all ten at once
        monkeypatch.setattr("stu.convolution.CPU_BLOCK_ELEMENTS", elements)
        outputs = causal_convolution(inputs, taps)
        results.append((outputs, *torch.autograd.grad(outputs, (inputs, taps), grad)))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=1e-13)


def test_bfloat16_is_transformed_in_float32():
    torch.manual_seed(0)
    inputs, taps = random(1, 500, 4).bfloat16(), random(500, 4).float()
    expected = causal_convolution(inputs.double(), taps.double())
    actual = causal_convolution(inputs, taps)
    assert actual.dtype == torch.bfloat16
    # One rounding to bfloat16, at the end: half a unit in the last of its eight bits.
    bound = 2**-8 * expected.abs() + 1e-5 * expected.abs().max()
    assert ((actual.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize(
    ("inputs", "taps", "arguments"),
    [
        (torch.ones(1, 4, 6), torch.ones(4, 8), ()),
        (torch.ones(1, 4, 6), torch.ones(4, 1), ()),
        (torch.ones(4, 6), torch.ones(4, 6), ()),
        (torch.ones(1, 4, 2, dtype=torch.long), torch.ones(4, 2), ()),
        (torch.ones(0, 4, 2), torch.ones(4, 2), ()),
        (torch.ones(1, 4, 2), torch.ones(4, 2), (0,)),
        (torch.ones(1, 4, 2), torch.ones(4, 2), (1, 0)),
    ],
)
def test_bad_arguments_are_refused(inputs, taps, arguments):
    with pytest.raises(ValueError, match="inputs"):
        causal_convolution(inputs, taps, *arguments)


@given(st.integers(1, 10**7))
def test_fast_fft_length(at_least):
    n = fast_fft_length(at_least)
    assert at_least <= n <= at_least * 1.25 + 1
    while n % 2 == 0:
        n //= 2
    assert n in (1, 3, 5, 9, 15)
