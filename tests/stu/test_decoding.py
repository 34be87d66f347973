"""Decoding step by step equals one forward pass over the whole sequence."""

import itertools

import pytest
import torch

from stu.config import ModelConfig
from stu.futurefill import Continuous, Epoched
from stu.model import FlashSTU
from stu.online_convolution import Naive
from tests.reference.decoding import Runner

VOCAB_SIZE = 40
PROMPT_LENGTHS = 1, 2, 3, 13, 16, 17
NUM_NEW = 80
WINDOW_SMALLER, WINDOW_LARGER = 7, 200  # than the sequences
LAYOUTS = [
    *itertools.product(["stu"], ["tensordot", "full"], [WINDOW_SMALLER]),
    *itertools.product(["hybrid"], ["tensordot", "full"], [WINDOW_SMALLER, WINDOW_LARGER]),
    ("hyena", "tensordot", WINDOW_SMALLER),
]


class ShortPages(Continuous):
    """`Continuous` with pages so short that these sequences fill tiles of many sizes."""

    def __init__(self, taps, batch, max_new_tokens, lag_step=1):
        super().__init__(taps, batch, max_new_tokens, lag_step, page_columns=4)


CONVOLUTIONS = [Naive, Epoched, Continuous, ShortPages]


def build(dtype=torch.float32, **settings):
    torch.manual_seed(0)
    shape = {"width": 16, "num_layers": 4, "num_filters": 6, "num_heads": 2, "max_seq_len": 128}
    config = ModelConfig(vocab_size=VOCAB_SIZE, **{**shape, **settings})
    return FlashSTU(config).to(dtype).eval()


def decode(model, sequences, prompt_lengths, num_new, convolution=Continuous):
    """Return logits `[B, num_new + 1, vocab]` from the last prompt token on."""
    prompts = [row[:length].tolist() for row, length in zip(sequences, prompt_lengths, strict=True)]
    runner = Runner(model, prompts, num_new, convolution)
    logits = [runner.prefill()]
    for step in range(num_new):
        rows = zip(sequences, prompt_lengths, strict=True)
        logits.append(runner.step(torch.stack([row[length + step] for row, length in rows])))
    return torch.stack(logits, dim=1)


def random_tokens(num_rows, length):
    return torch.randint(0, VOCAB_SIZE, (num_rows, length), generator=torch.manual_seed(1))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
@pytest.mark.parametrize(
    ("convolution", "layout", "stu_form", "window_tokens"),
    [
        *((convolution, *layout) for convolution in CONVOLUTIONS for layout in LAYOUTS),
        (Naive, "attention", "tensordot", WINDOW_SMALLER),  # without convolutions
        (Naive, "attention", "tensordot", WINDOW_LARGER),
    ],
)
def test_decoding_equals_the_forward_pass(
    convolution, layout, stu_form, window_tokens, dtype, tolerance
):
    model = build(dtype, layout=layout, stu_form=stu_form, window_tokens=window_tokens)
    sequences = random_tokens(len(PROMPT_LENGTHS), max(PROMPT_LENGTHS) + NUM_NEW)
    decoded = decode(model, sequences, PROMPT_LENGTHS, NUM_NEW, convolution)
    with torch.inference_mode():
        forward = model(sequences)
    assert decoded.dtype == dtype
    for row, length in enumerate(PROMPT_LENGTHS):
        expected = forward[row, length - 1 : length + NUM_NEW]
        worst = (decoded[row] - expected).abs().max() / expected.abs().max()
        assert worst < tolerance, f"prompt of {length} tokens"


@pytest.mark.parametrize("layout", ["hybrid", "hyena"])
def test_decoding_can_fill_the_whole_context(layout):
    model = build(torch.float64, max_seq_len=64, layout=layout)
    sequences = random_tokens(2, 64)
    decoded = decode(model, sequences, [63, 63], 1)
    with torch.inference_mode():
        torch.testing.assert_close(decoded, model(sequences)[:, 62:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("convolution", [Naive, Epoched, Continuous])
@pytest.mark.parametrize("layout", ["stu", "hybrid", "hyena"])
def test_bfloat16_decoding_stays_near_the_forward_pass(layout, convolution):
    model = build(torch.bfloat16, layout=layout, window_tokens=WINDOW_SMALLER)
    sequences = random_tokens(2, 60)
    decoded = decode(model, sequences, [20, 20], 40, convolution)
    with torch.inference_mode():
        forward = model(sequences)[:, 19:]
    assert decoded.dtype == torch.bfloat16
    # Sums differ by a float32 rounding, which now and then crosses one of bfloat16.
    assert (decoded - forward).abs().mean() < 1e-3 * forward.abs().max()


def test_step_beyond_max_new_tokens_raises():
    runner = Runner(build(), [[1, 2]], 1)
    runner.prefill()
    runner.step(torch.tensor([3]))
    with pytest.raises(ValueError, match="all max_new_tokens=1 tokens are decoded"):
        runner.step(torch.tensor([4]))
