"""Pages of attention windows that go from one sequence to another."""

import math
from dataclasses import replace

import torch

from serve.cache.attention_windows import AttentionCache
from serve.cache.page_pool import PagePool
from serve.config import EngineConfig
from stu.config import ModelConfig
from stu.mixers import KeyWindow
from stu.model import FlashSTU

PAGE_LEN, WINDOW = 4, 8


def test_a_page_given_back_is_read_before_another_sequence_gets_it():
    """The first chunk of a prompt, beside the last one of a prompt that then has a page less."""
    torch.manual_seed(0)
    pool = PagePool(12, (1, 2, PAGE_LEN, 1, 4), torch.float64)
    pool.pages[1:] = math.nan
    cache = AttentionCache(KeyWindow(WINDOW, 1, 4, 50.0), pool)
    first, second = (torch.randn(3, 1, 12, 1, 4, dtype=torch.float64) for _ in range(2))

    def alone(inputs):
        cache.admit(2, 12, 0)
        cache.begin_chunk(2, 12)
        outputs = cache.prefill(2, 0, *inputs)
        cache.release(2)
        return outputs

    expected = alone(first), alone(second)
    cache.admit(0, 12, 0)
    cache.admit(1, 12, 0)
    cache.begin_chunk(0, 9)
    outputs = [cache.prefill(0, 0, *first[:, :, :9])]
    before = set(cache._windows[0].pages)
    cache.begin_chunk(0, 3)
    cache.begin_chunk(1, 12)
    assert before & set(cache._windows[1].pages)
    outputs.append(cache.prefill(0, 0, *first[:, :, 9:]))
    torch.testing.assert_close(torch.cat(outputs, 1), expected[0])
    torch.testing.assert_close(cache.prefill(1, 0, *second), expected[1])
    cache.check_integrity([0, 1])


def test_a_window_beyond_the_context_takes_no_more_memory_than_the_context():
    config = ModelConfig(
        50, width=16, num_layers=1, layout="attention", num_heads=2, max_seq_len=32,
        window_tokens=10**9,
    )  # fmt: skip
    caches = [
        AttentionCache.plan(FlashSTU(model), EngineConfig(page_len=4)).make(8)
        for model in (config, replace(config, window_tokens=32))
    ]
    assert caches[0]._gathered.shape == caches[1]._gathered.shape
    assert caches[0].pages_needed(20, 12) == caches[1].pages_needed(20, 12)
