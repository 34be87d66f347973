"""Blocked windowed attention against the whole score matrix."""

import logging

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stu import attention
from stu.attention import Scores, alibi_slopes, attend, sliding_window_attention
from stu.config import ModelConfig
from stu.model import FlashSTU
from tests.reference import attention as reference


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 16])
def test_slopes_equal_reference(heads):
    np.testing.assert_allclose(alibi_slopes(heads), reference.slopes(heads), rtol=1e-6)


def test_slopes_of_eight_heads_are_the_published_ones():
    assert alibi_slopes(8).tolist() == [0.25 * 2.0**-h for h in range(1, 9)]


@pytest.mark.parametrize("window", [1, 5, 128, 300])
@pytest.mark.parametrize("length", [1, 127, 128, 129, 290])
def test_attention_equals_reference(length, window):
    torch.manual_seed(0)
    # Large enough that the softcap bends the scores.
    q, k, v = (4 * torch.randn(2, length, 3, 4, dtype=torch.float64) for _ in range(3))
    actual = sliding_window_attention(q, k, v, Scores(alibi_slopes(3), window, 5.0))
    expected = reference.attention(q.numpy(), k.numpy(), v.numpy(), window, 5.0)
    np.testing.assert_allclose(actual, expected, atol=1e-7)  # slopes are float32


def test_float32_and_bfloat16_stay_near_float64():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 200, 2, 8, dtype=torch.float64) for _ in range(3))
    scores = Scores(alibi_slopes(2), 50, 50.0)
    exact = sliding_window_attention(q, k, v, scores)
    single = sliding_window_attention(q.float(), k.float(), v.float(), scores)
    torch.testing.assert_close(single.double(), exact, rtol=0, atol=2e-6)
    q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    exact = sliding_window_attention(q.double(), k.double(), v.double(), scores)
    half = sliding_window_attention(q, k, v, scores)
    assert half.dtype == torch.bfloat16
    # One rounding, of the result: sums inside are float32.
    assert ((half.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-5).all()


def test_autocast_changes_nothing():
    """Otherwise scores would have 8 bits, and the backward pass would use other weights."""
    torch.manual_seed(0)
    inputs = [(2 * torch.randn(1, 150, 2, 8)).requires_grad_() for _ in range(3)]
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = sliding_window_attention(*inputs, Scores(alibi_slopes(2), 50, 50.0))
        results.append([out, *torch.autograd.grad(out.sum(), inputs)])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize(("length", "window"), [(9, 4), (300, 50), (128, 200), (259, 1)])
def test_gradients_across_blocks(length, window):
    """Against autograd's, through the whole score matrix at once."""
    torch.manual_seed(0)
    shape = 2, length, 3, 4
    q, k, v = (3 * torch.randn(shape, dtype=torch.float64) for _ in range(3))
    upstream = torch.randn(shape, dtype=torch.float64)
    scores = Scores(alibi_slopes(3), window, 5.0)
    gradients = []
    positions = torch.arange(length)
    distances = positions[:, None] - positions
    for whole in (True, False):
        own = [x.clone().requires_grad_() for x in (q, k, v)]
        if whole:
            heads_first = [x.transpose(1, 2) for x in own]
            out = attend(*heads_first, distances, scores).transpose(1, 2)
        else:
            out = sliding_window_attention(*own, scores)
        gradients.append(torch.autograd.grad(out, own, upstream))
    for expected, actual in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements of any result."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.untyped_storage().nbytes() // 4)
        return result


def test_memory_does_not_grow_with_the_square_of_the_length():
    for length in (1024, 4096):
        q, k, v = (torch.randn(1, length, 2, 4, requires_grad=True) for _ in range(3))
        with LargestTensor() as largest:
            sliding_window_attention(q, k, v, Scores(alibi_slopes(2), 64, 50.0)).sum().backward()
        assert largest.elements <= 2 * max(length * 4, 128 * (128 + 64))


def test_the_log_says_once_what_attends_on_cuda(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    attention._log_kernel.cache_clear()
    config = ModelConfig(vocab_size=10, width=8, num_layers=3, num_heads=2, layout="attention")
    with caplog.at_level(logging.INFO):
        FlashSTU(config)
    attention._log_kernel.cache_clear()
    (message,) = (record.message for record in caplog.records)
    assert message == f"attention on CUDA runs {attention.KERNEL_ON_CUDA}"
    assert attention.KERNEL_ON_CUDA in ("flash-attn", "flex_attention", "blocked torch code")
