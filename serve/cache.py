"""Convolution caches in pages: FutureFill for many sequences, each at its own position.

A page's slot holds the pending output of its position until the token is decoded, and the
convolution's input afterwards. Inside the current page each input is added to the outputs left
there at once; when a page is full, the tile of `page_len * lowbit(pages done)` positions that ends
with it fills the tile after it (Continuous FutureFill, with the page as the smallest tile). A
sequence owns `ceil(max_new_tokens / page_len)` pages at first, whatever its prompt's length, and
gives each back once no later tile reads it. Sums are in the dtype of the pages, float32 or float64.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from serve.pages import PagePool, pages_for
from stu.convolution import causal_convolution

BLOCK_ELEMENTS = 2**18
"""Elements transformed at once: with spectrum and result, what a core's cache holds."""
SPECTRA_BYTES = 2**28
"""Filter spectra kept from flush to flush; those of larger tiles are computed for each."""


@dataclass
class PagedSequence:
    """One sequence's place in the cache."""

    owner: int
    max_new_tokens: int
    pages: list[int]
    """Page of each stretch of `page_len` new tokens; meaningless once given back."""
    readers: list[int]
    """For each page, how many pages are done at the last flush that reads it."""
    position: int = 0
    """New tokens that went through all layers."""


class ConvolutionCache:
    """What the convolutions of several layers remember of every running sequence.

    taps: `[layers, N, D]`, tap j at lag `lag_step * j`. pool: pages `[layers, page_len, D]`.
    """

    def __init__(self, taps: Tensor, lag_step: int, pool: PagePool) -> None:
        layers, page_len, width = pool.pages.shape[1:]
        assert taps.shape[::2] == (layers, width), "the pool's pages are of another model"
        if page_len % lag_step or page_len & (page_len - 1):
            raise ValueError(
                f"page_len={page_len} is not allowed: it must be a power of two and a multiple of "
                f"{lag_step}"
            )
        self._taps, self._lag_step, self._pool = taps, lag_step, pool
        self._layers, self._page_len, self._width = layers, page_len, width
        columns = page_len // lag_step
        self._near = taps.new_zeros(layers, columns, width)
        self._near[:, : taps.shape[1]] = taps[:, :columns]
        self._spectra: dict[int, Tensor] = {}
        self._spectra_bytes = 0

    def admit(self, owner: int, max_new_tokens: int) -> PagedSequence:
        """Allocate what `owner` needs for its new tokens; raises OutOfPages."""
        count = pages_for(max_new_tokens, self._page_len)
        pages = self._pool.allocate(owner, count)
        return PagedSequence(owner, max_new_tokens, pages, _last_readers(count))

    def release(self, sequence: PagedSequence) -> None:
        """Give back every page that `sequence` still owns."""
        self._pool.free(sequence.owner, self._pool.pages_of(sequence.owner))

    def prefill(self, layer: int, sequence: PagedSequence, inputs: Tensor) -> Tensor:
        """The outputs `[1, P, D]` of a prompt, whose effect on the new tokens goes into pages."""
        length, page_len = inputs.shape[1], self._page_len
        wide = inputs.to(self._taps.dtype)
        num_outputs = length + len(sequence.pages) * page_len
        outputs = causal_convolution(wide, self._taps[layer], self._lag_step, num_outputs)[0]
        for index, page in enumerate(sequence.pages):
            start = length + index * page_len
            self._pool.pages[page, layer] = outputs[start : start + page_len]
        return outputs[None, :length].to(inputs.dtype)

    def step(self, layer: int, sequences: Sequence[PagedSequence], inputs: Tensor) -> Tensor:
        """One token of each sequence: inputs `[B, D]` at its position -> outputs `[B, D]`."""
        page_len, lag_step = self._page_len, self._lag_step
        columns, near = page_len // lag_step, self._near[layer]
        wide = inputs.to(self._taps.dtype)
        slots = [divmod(sequence.position, page_len) for sequence in sequences]
        pages = [its.pages[page] for its, (page, _) in zip(sequences, slots, strict=True)]
        places = [place for _, place in slots]
        for page, place, row in zip(pages, places, wide.unbind(), strict=True):
            rest = self._pool.pages[page, layer, place::lag_step]  # [columns', D]
            rest.addcmul_(near[: columns - place // lag_step], row)
        slot = torch.tensor(pages), layer, torch.tensor(places)
        outputs = self._pool.pages[slot]  # [B, D]
        self._pool.pages[slot] = wide
        return outputs.to(inputs.dtype)

    def advance(self, sequences: Sequence[PagedSequence]) -> None:
        """Every layer has stepped: flush the tiles that are done, and free what is not needed."""
        by_tile: dict[int, list[PagedSequence]] = {}
        for sequence in sequences:
            sequence.position += 1
            done, place = divmod(sequence.position, self._page_len)
            if place == 0 and done < len(sequence.pages):
                by_tile.setdefault(done & -done, []).append(sequence)
        for tile_pages in sorted(by_tile):
            self._flush(tile_pages, by_tile[tile_pages])
        for sequence in (sequence for group in by_tile.values() for sequence in group):
            done = sequence.position // self._page_len
            finished = [
                page
                for page, at in zip(sequence.pages, sequence.readers, strict=True)
                if at == done
            ]
            self._pool.free(sequence.owner, finished)

    def _flush(self, tile_pages: int, sequences: list[PagedSequence]) -> None:
        """FutureFill of each sequence's last `tile_pages` pages into as many pages after them."""
        columns = tile_pages * self._page_len // self._lag_step
        for layer in range(self._layers):
            spectra = self._filter_spectra(layer, columns)
            for group, channels in self._blocks(sequences, columns):
                self._fill(layer, group, channels, tile_pages, columns, spectra[channels])

    def _fill(
        self,
        layer: int,
        group: list[PagedSequence],
        channels: slice,
        tile_pages: int,
        columns: int,
        spectra: Tensor,
    ) -> None:
        """One batched FFT over some sequences and channels of a layer."""
        lag_step, page_columns = self._lag_step, self._page_len // self._lag_step
        width = len(range(*channels.indices(self._width)))
        padded = self._taps.new_zeros(width, len(group), lag_step, 2 * columns)
        for row, sequence in enumerate(group):
            done = sequence.position // self._page_len
            for index, page in enumerate(sequence.pages[done - tile_pages : done]):
                inputs = self._pool.pages[page, layer, :, channels]
                inputs = inputs.view(page_columns, lag_step, width)
                start = index * page_columns
                padded[:, row, :, start : start + page_columns] = inputs.permute(2, 1, 0)
        spectrum = torch.fft.rfft(padded)
        spectrum *= spectra[:, None, None]
        filled = torch.fft.irfft(spectrum, n=2 * columns)
        for row, sequence in enumerate(group):
            done = sequence.position // self._page_len
            for index, page in enumerate(sequence.pages[done : done + tile_pages]):
                pending = self._pool.pages[page, layer, :, channels]
                start = columns + index * page_columns
                added = filled[:, row, :, start : start + page_columns]
                pending.view(page_columns, lag_step, width).add_(added.permute(2, 1, 0))

    def _blocks(
        self, sequences: list[PagedSequence], columns: int
    ) -> Iterator[tuple[list[PagedSequence], slice]]:
        """Groups of sequences, or of one sequence's channels, that fit into a block."""
        elements = self._width * self._lag_step * 2 * columns  # of one sequence
        rows = max(1, BLOCK_ELEMENTS // elements)
        step = min(self._width, max(1, self._width * BLOCK_ELEMENTS // elements))
        for first in range(0, len(sequences), rows):
            for start in range(0, self._width, step):
                yield sequences[first : first + rows], slice(start, start + step)

    def _filter_spectra(self, layer: int, columns: int) -> Tensor:
        """Spectra `[D, columns + 1]` of the taps that a tile of so many columns reaches."""
        spectra = self._spectra.get(columns)
        if spectra is not None:
            return spectra[layer]
        taps = self._taps.transpose(1, 2)[..., : 2 * columns]
        num_bytes = 2 * self._taps.element_size() * self._layers * self._width * (columns + 1)
        if self._spectra_bytes + num_bytes > SPECTRA_BYTES:
            one_layer: Tensor = torch.fft.rfft(taps[layer].contiguous(), n=2 * columns)
            return one_layer
        self._spectra[columns] = torch.fft.rfft(taps.contiguous(), n=2 * columns)
        self._spectra_bytes += num_bytes
        return self._spectra[columns][layer]


def _last_readers(num_pages: int) -> list[int]:
    """For each of a sequence's pages, how many pages are done at the last flush that reads it.

    The last page is read by none, and has `num_pages`: it goes when the sequence does.
    """
    readers = [num_pages] * num_pages
    for done in range(1, num_pages):
        readers[done - (done & -done) : done] = [done] * (done & -done)
    return readers
