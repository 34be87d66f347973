"""Bytes that caches take for what the layers of a model remember of a sequence.

`serve.cache` allocates them, and `stu-plan --serve` adds them up without a model's weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from stu.filters import spectral_filters
from stu.mixers import KeyWindow, LastInputs, PastInputs
from stu.realisation import NoRealisation, fitting_realisation

STATE_BYTES = 8
"""Bytes of a number of a state, in float64."""
SEED, RANDOM_CHANNELS = 0, 64


@dataclass(frozen=True)
class CacheSize:
    """Memory that a cache takes."""

    fixed_bytes: int = 0
    """Bytes allocated for all rows, independent of the number of pages."""
    page_bytes: int = 0
    """Bytes of one page; 0 for a cache without pages."""
    least_pages: int = 0
    """Pages without which no request can run."""
    usual_pages: int = 0
    """Pages of a request of the usual length."""
    most_pages: int = 0
    """Pages of the longest request."""
    snapshot_bytes: int = 0
    """Bytes of a snapshot besides its pages."""
    snapshot_pages: int = 0
    """Most pages that a snapshot shares."""


def bytes_for(sizes: Sequence[CacheSize], pages: Sequence[int], rows: int) -> int:
    """Return the bytes that caches must share so that each has its number of `pages` for each of
    `rows` sequences. They share in proportion to the pages of usual sequences, even if these need
    fewer (`serve.cache.budget`)."""
    needed = [rows * count for count in pages]
    usual = sum(size.usual_pages * size.page_bytes for size in sizes)
    paged = [(size, count) for size, count in zip(sizes, needed, strict=True) if size.page_bytes]
    shares = [
        -(-usual * count // size.usual_pages) for size, count in paged if count > size.least_pages
    ]
    least = sum(max(size.least_pages, count) * size.page_bytes for size, count in paged)
    return sum(size.fixed_bytes for size in sizes) + max([least, *shares])


def state_size(past: PastInputs, layers: int, rank: int, page_len: int, itemsize: int) -> CacheSize:
    """Return the memory of spectral states, a page for each sequence and one for padding."""
    states = layers * state_bytes(past, rank)
    page_bytes = states + layers * state_page_bytes(past, rank, page_len, itemsize)
    return CacheSize(page_bytes, page_bytes, 1, 1, 1, snapshot_bytes=states)


def pending_size(
    layers: Sequence[PastInputs],
    rows: int,
    max_seq_len: int,
    page_len: int,
    itemsize: int,
    expected_tokens: int | None = None,
) -> CacheSize:
    """Return the memory of layers that FutureFill caches in pages: beside them a null page, and two
    rings of each row and of padding.

    expected_tokens: New tokens of a usual sequence; None: half of the longest sequence.
    """
    page_bytes = sum(pending_page_bytes(past, page_len, itemsize) for past in layers)
    usual = min(expected_tokens or max(1, max_seq_len // 2), max_seq_len)
    pages = pages_for(usual, page_len), pages_for(max_seq_len, page_len)
    return CacheSize((2 * rows + 3) * page_bytes, page_bytes, 1, *pages)


def window_size(
    windows: Sequence[KeyWindow], num_tokens: int, page_len: int, itemsize: int, drafts: int = 0
) -> CacheSize:
    """Return the memory of the attention windows of all layers, which are alike, in sequences of
    `num_tokens`, with a null page. `drafts`: most tokens of a step besides the first of a row."""
    page_bytes = sum(window_page_bytes(window, page_len, itemsize) for window in windows)
    touched = window_pages(windows[0].window_tokens, page_len, drafts)
    pages = min(pages_for(num_tokens, page_len), touched)
    return CacheSize(page_bytes, page_bytes, pages, pages, pages, page_bytes, pages - 1)


def last_input_size(layers: Sequence[LastInputs], rows: int, itemsize: int) -> CacheSize:
    """Return the memory of the last inputs of short convolutions, for each row and padding."""
    row_bytes = sum(last_input_bytes(layer, itemsize) for layer in layers)
    return CacheSize((rows + 1) * row_bytes, snapshot_bytes=row_bytes)


def pages_for(positions: int, page_len: int) -> int:
    """Return the number of pages that hold `positions`."""
    return -(-positions // page_len)


def window_pages(window_tokens: int, page_len: int, more_tokens: int = 0) -> int:
    """Return the number of pages that a token, its window, and tokens after it can touch."""
    return pages_for(window_tokens + more_tokens, page_len) + 1


def state_bytes(past: PastInputs, rank: int) -> int:
    """Return the bytes of a layer's states of one sequence, with `rank` numbers for each channel
    and signal: phases of STU-T, and inputs and alternating inputs of the full form."""
    signals = past.lag_step * past.channels if past.basis == "mixed" else 2 * past.streams
    return STATE_BYTES * rank * signals


def state_page_bytes(past: PastInputs, rank: int, page_len: int, itemsize: int) -> int:
    """Return the bytes of a layer's page beside its states: of mixed filters its inputs and pending
    outputs, of alternating ones its inputs and the states in narrow coordinates."""
    if past.basis == "mixed":
        return past.channels * 2 * page_len * itemsize
    narrow = min(rank, page_len * past.channels // 2)
    return 2 * past.streams * (narrow + page_len) * itemsize


def pending_page_bytes(past: PastInputs, page_len: int, itemsize: int) -> int:
    """Return the bytes of `page_len` positions of a layer that FutureFill caches in pages."""
    return page_len * past.channels * past.streams * itemsize


def window_page_bytes(window: KeyWindow, page_len: int, itemsize: int) -> int:
    """Return the bytes of the keys and values of `page_len` positions of a layer."""
    return 2 * page_len * window.num_heads * window.head_dim * itemsize


def last_input_bytes(last: LastInputs, itemsize: int) -> int:
    """Return the bytes of the last inputs of a short convolution."""
    return (last.num_taps - 1) * last.channels * itemsize


def usual_rank(past: PastInputs, max_seq_len: int, num_filters: int) -> int | None:
    """Return the rank of the states of spectral filters that are weighted at random, as those of a
    new model; None for layers without states. It takes seconds."""
    if not past.may_have_states:
        return None
    filters = torch.from_numpy(spectral_filters(max_seq_len, num_filters)).float().double()
    basis = past.lag_step * filters[:: past.lag_step]
    weights: Sequence[torch.Tensor | None] = [None]
    if past.basis == "mixed":
        random = torch.Generator().manual_seed(SEED)
        shape = num_filters, RANDOM_CHANNELS
        weights = [torch.randn(shape, generator=random, dtype=torch.float64)]
    try:
        return fitting_realisation(basis, weights, torch.float32)[0].rank
    except NoRealisation:
        return None
