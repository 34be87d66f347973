"""Paged convolution caches against direct sums, under traffic."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.cache import low_rank, tile_levels
from serve.cache.page_pool import OutOfPages, PagePool, pages_for
from serve.cache.paged_futurefill import ConvolutionCache
from stu.common.errors import UserError
from stu.config import ModelConfig
from stu.filters import spectral_filters
from stu.model import FlashSTU
from tests.reference import convolution as reference

LAYERS, WIDTH = 2, 3


def setup(
    page_len,
    lag_step,
    num_pages=200,
    dtype=torch.float32,
    num_taps=300,
    groups=1,
    max_rows=4,
    spectral=False,
):
    taps = torch.randn(LAYERS, num_taps, WIDTH, dtype=torch.float64) / math.sqrt(num_taps)
    if spectral:
        filters = torch.from_numpy(spectral_filters(lag_step * num_taps, 3)[::lag_step])
        taps = filters @ torch.randn(LAYERS, 3, WIDTH, dtype=torch.float64)
    pool = PagePool(num_pages, (LAYERS, page_len, groups * WIDTH), dtype)
    pool.pages.fill_(math.nan)  # what is read before it is written shows
    convolutions = ConvolutionCache(taps, lag_step, pool, max_rows)
    convolutions._pending.fill_(math.nan)
    convolutions._inputs.fill_(math.nan)
    return convolutions, pool, taps.to(dtype)


@given(
    requests=st.lists(
        st.tuples(st.integers(0, 40), st.integers(1, 50), st.integers(1, 120)),
        min_size=1,
        max_size=4,
    ),
    page_len=st.sampled_from([2, 4, 16]),
    lag_step=st.integers(1, 2),
    groups=st.integers(1, 2),
    core_bytes=st.sampled_from([0, 2000, 2**30]),
    # Of what is to be factored: nothing, tiles of up to 32 columns, everything.
    sample_sizes=st.sampled_from([(64, 0), (4, 40), (64, 256)]),
    spectral=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_every_sequence_equals_its_direct_sum(
    requests, page_len, lag_step, groups, core_bytes, sample_sizes, spectral, seed
):
    """Requests (arrival step, prompt length, new tokens) run together, each at its own position."""
    torch.manual_seed(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tile_levels, "CORE_BYTES", core_bytes)
        patch.setattr(low_rank, "SMALLEST_SAMPLE", sample_sizes[0])
        patch.setattr(low_rank, "LARGEST_SAMPLE", sample_sizes[1])
        convolutions, pool, taps = setup(
            page_len, lag_step, num_pages=250, groups=groups, spectral=spectral
        )
        inputs = [torch.randn(LAYERS, groups, p + n, WIDTH) for _, p, n in requests]
        outputs = [torch.full_like(x, math.nan) for x in inputs]
        rows, places = [], [prompt for _, prompt, _ in requests]
        for step in range(max(arrival + n for arrival, _, n in requests)):
            for owner, (arrival, prompt, new_tokens) in enumerate(requests):
                if arrival == step:
                    convolutions.admit(owner, 0, new_tokens)
                    for layer in range(LAYERS):
                        first = convolutions.prefill(owner, layer, inputs[owner][layer, :, :prompt])
                        outputs[owner][layer, :, :prompt] = first
                    convolutions.join(owner)
                    rows.append(owner)
            for layer in range(LAYERS) if rows else ():
                tokens = torch.cat([inputs[o][layer, :, places[o]] for o in rows])
                # In two calls, where there is more than one row.
                half = len(rows) // 2
                first = convolutions.step(layer, tokens[: half * groups])
                rest = convolutions.step(layer, tokens[half * groups :], half)
                for row, stepped in enumerate(torch.cat([first, rest]).split(groups)):
                    outputs[rows[row]][layer, :, places[rows[row]]] = stepped
            convolutions.advance()
            pool.check_integrity()
            for row in reversed(range(len(rows))):
                owner = rows[row]
                places[owner] += 1
                if places[owner] == sum(requests[owner][1:]):
                    convolutions.leave(row)
                    convolutions.release(owner)
                    rows[row] = rows[-1]
                    rows.pop()
        assert pool.num_used == 0
    for owner in range(len(requests)):
        for layer in range(LAYERS):
            filters = reference.spread(taps[layer].double().numpy(), lag_step)
            expected = reference.causal(inputs[owner][layer].double().numpy(), filters)
            error = np.abs(outputs[owner][layer].numpy() - expected).max()
            assert error <= 2e-6 * np.abs(expected).max()


def test_pages_are_given_back_as_soon_as_no_flush_reads_them():
    """Every flush reads only owned pages, and what is freed early is never read again."""
    convolutions, pool, _ = setup(page_len=4, lag_step=2)
    convolutions.admit(0, 0, 64)
    used = []
    for layer in range(LAYERS):
        convolutions.prefill(0, layer, torch.randn(1, 5, WIDTH))
    convolutions.join(0)
    for _ in range(64):
        for layer in range(LAYERS):
            assert convolutions.step(layer, torch.randn(1, WIDTH)).isfinite().all()
        convolutions.advance()
        free = sorted(set(range(1, 200)) - set(pool.pages_of(0)))
        pool.pages[free] = math.nan
        used.append(pool.num_used)
    # 16 pages; after the 8th, the flush of all eight has read the first half for the last time.
    assert used[0] == used[3 * 4 - 2] == 16
    assert used[8 * 4 - 1] == 8
    assert used[12 * 4 - 1] == 4
    # The last one goes when it is in the ring.
    assert used[15 * 4 - 2] == 2
    assert used[15 * 4 - 1] == used[-1] == 0


def test_sequences_in_step_are_as_each_alone():
    """More of them than are mixed at once."""
    torch.manual_seed(0)
    inputs = torch.randn(7, LAYERS, 60, WIDTH)

    def decode(numbers):
        torch.manual_seed(1)
        convolutions, _, _ = setup(page_len=4, lag_step=2, max_rows=len(numbers), spectral=True)
        for owner, number in enumerate(numbers):
            convolutions.admit(owner, 0, 50)
            for layer in range(LAYERS):
                convolutions.prefill(owner, layer, inputs[number, None, layer, :10])
            convolutions.join(owner)
        outputs = []
        for position in range(10, 60):
            tokens = inputs[numbers, :, position].transpose(0, 1)
            stepped = [convolutions.step(layer, its) for layer, its in enumerate(tokens)]
            outputs.append(torch.stack(stepped, dim=1))
            convolutions.advance()
        return torch.stack(outputs, dim=2)

    together = decode(list(range(7)))
    for number in range(7):
        assert torch.equal(together[number], decode([number])[0])


@pytest.mark.parametrize("num_pages", [63, 64, 65, 100])
def test_summaries_take_the_pages_of_their_tiles(num_pages):
    """Of filters with low rank: what is kept for later fits in the pages already done, some of
    which are given back; none is read again, and none is left at the end."""
    convolutions, pool, _ = setup(page_len=4, lag_step=2, spectral=True, num_taps=400)
    tiles = convolutions._tiles
    smallest, summary_pages = tiles._smallest_summary, tiles._summary_pages
    assert 2 <= smallest <= 4
    assert len(tiles._levels) > 6
    convolutions.admit(0, 0, num_pages * 4)
    for layer in range(LAYERS):
        convolutions.prefill(0, layer, torch.randn(1, 5, WIDTH))
    convolutions.join(0)
    used = [num_pages]
    for done in range(1, num_pages + 1):
        for _ in range(4):
            for layer in range(LAYERS):
                assert convolutions.step(layer, torch.randn(1, WIDTH)).isfinite().all()
            convolutions.advance()
        free = sorted(set(range(1, 200)) - set(pool.pages_of(0)))
        pool.pages[free] = math.nan
        used.append(pool.num_used)
        sequence = convolutions._sequences[0]
        kept = [*sequence.tiles, *sequence.pending.values()]
        left = num_pages - done - (done == num_pages - 1)
        assert used[-1] == max(0, left) + sum(len(pages) for pages in kept)
        assert len(kept) <= done.bit_length() + max(0, done.bit_length() - smallest)
    assert used == sorted(used, reverse=True)
    assert used[num_pages // 2] <= num_pages // 2 + 1 + 2**smallest + 7 * summary_pages
    assert used[-2:] == [0, 0]


@pytest.mark.parametrize("new_tokens", [0, 1, 15, 16, 17, 100])
def test_cache_bytes_do_not_depend_on_the_prompt(new_tokens):
    for prompt in (1, 150):
        convolutions, pool, _ = setup(page_len=16, lag_step=2)
        convolutions.admit(3, 0, new_tokens)
        convolutions.prefill(3, 0, torch.randn(1, prompt, WIDTH))
        assert pool.num_used == pages_for(new_tokens, 16)
        assert pool.page_bytes == LAYERS * 16 * WIDTH * 4
        rings = 2 * 4 * pool.page_bytes  # two for each of the four rows
        assert convolutions.num_bytes == 200 * pool.page_bytes + rings


def test_cores_beyond_the_bound_are_computed_again(monkeypatch):
    def decode():
        torch.manual_seed(0)
        convolutions, _, _ = setup(4, 2, num_taps=100, dtype=torch.float64, spectral=True)
        convolutions.admit(0, 0, 100)
        for layer in range(LAYERS):
            convolutions.prefill(0, layer, torch.randn(1, 3, WIDTH).double())
        convolutions.join(0)
        outputs = []
        for _ in range(100):
            tokens = torch.randn(LAYERS, 1, WIDTH).double()
            outputs.append([convolutions.step(i, tokens[i]) for i in range(LAYERS)])
            convolutions.advance()
        return torch.cat([torch.cat(step) for step in outputs]), convolutions._tiles._levels

    kept, levels = decode()
    assert all(level.cores is not None for level in levels)
    monkeypatch.setattr(tile_levels, "CORE_BYTES", 500)
    again, levels = decode()
    assert torch.equal(kept, again)
    assert [level.cores is None for level in levels] == [i > 0 for i in range(len(levels))]


def test_no_room():
    convolutions, pool, _ = setup(page_len=16, lag_step=2, num_pages=5)
    with pytest.raises(OutOfPages, match="5 pages are needed and 4 of 4 free"):
        convolutions.admit(0, 0, 70)
    assert pool.num_used == 0


@pytest.mark.parametrize(("page_len", "lag_step"), [(12, 2), (1, 2), (16, 3)])
def test_page_len_is_checked(page_len, lag_step):
    with pytest.raises(UserError, match=f"page_len={page_len} is not allowed"):
        setup(page_len, lag_step)


def spectral_taps(width):
    """Channels of very different size."""
    filters = torch.from_numpy(spectral_filters(4096, 24)[::2]).float().double()
    weights = torch.randn(LAYERS, 24, width, dtype=torch.float64) * torch.logspace(-3, 3, width)
    return filters @ weights, 2


def hyena_taps(width):
    """Of a fresh model, which have no low rank."""
    shape = {"width": width, "num_layers": LAYERS, "num_heads": 1, "max_seq_len": 2500}
    return FlashSTU(ModelConfig(vocab_size=9, layout="hyena", **shape)).convolution_taps()


@pytest.mark.parametrize("mean", [0, 1])
@pytest.mark.parametrize("make_taps", [spectral_taps, hyena_taps])
def test_a_long_run(make_taps, mean, caplog):
    """Tiles of 1,024 positions, each channel right by itself, whether its terms cancel or not."""
    torch.manual_seed(0)
    taps, lag_step = make_taps(8)
    pool = PagePool(100, (LAYERS, 32, 8))
    convolutions = ConvolutionCache(taps, lag_step, pool, 1)
    assert bool(caplog.messages) == (make_taps is hyena_taps)
    inputs = mean + (0.1 if mean else 1) * torch.randn(LAYERS, 2500, 8)
    outputs = torch.empty_like(inputs)
    convolutions.admit(0, 0, 2100)
    for layer in range(LAYERS):
        outputs[layer, :400] = convolutions.prefill(0, layer, inputs[None, layer, :400])[0]
    convolutions.join(0)
    for position in range(400, 2500):
        for layer in range(LAYERS):
            outputs[layer, position] = convolutions.step(layer, inputs[layer, position, None])[0]
        convolutions.advance()
    filters = reference.spread(taps.transpose(0, 1).numpy(), lag_step)
    for layer in range(LAYERS):
        expected = reference.causal(inputs[None, layer].double().numpy(), filters[:, layer])[0]
        error = np.abs(outputs[layer].numpy() - expected).max(0)
        assert (error <= 2e-6 * np.abs(expected).max(0)).all()
