"""Documents that are kept apart equal each alone, and see nothing of one another to the bit."""

import itertools
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.functional import cross_entropy

from stu.attention import Scores, alibi_slopes, sliding_window_attention
from stu.config import ModelConfig
from stu.convolution import causal_convolution, short_convolution
from stu.flash_attention import flash_attention
from stu.flex_attention import BLOCK, document_mask, flex_window_attention, in_document
from stu.model import FlashSTU
from stu.sequences.documents import Documents, padded_length
from tests.reference import attention as reference_attention
from tests.reference.documents import alone

SHAPE = {"vocab_size": 40, "width": 16, "num_layers": 3, "num_heads": 2, "num_filters": 4}
SHAPE |= {"max_seq_len": 200, "window_tokens": 30, "mlp_ratio": 2}
LENGTHS = [[1, 37, 64, 17, 40, 3, 2], [164], [100, 64], [16, 15, 33, 1, 1, 1, 97]]
"""Four rows of 164 tokens."""
MODELS = [("hybrid", "tensordot"), ("stu", "full"), ("hyena", "tensordot")]


def make_model(layout="hybrid", form="tensordot"):
    torch.manual_seed(0)
    model = FlashSTU(ModelConfig(**SHAPE, layout=layout, stu_form=form))
    for parameter in model.parameters():  # Hyena's outputs would be tiny
        parameter.data.mul_(1.5)
    return model


def make_tokens(seed=1):
    return torch.randint(SHAPE["vocab_size"], (4, 164), generator=torch.manual_seed(seed))


def gradients(model, tokens, counted):
    """Return logits, gradients of all weights and that of the embedded tokens, for the loss of the
    tokens that are `counted`."""
    embedded = []
    handle = model.embedding.register_forward_hook(lambda *hooked: embedded.append(hooked[2]))
    logits = model(tokens, Documents(LENGTHS))
    handle.remove()
    losses = cross_entropy(logits.flatten(0, 1), (tokens * 7 % 40).flatten(), reduction="none")
    weights = [weight for name, weight in model.named_parameters() if name != "embedding.weight"]
    loss = losses[counted.flatten()].sum()
    return logits, torch.autograd.grad(loss, [*weights, embedded[0]])


@pytest.mark.parametrize(("layout", "form"), MODELS)
def test_documents_equal_each_alone(layout, form):
    model, tokens = make_model(layout, form).double(), make_tokens()
    upstream = torch.randn(4, 164, 40, dtype=torch.float64, generator=torch.manual_seed(2))
    found = model(tokens, Documents(LENGTHS))
    expected = alone(model, tokens, LENGTHS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    weights = list(model.parameters())
    pairs = zip(
        *(torch.autograd.grad(y, weights, upstream) for y in (found, expected)), strict=True
    )
    for own, wanted in pairs:
        torch.testing.assert_close(own, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("layout", "form"), [*MODELS, ("attention", "tensordot")])
def test_a_document_changes_no_bit_of_another(layout, form):
    model, before = make_model(layout, form), make_tokens()
    numbers = Documents(LENGTHS).numbers
    for changed in (1, 9):
        others = numbers != changed
        after = torch.where(others, before, (before + 11) % 40)
        old, new = (gradients(model, tokens, others) for tokens in (before, after))
        assert torch.equal(old[0][others], new[0][others])
        assert not torch.equal(old[0][~others], new[0][~others])
        for first, second in zip(old[1][:-1], new[1][:-1], strict=True):
            assert torch.equal(first, second)
        # Of the embedded tokens, those of the changed document have no part in the loss.
        for _, grads in (old, new):
            assert not grads[-1][~others].any()
        every = torch.ones_like(others)
        old, new = (gradients(model, tokens, every)[1][-1] for tokens in (before, after))
        assert torch.equal(old[others], new[others])


@pytest.mark.parametrize(("layout", "form"), [*MODELS, ("attention", "tensordot")])
def test_a_document_that_is_not_a_number_spoils_no_other(layout, form):
    model, tokens = make_model(layout, form), make_tokens() % 39
    documents = Documents(LENGTHS)
    expected = model(tokens, documents)
    with torch.no_grad():
        model.embedding.weight[39] = torch.nan
    for spoilt in (0, 9):
        others = documents.numbers != spoilt
        found = model(torch.where(others, tokens, 39), documents)
        assert torch.equal(found[others][:, :39], expected[others][:, :39])


def test_compiled_blocks_are_not_compiled_anew_for_other_documents():
    model, tokens = make_model(), make_tokens()
    lengths = [LENGTHS, [[164]] * 4, [[82, 82], [1, 163], [50, 50, 64], [164]]]
    expected = [model(tokens, Documents(rows)) for rows in lengths]
    torch.compiler.reset()
    for block in model.blocks:
        block.forward = torch.compile(block.forward, backend="eager")
    counts = []
    for rows, wanted in zip(lengths, expected, strict=True):
        torch.testing.assert_close(model(tokens, Documents(rows)), wanted)
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts[1] == counts[2]
    torch.compiler.reset()


@pytest.mark.parametrize("length", [1, 15, 16, 17, 24, 25, 32, 33, 48, 49, 96, 1025, 1537, 3072])
def test_padded_lengths(length):
    sizes = sorted([2**n for n in range(4, 13)] + [3 * 2**n for n in range(3, 12)])
    assert padded_length(length) == min(size for size in sizes if size >= length)


def test_padding_is_never_read():
    """Functions get zeros after a document, and what they return there is dropped."""
    documents = Documents([[5, 20], [25]])

    def spoilt(x, y):
        assert x.shape[1] in (16, 24, 25)
        is_padding = (x == 0).all(-1, keepdim=True)
        return (x + y).masked_fill(is_padding, torch.nan)

    x, y = torch.rand(2, 2, 25, 3) + 1
    assert torch.equal(documents.apply(spoilt, (x, y)), x + y)
    x.requires_grad_()
    documents.apply(lambda x: x.cumsum(1), (x,)).sum().backward()
    expected = torch.cat([torch.arange(5, 0, -1), torch.arange(20, 0, -1), torch.arange(25, 0, -1)])
    assert torch.equal(x.grad[..., 0].flatten(), expected.float())


@pytest.mark.parametrize("lag_step", [1, 2])
def test_convolutions_against_each_document_alone(lag_step):
    source = torch.manual_seed(3)
    inputs = torch.randn(4, 164, 3, generator=source, dtype=torch.float64)
    taps = torch.randn(-(-164 // lag_step), 3, generator=source, dtype=torch.float64)
    documents = Documents(LENGTHS)
    long = documents.apply(causal_convolution, (inputs,), taps, lag_step)
    padded = torch.nn.functional.pad(inputs, (0, 0, 3, 0))
    short = short_convolution(padded, taps[:4], documents.positions)
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            own = inputs[row : row + 1, start : start + length]
            part = slice(start, start + length)
            expected = causal_convolution(own, taps, lag_step)[0]
            torch.testing.assert_close(long[row, part], expected, rtol=0, atol=1e-12)
            expected = causal_convolution(own, taps[:4])[0]
            torch.testing.assert_close(short[row, part], expected, rtol=0, atol=1e-12)
            start += length


ROWS = [[10, 118, 1, 127, 44], [300], [150, 150], [256, 44]]


@pytest.mark.parametrize("window", [1, 129])
def test_flex_attention_and_its_mask(window):
    source = torch.manual_seed(4)
    q, k, v = (torch.randn(4, 300, 3, 4, generator=source, dtype=torch.float64) for _ in range(3))
    documents, scores = Documents(ROWS), Scores(alibi_slopes(3), window, 5.0)
    found = flex_window_attention(q, k, v, scores, documents)
    expected = sliding_window_attention(q, k, v, scores, documents)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        expected[2, 150:].numpy(),
        reference_attention.attention(*(x[2:3, 150:].numpy() for x in (q, k, v)), window, 5.0)[0],
        atol=1e-7,
        rtol=0,
    )
    numbers = torch.nn.functional.pad(documents.numbers, (0, 84), value=1200)
    mask = document_mask(documents, window)
    length = 3 * BLOCK
    wanted = create_block_mask(in_document(window, numbers), 4, None, length, length, "cpu")
    assert torch.equal(mask.to_dense(), wanted.to_dense())
    for kind in ("kv", "full_kv"):
        own, counts = (getattr(m, f"{kind}_num_blocks") for m in (mask, wanted))
        assert torch.equal(own, counts)
        for place in torch.cartesian_prod(*map(torch.arange, counts.shape)).tolist():
            count = counts[tuple(place)]
            lists = (getattr(m, f"{kind}_indices")[tuple(place)][:count] for m in (mask, wanted))
            assert torch.equal(*lists)


def test_flash_attention_gets_each_document_as_a_sequence(monkeypatch):
    source = torch.manual_seed(5)
    q, k, v = (torch.randn(4, 164, 2, 4, generator=source) for _ in range(3))
    scores, documents = Scores(alibi_slopes(2), 30, 5.0), Documents(LENGTHS)

    def varlen(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **score):
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        bounds = cu_seqlens_q.tolist()
        assert bounds == cu_seqlens_k.tolist()
        assert max_seqlen_q == max_seqlen_k == 164
        assert score.pop("causal")
        assert score.pop("window_size") == (30, 0)
        scores = Scores(score["alibi_slopes"], 30, score["softcap"])
        parts = itertools.pairwise(bounds)
        return torch.cat(
            [
                sliding_window_attention(*(x[None, a:b] for x in (q, k, v)), scores)[0]
                for a, b in parts
            ]
        )

    module = SimpleNamespace(flash_attn_func=None, flash_attn_varlen_func=varlen)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    found = flash_attention(q, k, v, scores, documents)
    expected = sliding_window_attention(q, k, v, scores, documents)
    torch.testing.assert_close(found, expected)
