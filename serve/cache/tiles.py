"""FutureFill from finished tiles of pages into the pages after them.

A tile is a power-of-two number of pages. It adds to as many pages after it the product of its
inputs with a Hankel matrix of each channel's filter (Agarwal et al., ICLR 2026, Algorithm 3), which
factors into thin matrices (`serve.cache.low_rank`). A large tile is not kept whole: some of its
pages hold a summary of it instead, and others hold the coordinates of what it adds to later tiles,
which are expanded to outputs one half after the other. So each page is read and written only a few
times, and no flush takes much longer than another.

Filters that are not of low rank, unlike spectral ones, go through FFTs. Where only even lags have
taps, even and odd positions are separate channels. Sums over the halves of tiles are in float64,
because rounding would add up from level to level; other sums are in the dtype of the pages, float32
or float64.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from serve.cache.low_rank import NotLowRank
from serve.cache.tile_levels import TileLevel, make_levels
from stu.futurefill import future_fill

logger = logging.getLogger(__name__)

TILES_AT_ONCE = 4
"""Tiles of one size that share one pass over the cores; more would take much memory."""


@dataclass
class PagedSequence:
    """One sequence's pages, and what they hold."""

    pages: list[int]
    """Page of each `page_len` new tokens. Full ones may have been freed, or hold summaries."""
    done: int = 0
    """Number of full pages."""
    tiles: list[list[int]] = field(default_factory=list)
    """Pages that hold each finished tile that is part of a later, larger one; latest tile last."""
    pending: dict[int, list[int]] = field(default_factory=dict)
    """By level, the pages that hold what is still to be added to the second half of a tile."""


class TileFlush:
    """Flushes of finished tiles, for all layers' convolutions; level `i` is tiles of `2^i` pages.

    Args:
        taps: `[layers, N, C]`, tap j at lag `lag_step * j`; no sequence is longer.
        lag_step: Distance between taps, in positions.
        pages: `[num_pages, layers, page_len, W]`, read and written in place. W is a multiple of C,
            and channel w has the filter `w % C`.
        longest: Largest number of pages of a sequence.
    """

    def __init__(self, taps: Tensor, lag_step: int, pages: Tensor, longest: int) -> None:
        num_pages, self._layers, page_len, width = pages.shape
        self._num_channels = taps.shape[2]
        # A row is a position of each phase: [num_pages, layers, rows, lag_step W].
        rows = page_len // lag_step
        self._pages = pages.view(num_pages, self._layers, rows, lag_step * width)
        self.taps = taps.to(pages.dtype)
        """`[layers, N, C]`, in the dtype of the pages."""
        self._levels: list[TileLevel] = []
        self._summary_pages, self._smallest_summary = 0, longest
        num_levels = (longest - 1).bit_length()
        if num_levels > 0:
            self._factorize(taps, num_levels)

    def flush(self, level: int, sequences: Sequence[PagedSequence]) -> list[list[int]]:
        """Add the tile of this level that ends with the last full page to the pages after it.

        Returns the pages that each sequence no longer needs. Outputs beyond a sequence's last page
        are not computed.
        """
        if not self._levels:
            return [self._flush_by_fft(level, sequence) for sequence in sequences]
        spare = []
        for start in range(0, len(sequences), TILES_AT_ONCE):
            spare += self._flush(level, sequences[start : start + TILES_AT_ONCE])
        return spare

    def _flush(self, level: int, sequences: Sequence[PagedSequence]) -> list[list[int]]:
        spare: list[list[int]] = [[] for _ in sequences]
        summaries = [
            self._summary(level, sequence, pages)
            for sequence, pages in zip(sequences, spare, strict=True)
        ]
        added = self._through_cores(self._levels[level], torch.cat(summaries, 2))
        outputs = added.chunk(len(sequences), 2)
        for sequence, summary, own, pages in zip(sequences, summaries, outputs, spare, strict=True):
            self._keep(level, sequence, summary, pages)
            self._spread(level, sequence, own, pages)
        return spare

    def _summary(self, level: int, sequence: PagedSequence, spare: list[int]) -> Tensor:
        """Return the summary `[layers, p, lag_step W]` of the tile that ends here.

        The pages of the tile become spare.
        """
        read_level = min(level, self._smallest_summary)
        tile = _taken_tile(read_level, sequence)
        spare += tile
        bases = self._bases(self._levels[read_level].inwards)
        summary = torch.bmm(bases[0], self._pages[tile[0]])
        for page, basis in zip(tile[1:], bases[1:], strict=True):
            summary.baddbmm_(basis, self._pages[page])
        if level > read_level:
            summary = summary.double()
        for larger in self._levels[read_level + 1 : level + 1]:
            held, (older, newer) = sequence.tiles.pop(), self._bases(larger.inwards)
            summary = torch.bmm(newer, summary).baddbmm_(older, self._held(held, older.shape[2]))
            spare += held
        return summary.to(self._pages.dtype)

    def _keep(self, level: int, sequence: PagedSequence, summary: Tensor, spare: list[int]) -> None:
        """Keep a tile, whole or as its summary, if it is half of a larger one in the sequence."""
        if sequence.done + 2**level >= len(sequence.pages):
            return
        if level < self._smallest_summary:
            sequence.tiles.append(spare[:])
            spare.clear()
        else:
            sequence.tiles.append(self._hold(summary, spare))

    def _spread(
        self, level: int, sequence: PagedSequence, outputs: Tensor, spare: list[int]
    ) -> None:
        """Add a tile's outputs `[layers, r, lag_step W]` and what is pending to the next pages."""
        done, own = sequence.done, self._levels[level]
        pending = sequence.pending.pop(level + 1, None)
        if pending is not None or not own.writes_pages:
            outputs = outputs.double()
        if pending is not None:
            basis = self._bases(self._levels[level + 1].outwards)[1]
            outputs.baddbmm_(basis, self._held(pending, basis.shape[2]))
            spare += pending
        while not own.writes_pages:
            if done + 2 ** (level - 1) < len(sequence.pages):
                sequence.pending[level] = self._hold(outputs, spare)
            outputs = torch.bmm(self._bases(own.outwards)[0], outputs)
            level -= 1
            own = self._levels[level]
        outputs = outputs.to(self._pages.dtype)
        for page, basis in zip(sequence.pages[done:], self._bases(own.outwards), strict=False):
            self._pages[page].baddbmm_(basis, outputs)

    def _hold(self, numbers: Tensor, spare: list[int]) -> list[int]:
        """Write `numbers [layers, p, lag_step W]` to spare pages, and return these."""
        pages = spare[: self._summary_pages]
        assert len(pages) == self._summary_pages, "a tile has too few pages for what it is to hold"
        del spare[: self._summary_pages]
        for page, rows in zip(pages, torch.split(numbers, self._pages.shape[2], 1), strict=False):
            self._pages[page, :, : rows.shape[1]] = rows
        return pages

    def _held(self, pages: Sequence[int], num_rows: int) -> Tensor:
        """Return the numbers that `_hold` wrote, in float64."""
        return torch.cat([self._pages[page] for page in pages], 1)[:, :num_rows].double()

    def _bases(self, bases: Tensor) -> Tensor:
        """Repeat every basis for all layers: `[n, a, b] -> [n, layers, a, b]`."""
        return bases[:, None].expand(-1, self._layers, -1, -1)

    def _flush_by_fft(self, level: int, sequence: PagedSequence) -> list[int]:
        past = _taken_tile(level, sequence)
        future = sequence.pages[sequence.done : sequence.done + 2**level]
        num_outputs = len(future) * self._pages.shape[2]
        reached = (len(past) + len(future)) * self._pages.shape[2]
        for layer, layer_taps in enumerate(self.taps[:, :reached]):
            # Transposed copies: transforms along strides are slower.
            taps, inputs = layer_taps.t().contiguous(), self._pages[past, layer].flatten(0, 1)
            streams = inputs.t().contiguous().view(-1, len(taps), len(inputs))  # [.., C, T]
            filled = future_fill(streams, taps, num_outputs).flatten(0, 1).t()
            for page, added in zip(future, torch.split(filled, self._pages.shape[2]), strict=True):
                self._pages[page, layer] += added
        if sequence.done + 2**level < len(sequence.pages):
            sequence.tiles.append(past)
            return []
        return past

    def _through_cores(self, level: TileLevel, summary: Tensor) -> Tensor:
        """Return the coordinates `[layers, r, n]` of what tiles add, from their summaries
        `[layers, p, n]`, where n is tiles x lag_step x W."""
        rank = level.outwards.shape[2]
        result = summary.new_zeros(self._layers, rank, summary.shape[2])
        if level.cores is not None:
            self._mix(summary, level.cores, result)
            return result
        for layer in range(self._layers):
            only = slice(layer, layer + 1)
            self._mix(summary[only], level.cores_of(only).to(summary.dtype), result[only])
        return result

    def _mix(self, summary: Tensor, cores: Tensor, result: Tensor) -> None:
        """Add the cores' products with the summary, channel by channel.

        Column after column of all channels at once: small matrix products, one for each channel,
        take twice as long on CPU. The last columns are the smallest, and come first, so that sums
        round little before the large ones cancel.
        """
        shape = -1, self._num_channels
        inputs = summary.view(*summary.shape[:2], *shape)  # [layers, p, tiles lag_step W / C, C]
        outputs = result.view(*result.shape[:2], *shape)
        for column in reversed(range(summary.shape[1])):
            outputs.addcmul_(cores[:, column], inputs[:, column, None])

    def _factorize(self, taps: Tensor, num_levels: int) -> None:
        try:
            made = make_levels(taps, self._pages.shape[2], num_levels, self._pages.dtype)
        except NotLowRank as reason:
            logger.warning("tiles flush through FFTs, which is slower: %s", reason)
            return
        self._levels, self._smallest_summary = made.levels, made.smallest_summary
        self._summary_pages = made.summary_pages


def _taken_tile(level: int, sequence: PagedSequence) -> list[int]:
    """Return the pages of a tile that is kept whole, oldest first, and forget its parts."""
    first = len(sequence.tiles) - level
    parts = sequence.tiles[first:]
    del sequence.tiles[first:]
    return [*chain.from_iterable(parts), sequence.pages[sequence.done - 1]]
