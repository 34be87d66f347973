"""Caches of long convolutions against direct sums, under traffic."""

import math
from dataclasses import dataclass
from itertools import count

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.cache.alternating_states import AlternatingStates
from serve.cache.mixed_states import MixedStates
from serve.cache.page_pool import OutOfPages, PagePool
from serve.cache.paged_futurefill import PagedFutureFill
from stu.common.errors import UserError
from stu.config import ModelConfig
from stu.convolution import causal_convolution
from stu.decoding.memory import pages_for
from stu.filters import spectral_filters
from stu.model import FlashSTU
from stu.realisation import fitting_realisation
from tests.reference import convolution as reference

LAYERS, WIDTH, ROWS, NUM_TAPS = 3, 3, 4, 300


@dataclass
class Setup:
    """A cache, full of NaN, which shows if it is read before it is written."""

    cache: PagedFutureFill | MixedStates | AlternatingStates
    filters: torch.Tensor
    """Filters over all lags, `[LAYERS, N, C]` in float64."""
    streams: int
    """Streams of a sequence."""
    channels: int
    same_inputs: bool = False
    """Whether all channels of a stream have the same input."""


def setup(kind, page_len=8, lag_step=2, dtype=torch.float32, num_taps=NUM_TAPS, rows=ROWS):
    streams, channels = 1, WIDTH
    if kind == "pages":
        taps = torch.randn(LAYERS, num_taps, WIDTH, dtype=torch.float64) / math.sqrt(num_taps)
        streams = 2
        pool = PagePool(250, (LAYERS, page_len, streams * WIDTH), dtype)
        pool.pages.fill_(math.nan)
        cache = PagedFutureFill(taps, lag_step, pool, rows)
    else:
        lag_step = lag_step if kind == "mixed" else 1
        basis = torch.from_numpy(spectral_filters(lag_step * num_taps, 6)[::lag_step])
        if kind == "mixed":
            weights = torch.randn(LAYERS, 6, WIDTH, dtype=torch.float64)
            taps = basis @ weights
            found, _ = fitting_realisation(basis, list(weights), dtype)
            cache = MixedStates(found, basis, weights, lag_step, rows, page_len, dtype)
        else:
            streams, channels = 2, 12
            alternating = torch.from_numpy(reference.alternating(num_taps)) * basis
            taps = torch.cat([basis, alternating], 1).expand(LAYERS, -1, -1)
            found, _ = fitting_realisation(basis, [None], dtype)
            cache = AlternatingStates(found, basis, LAYERS, streams, rows, page_len, dtype)
    for name in ("_states", "_inputs", "_pending", "_narrow"):
        if hasattr(cache, name):
            getattr(cache, name).fill_(math.nan)
    spread = [reference.spread(own.to(dtype).double().numpy(), lag_step) for own in taps]
    filters = torch.from_numpy(np.stack(spread))
    return Setup(cache, filters, streams, channels, same_inputs=kind == "alternating")


def random_inputs(made, length, dtype=torch.float32):
    """Inputs of all layers, `[LAYERS, streams, length, C]`."""
    shape = LAYERS, made.streams, length, 1 if made.same_inputs else made.channels
    return torch.randn(shape, dtype=dtype).expand(-1, -1, -1, made.channels)


def prefill(made, row, inputs, chunks):
    """Prefill a prompt in chunks; return its outputs in the shape of `inputs`."""
    outputs, first = torch.empty_like(inputs), 0
    for length in chunks:
        made.cache.begin_chunk(row, length)
        part = slice(first, first + length)
        for layer in range(LAYERS):
            outputs[layer, :, part] = made.cache.prefill(row, layer, inputs[layer, :, part])
        first += length
    assert first == inputs.shape[2]
    return outputs


def step(made, rows, inputs, split=False):
    """Decode a token of each row, in two calls if asked: `[rows, LAYERS, streams, C]` both ways."""
    made.cache.begin_step(rows, alone=False)
    outputs = torch.empty_like(inputs)
    half = len(rows) // 2 if split else 0
    for layer in range(LAYERS):
        tokens = inputs[:, layer].flatten(0, 1)
        first = made.cache.step(layer, tokens[: half * made.streams]) if half else tokens[:0]
        padded = torch.cat([tokens[half * made.streams :], torch.ones_like(tokens[:2])])
        rest = made.cache.step(layer, padded, half)[: len(tokens) - len(first)]
        outputs[:, layer] = torch.cat([first, rest]).unflatten(0, (-1, made.streams))
    made.cache.advance()
    return outputs


def decode(made, row, inputs):
    """Decode the tokens of the only row, one by one; both `[LAYERS, streams, T, C]`."""
    stepped = [step(made, [row], inputs[None, :, :, i])[0] for i in range(inputs.shape[2])]
    return torch.stack(stepped, 2)


def largest_error(made, inputs, outputs):
    """The largest error of outputs, relative to a channel's largest output in each layer."""
    errors = []
    for layer in range(LAYERS):
        expected = reference.causal(inputs[layer].double().numpy(), made.filters[layer].numpy())
        error = np.abs(outputs[layer].double().numpy() - expected).max((0, 1))
        errors.append((error / np.abs(expected).max((0, 1))).max())
    return max(errors)


@given(
    kind=st.sampled_from(["pages", "mixed", "alternating"]),
    requests=st.lists(
        st.tuples(
            st.integers(0, 40),
            st.lists(st.integers(1, 30), min_size=1, max_size=3),
            st.integers(1, 120),
        ),
        min_size=1,
        max_size=4,
    ),
    page_len=st.sampled_from([2, 4, 16]),
    lag_step=st.integers(1, 2),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=25, deadline=None)
def test_every_sequence_equals_its_direct_sum(kind, requests, page_len, lag_step, seed):
    """Requests (arrival step, chunks of the prompt, new tokens) come and go, each at its own
    position and with the lowest free row."""
    torch.manual_seed(seed)
    made = setup(kind, page_len, lag_step)
    cache, dtype = made.cache, torch.float32
    lengths = [sum(chunks) + new_tokens for _, chunks, new_tokens in requests]
    inputs = [random_inputs(made, length, dtype) for length in lengths]
    outputs, places, running = [], {}, {}  # request by row
    outputs = [torch.full(x.shape, math.nan) for x in inputs]
    for now in range(max(arrival + new_tokens for arrival, _, new_tokens in requests)):
        for number, (arrival, chunks, new_tokens) in enumerate(requests):
            if arrival == now:
                row = next(row for row in count() if row not in running)
                prompt = sum(chunks)
                cache.admit(row, prompt, new_tokens)
                pieces = chunks if cache.takes_chunks else [prompt]
                first = prefill(made, row, inputs[number][:, :, :prompt], pieces)
                outputs[number][:, :, :prompt] = first
                cache.join(row)
                running[row], places[number] = number, prompt
        rows = sorted(running)
        if rows:
            tokens = [inputs[running[row]][:, :, places[running[row]]] for row in rows]
            stepped = step(made, rows, torch.stack(tokens), split=True)
            for row, output in zip(rows, stepped, strict=True):
                outputs[running[row]][:, :, places[running[row]]] = output
        else:
            cache.advance()
        cache.check_integrity(rows)
        for row in rows:
            number = running[row]
            places[number] += 1
            if places[number] == lengths[number]:
                cache.leave(row)
                cache.release(row)
                del running[row]
    assert cache.num_used == 0
    for own_inputs, own_outputs in zip(inputs, outputs, strict=True):
        assert largest_error(made, own_inputs, own_outputs) <= 2e-6


@pytest.mark.parametrize("kind", ["pages", "mixed", "alternating"])
def test_sequences_in_step_are_as_each_alone(kind):
    """To the last bit, with more rows than are advanced together, and with rows between them that
    are not used."""

    def decode_rows(numbers, rows):
        torch.manual_seed(1)
        made = setup(kind, page_len=4, rows=20)
        torch.manual_seed(0)
        inputs = torch.stack([random_inputs(made, 60) for _ in range(11)])[numbers]
        for row, own in zip(rows, inputs, strict=True):
            made.cache.admit(row, 10, 50)
            prefill(made, row, own[:, :, :10], [10])
            made.cache.join(row)
        stepped = [step(made, rows, inputs[:, :, :, position]) for position in range(10, 60)]
        return torch.stack(stepped, 3)

    together = decode_rows(list(range(11)), [0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 13])
    for number in range(11):
        assert torch.equal(together[number], decode_rows([number], [number % 3])[0])


@pytest.mark.parametrize("kind", ["mixed", "alternating"])
def test_outputs_do_not_depend_on_when_an_aligned_row_joins(kind):
    """To the last bit, if it waits until the clock fits."""

    def decode_after(steps_before):
        torch.manual_seed(1)
        made = setup(kind, page_len=8)
        inputs = random_inputs(made, 50)
        for _ in range(steps_before):
            made.cache.advance()
        made.cache.admit(0, 13, 0)
        outputs = [prefill(made, 0, inputs[:, :, :13], [8, 5])]
        made.cache.skip(made.cache.steps_until_aligned(13))
        made.cache.join(0)
        outputs.append(decode(made, 0, inputs[:, :, 13:]))
        return torch.cat(outputs, 2)

    first = decode_after(0)
    for steps_before in (1, 8, 29):
        assert torch.equal(decode_after(steps_before), first)


@pytest.mark.parametrize("kind", ["mixed", "alternating"])
def test_a_row_that_ended_leaves_nothing_behind(kind):
    """Idle rows stay 0."""
    torch.manual_seed(0)
    made = setup(kind, page_len=32)
    inputs = random_inputs(made, 100)

    def run():
        made.cache.admit(2, 7, 0)
        outputs = [prefill(made, 2, inputs[:, :, :7], [7])]
        made.cache.join(2)
        outputs.append(decode(made, 2, inputs[:, :, 7:]))
        made.cache.leave(2)
        made.cache.release(2)
        return torch.cat(outputs, 2)

    run()
    for _ in range(10**6):
        made.cache.advance()
    assert not made.cache._states[2].any()
    assert not made.cache._inputs[2].any()
    assert largest_error(made, inputs, run()) <= 2e-6


@given(
    kind=st.sampled_from(["mixed", "alternating"]),
    lag_step=st.integers(1, 2),
    steps_before=st.integers(0, 20),
    chunks=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    decoded=st.integers(0, 40),
    rest=st.lists(st.integers(1, 20), max_size=2),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=25, deadline=None)
def test_sequences_continue_from_a_snapshot(
    kind, lag_step, steps_before, chunks, decoded, rest, seed
):
    """One goes on, and another begins like it, in its own row and at its own time."""
    torch.manual_seed(seed)
    made = setup(kind, page_len=8, lag_step=lag_step)
    cache, prompt = made.cache, sum(chunks)
    length, shared = prompt + decoded + 60, prompt + decoded
    first = random_inputs(made, length)
    second = torch.cat([first[:, :, :shared], random_inputs(made, 60)], 2)
    for _ in range(steps_before):
        cache.advance()
    cache.admit(1, 0, 0)
    outputs = [prefill(made, 1, first[:, :, :prompt], chunks)]
    if decoded:
        cache.join(1)
        outputs.append(decode(made, 1, first[:, :, prompt:shared]))
    snapshot = cache.snapshot(1, shared)
    assert snapshot.num_bytes == cache._states[1].nbytes
    if not decoded:
        cache.join(1)
    known = torch.cat([*outputs, decode(made, 1, first[:, :, shared:])], 2)
    assert largest_error(made, first, known) <= 2e-6
    cache.leave(1)
    cache.release(1)

    cache.admit(0, 0, 0)
    cache.restore(0, snapshot)
    continued = prefill(made, 0, second[:, :, shared : shared + sum(rest)], rest)
    cache.join(0)
    stepped = decode(made, 0, second[:, :, shared + sum(rest) :])
    known = torch.cat([known[:, :, :shared], continued, stepped], 2)
    assert largest_error(made, second, known) <= 2e-6


def test_pages_are_given_back_as_soon_as_no_flush_reads_them():
    """Every flush reads only owned pages, and what is freed early is never read again."""
    made = setup("pages", page_len=4)
    cache, pool = made.cache, made.cache.pool
    cache.admit(0, 5, 64)
    used = []
    prefill(made, 0, random_inputs(made, 5), [5])
    cache.join(0)
    for _ in range(64):
        assert step(made, [0], random_inputs(made, 1)[None, :, :, 0]).isfinite().all()
        free = sorted(set(range(1, 250)) - set(pool.pages_of(0)))
        pool.pages[free] = math.nan
        used.append(pool.num_used)
    # 16 pages; after the 8th, the flush of all eight has read the first half for the last time.
    assert used[0] == used[3 * 4 - 2] == 16
    assert used[8 * 4 - 1] == 8
    assert used[12 * 4 - 1] == 4
    # The last one goes when it is in the ring.
    assert used[15 * 4 - 2] == 2
    assert used[15 * 4 - 1] == used[-1] == 0


@pytest.mark.parametrize("new_tokens", [0, 1, 15, 16, 17, 100])
def test_bytes_do_not_depend_on_the_prompt(new_tokens):
    for prompt in (1, 150):
        made = setup("pages", page_len=16)
        pool = made.cache.pool
        made.cache.admit(3, prompt, new_tokens)
        made.cache.prefill(3, 0, torch.randn(2, prompt, WIDTH))
        assert pool.num_used == pages_for(new_tokens, 16)
        assert pool.page_bytes == LAYERS * 16 * 2 * WIDTH * 4
        rings = 2 * (ROWS + 1) * pool.page_bytes  # two for each row and for padding
        assert made.cache.num_bytes == 250 * pool.page_bytes + rings


@pytest.mark.parametrize(("kind", "numbers"), [("mixed", 2 * WIDTH), ("alternating", 2 * 2)])
def test_states_have_the_bytes_of_the_formula(kind, numbers):
    """For each channel and signal: the state, and twice a page, or the state again and a page."""
    made = setup(kind, page_len=16)
    rank = made.cache._states.shape[3]
    narrow = 2 * 8 if kind == "mixed" else rank + 16  # a signal has 8 of a page's 16 positions
    assert made.cache.num_bytes == (ROWS + 1) * LAYERS * numbers * (8 * rank + 4 * narrow)
    for row in range(ROWS):
        made.cache.admit(row, 1, 10**9)
    with pytest.raises(OutOfPages, match="all 4 blocks are in use"):
        made.cache.admit(ROWS, 1, 1)


def test_no_room():
    cache = setup("pages", page_len=16).cache
    with pytest.raises(OutOfPages, match="300 pages are needed and 249 of 249 free"):
        cache.admit(0, 0, 4800)
    assert cache.pool.num_used == 0


@pytest.mark.parametrize(
    ("kind", "page_len", "lag_step"), [("pages", 12, 2), ("pages", 1, 2), ("mixed", 16, 3)]
)
def test_page_len_is_checked(kind, page_len, lag_step):
    with pytest.raises(UserError, match=f"page_len={page_len} is not allowed"):
        setup(kind, page_len, lag_step)


BOUNDS = {0: 5e-7, 0.5: 2e-6, 5: 5e-6}
"""Largest errors of a channel, relative to its largest output, by the mean of the inputs in
standard deviations."""


@pytest.mark.parametrize(
    ("length", "mean"),
    [
        (2048, 0.5),
        *(
            pytest.param(length, mean, marks=pytest.mark.slow)
            for length in (4096, 16384)
            for mean in BOUNDS
        ),
    ],
)
def test_a_long_run_with_states(length, mean):
    """Channels of very different size, each right by itself, whether its terms cancel or not."""
    torch.manual_seed(0)
    basis = torch.from_numpy(spectral_filters(2 * length, 24)[::2]).float().double()
    weights = torch.randn(LAYERS, 24, 8, dtype=torch.float64) * torch.logspace(-3, 3, 8)
    found, _ = fitting_realisation(basis, list(weights), torch.float32)
    cache = MixedStates(found, basis, weights, 2, 1, 32, torch.float32)
    spread = [reference.spread(own.numpy(), 2)[:length] for own in basis @ weights]
    made = Setup(cache, torch.from_numpy(np.stack(spread)), 1, 8)
    inputs = mean + torch.randn(LAYERS, 1, length, 8)
    cache.admit(0, 400, 0)
    outputs = [prefill(made, 0, inputs[:, :, :400], [300, 100])]
    cache.join(0)
    outputs.append(decode(made, 0, inputs[:, :, 400:]))
    assert largest_error(made, inputs, torch.cat(outputs, 2)) <= BOUNDS[mean]


@pytest.mark.slow
def test_errors_do_not_grow_with_the_length():
    """Over 131,072 decoded positions, against a float64 convolution by FFT."""
    torch.manual_seed(0)
    length, lag_step = 131072, 2
    basis = torch.from_numpy(spectral_filters(length, 24)[::lag_step]).float().double()
    weights = torch.randn(1, 24, 4, dtype=torch.float64)
    found, _ = fitting_realisation(basis, list(weights), torch.float32)
    cache = MixedStates(found, basis, weights, lag_step, 1, 32, torch.float32)
    inputs = 0.5 + torch.randn(length, 4)
    cache.admit(0, 0, 0)
    cache.join(0)
    outputs = []
    for token in inputs:
        cache.begin_step([0], alone=False)
        outputs.append(cache.step(0, token[None])[0].clone())
        cache.advance()
    expected = causal_convolution(inputs[None].double(), basis @ weights[0], lag_step)[0]
    errors = (torch.stack(outputs) - expected).abs() / expected.abs().amax(0)
    assert errors.max() <= BOUNDS[0.5]
    quarters = [part.max() for part in errors.chunk(4)]
    assert quarters[3] <= 2 * quarters[1]


@pytest.mark.parametrize("length", [1200, pytest.param(2500, marks=pytest.mark.slow)])
def test_a_long_run_in_float64(length):
    torch.manual_seed(0)
    basis = torch.from_numpy(spectral_filters(4096, 24)[::2])
    weights = torch.randn(LAYERS, 24, 8, dtype=torch.float64)
    found, _ = fitting_realisation(basis, list(weights), torch.float64)
    cache = MixedStates(found, basis, weights, 2, 1, 32, torch.float64)
    spread = [reference.spread(own.numpy(), 2) for own in basis @ weights]
    made = Setup(cache, torch.from_numpy(np.stack(spread)), 1, 8)
    inputs = torch.randn(LAYERS, 1, length, 8, dtype=torch.float64)
    cache.admit(0, 600, 0)
    outputs = [prefill(made, 0, inputs[:, :, :600], [600])]
    cache.join(0)
    outputs.append(decode(made, 0, inputs[:, :, 600:]))
    assert largest_error(made, inputs, torch.cat(outputs, 2)) <= 1e-11


@pytest.mark.parametrize("mean", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_long_run_of_hyena(mean):
    """Filters of a fresh model, which have no state, in tiles of 1,024 positions."""
    torch.manual_seed(0)
    shape = {"width": 8, "num_layers": LAYERS, "num_heads": 1, "max_seq_len": 2500}
    model = FlashSTU(ModelConfig(vocab_size=9, layout="hyena", **shape))
    taps, lag_step = model.convolution_taps()
    cache = PagedFutureFill(taps, lag_step, PagePool(100, (LAYERS, 32, 8)), 1)
    made = Setup(cache, taps, 1, 8)
    inputs = mean + (0.1 if mean else 1) * torch.randn(LAYERS, 1, 2500, 8)
    cache.admit(0, 400, 2100)
    outputs = [prefill(made, 0, inputs[:, :, :400], [400])]
    cache.join(0)
    outputs.append(decode(made, 0, inputs[:, :, 400:]))
    assert largest_error(made, inputs, torch.cat(outputs, 2)) <= 2e-6
