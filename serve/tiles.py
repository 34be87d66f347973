"""FutureFill from finished tiles of pages into the pages after them.

A tile is a power-of-two number of pages. What it adds to as many pages after it is one circular
convolution of twice its length with the filters (Agarwal et al., ICLR 2026, Algorithm 3), of which
the second half is kept. Where only even lags have taps, even and odd positions never mix: each pair
of neighbours is transformed as one complex number, which a real filter keeps apart. Sums are in the
dtype of the pages, float32 or float64.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

CPU_BLOCK_ELEMENTS = 2**17
"""Elements transformed at once on CPU: with spectra and result, what a core's cache holds."""
BLOCK_ELEMENTS = 2**26
"""The same on a GPU: enough to keep it busy, few enough to bound the work space."""
SPECTRA_BYTES = 2**28
"""Filter spectra kept from flush to flush; those of larger tiles are computed for each."""


class TileFlush:
    """All layers' convolutions of one tile size after another.

    taps: `[layers, N, C]`, tap j at lag `lag_step * j`; those that are to be left out are zero.
    pages: `[num_pages, layers, W, page_len]`, where W is a multiple of C and channel w of a layer
    has the filter `w % C`; read and added to in place.
    """

    def __init__(self, taps: Tensor, lag_step: int, pages: Tensor) -> None:
        assert lag_step in (1, 2), f"no filters have taps {lag_step} lags apart"
        num_taps, num_filters = taps.shape[1:]
        self._filters = taps.transpose(1, 2).reshape(-1, num_taps)  # [layers C, N]
        self._pages = pages.flatten(1, 2)  # [num_pages, layers W, page_len]
        self._paired = lag_step == 2
        channel = torch.arange(self._pages.shape[1], device=taps.device)
        layer, within = channel // pages.shape[2], channel % pages.shape[2]
        self._filter_of = layer * num_filters + within % num_filters
        self._each_its_own = num_filters == pages.shape[2]
        on_cpu = taps.device.type == "cpu"
        self._block_elements = CPU_BLOCK_ELEMENTS if on_cpu else BLOCK_ELEMENTS
        self._padded: dict[int, Tensor] = {}
        self._spectra: dict[int, Tensor] = {}
        self._spectra_bytes = 0

    def fill(self, past: Sequence[Sequence[int]], future: Sequence[Sequence[int]]) -> None:
        """Add to the pages `future` of each sequence what its tile `past`, just before, leaves.

        Tiles of one size; of the future pages, those past the tile's length or a sequence's end are
        not given.
        """
        page_len, num_channels = self._pages.shape[2], self._pages.shape[1]
        tile_len = len(past[0]) * page_len
        channels_at_once = min(num_channels, max(1, self._block_elements // (2 * tile_len)))
        rows_at_once = max(1, self._block_elements // (2 * tile_len * channels_at_once))
        device = self._pages.device
        sources = [torch.tensor(row, device=device) for row in past]
        for start in range(0, num_channels, channels_at_once):
            channels = slice(start, min(start + channels_at_once, num_channels))
            spectra = self._filter_spectra(channels, tile_len)
            for first in range(0, len(past), rows_at_once):
                rows = slice(first, first + rows_at_once)
                self._fill_block(channels, spectra, sources[rows], future[rows])

    def _fill_block(
        self,
        channels: slice,
        spectra: Tensor,
        sources: list[Tensor],
        targets: Sequence[Sequence[int]],
    ) -> None:
        """Some channels of some sequences: one batched FFT to and from."""
        pages, page_len = self._pages[:, channels], self._pages.shape[2]
        tile_len = len(sources[0]) * page_len
        padded = self._zero_padded(len(sources), pages.shape[1], tile_len)  # [B, w, 2 tile_len]
        for row, source in zip(padded, sources, strict=True):
            gathered = pages.index_select(0, source).transpose(0, 1)  # [w, tile_pages, page_len]
            row[:, :tile_len].view(gathered.shape).copy_(gathered)
        filled = self._convolve(padded, spectra)
        for row, target in zip(filled, targets, strict=True):
            added = row[:, tile_len:].split(page_len, dim=1)
            # Page by page: on CPU, `index_add_` of several takes five times as long.
            for page, its in zip(target, added, strict=False):
                pages[page].add_(its)

    def _convolve(self, padded: Tensor, spectra: Tensor) -> Tensor:
        """Circular convolution along the last dimension of `[B, w, 2 tile_len]`."""
        if not self._paired:
            spectrum = torch.fft.rfft(padded)
            spectrum *= spectra
            filled: Tensor = torch.fft.irfft(spectrum, n=padded.shape[-1])
            return filled
        pairs = padded.view(*padded.shape[:2], -1, 2)
        spectrum = torch.fft.fft(torch.view_as_complex(pairs))
        spectrum *= spectra
        return torch.view_as_real(torch.fft.ifft(spectrum)).flatten(-2)

    def _zero_padded(self, rows: int, width: int, tile_len: int) -> Tensor:
        """A buffer `[rows, width, 2 * tile_len]` whose second half is zero."""
        buffer = self._padded.get(tile_len)
        if buffer is None or buffer.shape[0] < rows * width:
            buffer = self._pages.new_zeros(rows * width, 2 * tile_len)
            self._padded[tile_len] = buffer
        return buffer[: rows * width].view(rows, width, 2 * tile_len)

    def _filter_spectra(self, channels: slice, tile_len: int) -> Tensor:
        """Spectra of the taps that a tile reaches, one for each of the channels."""
        spectra = self._kept_spectra(tile_len)
        if spectra is not None:
            return spectra[channels] if self._each_its_own else spectra[self._filter_of[channels]]
        if self._each_its_own:
            return self._transform(self._filters[channels], tile_len)
        return self._transform(self._filters[self._filter_of[channels]], tile_len)

    def _kept_spectra(self, tile_len: int) -> Tensor | None:
        """All filters' spectra for a tile size, or None if there is no room for them."""
        if tile_len not in self._spectra:
            complex_bytes = 2 * self._filters.element_size()
            length = tile_len if self._paired else tile_len + 1
            num_bytes = len(self._filters) * length * complex_bytes
            if self._spectra_bytes + num_bytes > SPECTRA_BYTES:
                return None
            self._spectra[tile_len] = self._transform(self._filters, tile_len)
            self._spectra_bytes += num_bytes
        return self._spectra[tile_len]

    def _transform(self, filters: Tensor, tile_len: int) -> Tensor:
        length = tile_len if self._paired else 2 * tile_len
        reached = filters[:, :length].contiguous()
        transform = torch.fft.fft if self._paired else torch.fft.rfft
        spectra: Tensor = transform(reached, n=length)
        return spectra
