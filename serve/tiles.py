"""FutureFill from finished tiles of pages into the pages after them.

A tile is a power-of-two number of pages, and what it adds to as many pages after it is a Hankel
matrix of each channel's filter (Agarwal et al., ICLR 2026, Algorithm 3). Each is a product of thin
matrices (`serve.low_rank`), so pages are read once and added to once, in place, whatever their
number. Filters that have no such factors, unlike spectral ones, go through FFTs. Where only even
lags have taps, even and odd positions are channels of their own. Sums are in the dtype of the
pages, float32 or float64.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from serve.low_rank import FilterBasis, NotLowRank, filter_basis, tile_factors
from stu.futurefill import future_fill

logger = logging.getLogger(__name__)

CORE_BYTES = 2**30
"""Of cores kept from flush to flush; those of larger tiles are computed for each."""
PAGES_AT_ONCE = 16
"""Of a tile, summed in the dtype of the pages; beyond that in float64."""


@dataclass(frozen=True)
class _Factors:
    """Of the matrices of one tile size."""

    inwards: Tensor
    """From each page of the tile to the summary: `[tile pages, p, rows]`."""
    outwards: Tensor
    """From the summary to each page after it: `[tile pages, rows, r]`."""
    basis_cores: Tensor
    """`[K, r, p]` float64, of which every channel's core is a sum."""
    cores: Tensor | None
    """Every layer's, `[layers, p, r, 1, C]`, if there is room to keep them."""


class TileFlush:
    """All layers' convolutions of one tile size after another.

    taps: `[layers, N, C]`, tap j at lag `lag_step * j`; no sequence is longer. pages:
    `[num_pages, layers, page_len, W]`, where W is a multiple of C and channel w has the filter
    `w % C`; read and added to in place.
    """

    def __init__(self, taps: Tensor, lag_step: int, pages: Tensor) -> None:
        num_pages, self._layers, self._page_len, _ = pages.shape
        self._num_channels = taps.shape[2]
        # A row is a position of each phase: [num_pages, layers, rows, lag_step W].
        self._pages = pages.view(num_pages, self._layers, self._page_len // lag_step, -1)
        self.taps = taps.to(pages.dtype)
        """`[layers, N, C]`, in the dtype of the pages."""
        self._filters = self._basis(taps)
        self._factors: dict[int, _Factors | None] = {}
        self._bytes_left = CORE_BYTES

    def prepare(self, num_pages: int) -> None:
        """Factorize what sequences of so many pages need: seconds for 16,384 positions."""
        size = 1
        while size < num_pages:
            if size not in self._factors:
                self._factors[size] = self._factorize(size)
            size *= 2

    def fill(self, past: Sequence[int], future: Sequence[int]) -> None:
        """Add to the pages `future` of a sequence what its tile `past`, just before, leaves.

        Of the future pages, those beyond the tile's length or the sequence's end are not given.
        """
        factors = self._factors[len(past)]
        if factors is None:
            self._fill_by_fft(past, future)
            return
        summary = self._summary(past, factors.inwards)
        added = self._through_cores(summary, factors)
        for page, basis in zip(future, factors.outwards, strict=False):
            self._pages[page].baddbmm_(basis.expand(self._layers, -1, -1), added)

    def _summary(self, past: Sequence[int], inwards: Tensor) -> Tensor:
        """`[layers, p, lag_step W]` of a tile, in the dtype of the pages.

        Sums of many pages are rounded to it no more often than those of a few.
        """
        total: Tensor | None = None
        for start in range(0, len(past), PAGES_AT_ONCE):
            some = slice(start, start + PAGES_AT_ONCE)
            pages, bases = past[some], inwards[some, None].expand(-1, self._layers, -1, -1)
            part = torch.bmm(bases[0], self._pages[pages[0]])
            for page, basis in zip(pages[1:], bases[1:], strict=True):
                part.baddbmm_(basis, self._pages[page])
            total = part if total is None else total.double().add_(part)
        assert total is not None, "a tile has a page at least"
        return total.to(self._pages.dtype)

    def _fill_by_fft(self, past: Sequence[int], future: Sequence[int]) -> None:
        num_outputs = len(future) * self._pages.shape[2]
        for layer, taps in enumerate(self.taps.transpose(1, 2)):  # [C, N]
            inputs = self._pages[list(past), layer].flatten(0, 1).t()  # [lag_step W, T]
            streams = inputs.reshape(-1, *taps.shape[:1], inputs.shape[1])  # [.., C, T]
            filled = future_fill(streams, taps, num_outputs).flatten(0, 1).t()
            for page, added in zip(future, torch.split(filled, self._pages.shape[2]), strict=True):
                self._pages[page, layer] += added

    def _through_cores(self, summary: Tensor, factors: _Factors) -> Tensor:
        """`[layers, p, lag_step W]` of a tile -> `[layers, r, lag_step W]` of what it adds."""
        width = summary.shape[2]
        result = summary.new_zeros(self._layers, factors.outwards.shape[2], width)
        if factors.cores is not None:
            self._mix(summary, factors.cores, result)
            return result
        for layer in range(self._layers):
            one = slice(layer, layer + 1)
            self._mix(summary[one], self._cores(one, factors.basis_cores), result[one])
        return result

    def _mix(self, summary: Tensor, cores: Tensor, result: Tensor) -> None:
        """Add the cores' products with the summary, channel by channel.

        Column after column of all channels at once: small matrix products, one for each channel,
        take twice as long on CPU. The last columns are the smallest, and come first, so that sums
        round little before the large ones cancel.
        """
        shape = -1, self._num_channels
        inputs = summary.view(*summary.shape[:2], *shape)  # [layers, p, lag_step W / C, C]
        outputs = result.view(*result.shape[:2], *shape)
        for column in reversed(range(summary.shape[1])):
            outputs.addcmul_(cores[:, column], inputs[:, column, None])

    def _basis(self, taps: Tensor) -> FilterBasis | None:
        try:
            return filter_basis(taps.transpose(0, 1).flatten(1), self._pages.dtype)
        except NotLowRank as reason:
            logger.warning("tiles flush through FFTs, which is slower: of the filters %s", reason)
            return None

    def _factorize(self, num_pages: int) -> _Factors | None:
        rows, dtype = self._pages.shape[2], self._pages.dtype
        if self._filters is None:
            return None
        try:
            outputs, inputs, basis_cores = tile_factors(self._filters, num_pages * rows)
        except NotLowRank as reason:
            logger.warning(
                "tiles of %d positions flush through FFTs, which is slower: %s",
                num_pages * self._page_len,
                reason,
            )
            return None
        padded = pad(outputs, (0, 0, 0, len(inputs) - len(outputs))).to(dtype)
        outwards = padded.view(num_pages, rows, -1)
        inwards = inputs.flip(0).to(dtype).view(num_pages, rows, -1).transpose(1, 2).contiguous()
        num_cores = self._layers * self._num_channels
        num_bytes = num_cores * basis_cores[0].numel() * self._pages.element_size()
        if num_bytes > self._bytes_left:
            return _Factors(inwards, outwards, basis_cores, None)
        self._bytes_left -= num_bytes
        layers = [self._cores(slice(i, i + 1), basis_cores) for i in range(self._layers)]
        cores = torch.cat(layers)
        return _Factors(inwards, outwards, basis_cores, cores)

    def _cores(self, layers: slice, basis_cores: Tensor) -> Tensor:
        """`[layers, p, r, 1, C]`."""
        assert self._filters is not None, "only filters with a basis have cores"
        weights = self._filters.weights.view(len(basis_cores), self._layers, -1)[:, layers]
        cores = torch.einsum("krp,klc->lprc", basis_cores, weights)
        return cores.to(self._pages.dtype)[:, :, :, None]
