"""Attention by torch's flex_attention against the formula, and its masks against those of torch."""

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from stu import flex_attention as flex
from stu.attention import Scores, alibi_slopes, sliding_window_attention
from stu.config import ModelConfig
from stu.flex_attention import BLOCK, flex_window_attention, in_window, score_mod, window_mask
from stu.model import FlashSTU
from tests.reference import attention as reference

SOFTCAP = 5.0


def random(length, num_queries=None, heads=3, seed=0, dtype=torch.float64):
    """Return queries, keys and values, large enough that the softcap bends the scores."""
    source = torch.Generator().manual_seed(seed)
    lengths = num_queries or length, length, length
    return [
        4 * torch.randn(2, n, heads, 4, generator=source, dtype=torch.float64).to(dtype)
        for n in lengths
    ]


@pytest.mark.parametrize("window", [1, 100, 128, 129, 400])
@pytest.mark.parametrize("length", [1, 127, 128, 129, 300])
def test_attention_equals_the_reference(length, window):
    q, k, v = random(length)
    found = flex_window_attention(q, k, v, Scores(alibi_slopes(3), window, SOFTCAP))
    expected = reference.attention(q.numpy(), k.numpy(), v.numpy(), window, SOFTCAP)
    np.testing.assert_allclose(found, expected, atol=1e-7)  # slopes are float32


@pytest.mark.parametrize("num_queries", [1, 5, 128, 299])
def test_queries_may_follow_earlier_keys(num_queries):
    q, k, v = random(300, num_queries)
    scores = Scores(alibi_slopes(3), 70, SOFTCAP)
    found = flex_window_attention(q, k, v, scores)
    expected = sliding_window_attention(q, k, v, scores)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_float32_stays_near_float64():
    scores = Scores(alibi_slopes(3), 50, SOFTCAP)
    exact = flex_window_attention(*random(200), scores)
    found = flex_window_attention(*random(200, dtype=torch.float32), scores)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-5)


@pytest.mark.parametrize("window", [1, 127, 128, 129, 256, 300, 5000])
@pytest.mark.parametrize("blocks", [1, 2, 7])
def test_masks_are_those_of_torch(blocks, window):
    length = BLOCK * blocks
    found = window_mask(length, 0, window, torch.device("cpu"))
    expected = create_block_mask(in_window(window), None, None, length, length, "cpu")
    assert found.shape == expected.shape
    for kind in ("kv", "full_kv", "q", "full_q"):
        counts, own_counts = (getattr(m, f"{kind}_num_blocks") for m in (expected, found))
        assert torch.equal(own_counts, counts), kind
        for row, count in enumerate(counts[0, 0].tolist()):
            lists = (getattr(m, f"{kind}_indices")[0, 0, row, :count] for m in (expected, found))
            assert torch.equal(*lists), (kind, row)


def test_a_mask_made_in_inference_serves_training_too():
    with torch.inference_mode():
        mask = window_mask(3 * BLOCK, 0, 77, torch.device("cpu"))  # no other test has made it
    tensors = [value for value in vars(mask).values() if isinstance(value, torch.Tensor)]
    assert tensors
    assert not any(tensor.is_inference() for tensor in tensors)


@pytest.mark.parametrize("first_query", [1, 128, 200, 500])
def test_blocks_before_the_first_query_see_nothing(first_query):
    length, cpu = 5 * BLOCK, torch.device("cpu")
    every, found = window_mask(length, 0, 300, cpu), window_mask(length, first_query, 300, cpu)
    seen, own = every.to_dense()[0, 0], found.to_dense()[0, 0]
    before = first_query // BLOCK
    assert not own[:before].any()
    assert torch.equal(own[before:], seen[before:])


def test_gradients_through_the_scores_are_those_of_blocks():
    """By hand, as torch has no backward pass of flex_attention on CPUs."""
    length, window = 150, 40
    scores = Scores(alibi_slopes(3).double(), window, SOFTCAP)
    positions = torch.arange(length)
    gradients = []
    for by_hand in (True, False):
        q, k, v = (x.requires_grad_() for x in random(length))
        if by_hand:
            products = torch.einsum("bqhd,bkhd->bhqk", q, k) / 4**0.5
            head, query, key = torch.meshgrid(torch.arange(3), positions, positions, indexing="ij")
            bent = score_mod(scores)(products, None, head, query, key)
            seen = in_window(window)(None, None, query, key)
            weights = bent.masked_fill(~seen, -torch.inf).softmax(-1)
            out = torch.einsum("bhqk,bkhd->bqhd", weights, v)
        else:
            out = sliding_window_attention(q, k, v, scores)
        gradients.append(torch.autograd.grad(out.square().sum(), (q, k, v)))
    for expected, actual in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)


def test_any_number_of_lengths_takes_two_compilations(monkeypatch):
    torch.compiler.reset()
    compiled = torch.compile(flex.flex_attention, backend="eager")
    monkeypatch.setattr(flex, "flex_attention", compiled)
    torch._dynamo.utils.counters.clear()
    for length, num_queries in [(256, 256), (300, 300), (519, 519), (700, 257), (1000, 900)]:
        inputs = random(length, num_queries, dtype=torch.float32)
        flex_window_attention(*inputs, Scores(alibi_slopes(3), 100, SOFTCAP))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    torch.compiler.reset()


def test_blocks_of_equal_mixers_share_what_is_compiled():
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "width": 16, "num_layers": 12, "num_heads": 2, "num_filters": 4}
    model = FlashSTU(ModelConfig(**shape, layout="hybrid", max_seq_len=200, window_tokens=30))
    tokens = torch.randint(50, (1, 150))
    expected = model.hidden(tokens)
    torch.compiler.reset()
    for block in model.blocks:
        block.forward = torch.compile(block.forward, backend="eager")
    torch._dynamo.utils.counters.clear()
    torch.testing.assert_close(model.hidden(tokens), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    torch.compiler.reset()
