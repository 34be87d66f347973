"""What the online convolutions of a run take: bytes held, multiply-adds, numbers moved.

Formulas of the algorithms of Agarwal et al., "FutureFill", ICLR 2026, with the constants of
`stu.futurefill` and `serve.cache.tiles`, for one channel of one layer of one sequence. Positions
are counted from the first new token, for Flash Inference from the prompt's first.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from benchmarks.costs import FLOAT_BYTES, Costs
from serve.cache.tiles import TILES_AT_ONCE, TileFlush
from stu.convolution import fast_fft_length
from stu.online_convolution import Naive

TURNS, TURNS_TRANSPOSED = 2, 4
"""How often a number is read, and as often written, when a page is put away and the next one is
taken out: once each, or by way of a transposed copy (`stu.futurefill`)."""
PAGE_COLUMNS = 32
"""Of `stu.futurefill.Continuous`."""


@dataclass(frozen=True)
class Shape:
    """Of a run's convolutions."""

    layers: int
    width: int
    lag_step: int
    num_taps: int
    batch: int
    prompt_tokens: int
    new_tokens: int
    page_len: int

    def columns(self, tokens: int) -> int:
        """In which so many positions lie, a row for each phase."""
        return -(-tokens // self.lag_step)


@dataclass
class Counts:
    """Of a run, numbers or operations of one channel."""

    multiply_adds: float = 0.0
    fft: float = 0.0
    filters: float = 0.0
    """Read for the whole batch."""
    read: float = 0.0
    written: float = 0.0
    streams: float = 0.0
    """Begun in memory: where one begins, the processor waits."""

    def costs(self, shape: Shape, number_bytes: int = FLOAT_BYTES) -> Costs:
        """Of one token. number_bytes: of each number that is remembered."""
        channels = shape.layers * shape.width / shape.new_tokens
        num_bytes = channels * number_bytes
        return Costs(
            dense=0.0,
            convolution=channels * self.multiply_adds,
            fft=channels * self.fft,
            filter_bytes=channels * FLOAT_BYTES * self.filters,
            cache_read=num_bytes * self.read,
            cache_written=num_bytes * self.written,
            streams=channels * self.streams,
        )


def cache_bytes(cache: str, shape: Shape) -> int:
    """What a cache allocates for the batch. The naive one holds all inputs, the latest apart; the
    others a slot for each new token (Flash Inference: for each token) and two pages for the one
    that is decoded; pages have a null page besides."""
    channels = shape.layers * shape.width * FLOAT_BYTES
    new_columns = shape.columns(shape.new_tokens)
    if cache == "paged":
        num_pages = -(-(shape.new_tokens - 1) // shape.page_len)
        return channels * shape.page_len * (shape.batch * (num_pages + 2) + 1)
    row = channels * shape.batch * shape.lag_step
    if cache == "naive":
        reached = min(shape.num_taps, shape.columns(shape.prompt_tokens))
        return row * (reached + new_columns + Naive.LINE_COLUMNS)
    if cache == "flashinference":
        new_columns = shape.columns(shape.prompt_tokens + shape.new_tokens)
    page = epoch_columns(new_columns) if cache == "epoched" else PAGE_COLUMNS
    return row * (new_columns + 2 * min(page, new_columns))


def epoch_columns(columns: int) -> int:
    """The paper's epoch length, `sqrt(L log L)`."""
    return min(columns, math.ceil(math.sqrt(columns * max(1.0, math.log2(columns)))))


def naive(shape: Shape) -> Counts:
    """Direct sums: each output reads every input before it, the latest by way of products."""
    reached = min(shape.num_taps, shape.columns(shape.prompt_tokens))
    columns = [token // shape.lag_step for token in range(shape.new_tokens)]
    sums = sum(min(shape.num_taps, reached + column + 1) for column in columns)
    latest = sum(min(shape.num_taps, column % Naive.LINE_COLUMNS + 1) for column in columns)
    read = sums + latest + shape.new_tokens
    written = latest + 2 * shape.new_tokens
    streams = shape.new_tokens * (1 + 1 / shape.batch)  # inputs of each sequence, and filters
    return Counts(sums, filters=sums, read=read, written=written, streams=streams)


def epoched(shape: Shape) -> Counts:
    """One FutureFill of the whole past into each next epoch."""
    columns, step = shape.columns(shape.new_tokens), shape.lag_step
    epoch = epoch_columns(columns)
    counts = _within_pages(shape, epoch, 0, TURNS_TRANSPOSED)
    for end in range(epoch, columns, epoch):
        outputs = min(epoch, columns - end)
        if end * step >= shape.new_tokens:
            break
        n = fast_fft_length(end + outputs)
        counts.fft += step * 2 * n * math.log2(n) + 4 * step * (n // 2 + 1)
        counts.fft += n * math.log2(n) / shape.batch  # of the filters
        counts.filters += end + outputs
        counts.read += step * (end + outputs)
        counts.written += step * outputs
    return counts


def continuous(shape: Shape, first: int = 0) -> Counts:
    """A tile of `lowbit(j)` pages after page j; the run's first position is `first`."""
    columns, step = shape.columns(first + shape.new_tokens), shape.lag_step
    page = min(PAGE_COLUMNS, columns)
    counts = _within_pages(shape, page, first, TURNS_TRANSPOSED)
    for end in range(page * (first // (page * step) + 1), columns, page):
        if end * step > first + shape.new_tokens:
            break
        tile = page * (end // page & -(end // page))
        outputs, n = min(tile, columns - end), 2 * tile
        counts.fft += step * int(2 * n * math.log2(n) + 4 * (tile + 1))
        counts.filters += 2 * (tile + 1)  # complex
        counts.read += step * (tile + outputs)
        counts.written += step * outputs
    return counts


def flashinference(shape: Shape) -> Counts:
    """The same tiles, of a tree that begins with the prompt; those within the prompt, and before
    the first new token, are not counted."""
    return continuous(shape, shape.prompt_tokens)


def paged(shape: Shape, tiles: TileFlush) -> Counts:
    """Direct sums within pages, and products of thin matrices after each (`serve.cache.tiles`)."""
    counts = _within_pages(shape, shape.page_len // shape.lag_step, 0, TURNS)
    num_pages = -(-(shape.new_tokens - 1) // shape.page_len)
    by_done = _flush_by_fft if not tiles._levels else _flush
    for done in range(1, num_pages):
        by_done(counts, shape, tiles, done, num_pages)
    return counts


LOCKSTEP: dict[str, Callable[[Shape], Counts]] = {
    "naive": naive,
    "epoched": epoched,
    "continuous": continuous,
    "flashinference": flashinference,
}
"""Of the caches but the paged one."""


def added(one: Costs, other: Costs) -> Costs:
    """Of two parts of a model."""
    names = one.__dataclass_fields__
    return replace(one, **{name: getattr(one, name) + getattr(other, name) for name in names})


def _within_pages(shape: Shape, page_columns: int, first: int, turns: int) -> Counts:
    """Each input into the outputs that are left in its page, its own among them; and pages that
    are put away and taken out."""
    sums = sum(
        page_columns - token // shape.lag_step % page_columns
        for token in range(first, first + shape.new_tokens)
    )
    turned = turns * shape.new_tokens
    written = sums + shape.new_tokens + turned
    return Counts(sums, filters=sums, read=sums + turned, written=written)


def _flush(counts: Counts, shape: Shape, tiles: TileFlush, done: int, num_pages: int) -> None:
    """Page to summary, core, coordinates to pages, as `serve.cache.tiles.TileFlush` does."""
    levels, step, rows = tiles._levels, shape.lag_step, shape.page_len // shape.lag_step
    level = (done & -done).bit_length() - 1
    its = levels[level]
    groups = -(-shape.batch // TILES_AT_ONCE)
    rank_in, rank_out = its.basis_cores.shape[2], its.basis_cores.shape[1]
    read_level = min(level, tiles._smallest_summary)
    inwards = levels[read_level].inwards.numel()
    counts.read += 2**read_level * shape.page_len
    for larger in levels[read_level + 1 : level + 1]:
        inwards += larger.inwards.numel()
        counts.read += step * larger.inwards.shape[2]
    if level >= tiles._smallest_summary and done + 2**level < num_pages:
        counts.written += step * rank_in
    counts.multiply_adds += step * (inwards + rank_in * rank_out)
    counts.filters += groups * rank_in * rank_out
    if its.cores is None:
        counts.multiply_adds += its.basis_cores.numel() * groups / shape.batch
    has_pending = level + 1 < len(levels) and not levels[level + 1].writes_pages
    if has_pending and done > 2**level:
        counts.multiply_adds += step * levels[level + 1].outwards[1].numel()
        counts.read += step * levels[level + 1].outwards.shape[2]
    down = level
    while not levels[down].writes_pages:
        counts.multiply_adds += step * levels[down].outwards[0].numel()
        counts.written += step * levels[down].outwards.shape[2]
        down -= 1
    reached = min(len(levels[down].outwards), num_pages - done)
    counts.multiply_adds += step * reached * rows * levels[down].outwards.shape[2]
    counts.read += reached * shape.page_len
    counts.written += reached * shape.page_len


def _flush_by_fft(
    counts: Counts, shape: Shape, tiles: TileFlush, done: int, num_pages: int
) -> None:
    """Each sequence by itself: filters are transformed every time."""
    rows, step = shape.page_len // shape.lag_step, shape.lag_step
    tile = done & -done
    reached = min(tile, num_pages - done)
    n = fast_fft_length((tile + reached) * rows)
    counts.fft += (2 * step + 1) * n * math.log2(n) + 4 * step * (n // 2 + 1)
    counts.filters += shape.batch * (tile + reached) * rows
    counts.read += (tile + reached) * shape.page_len
    counts.written += reached * shape.page_len
