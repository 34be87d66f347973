"""FutureFill: what a finished stretch of inputs adds to each later output of a convolution.

The engine in `serve` uses `future_fill`. `Epoched` and `Continuous`, which decode sequences in
step, are for comparison: tests and benchmarks use them. Both are exact, as they only order the
multiply-adds of `stu.online_convolution.Naive` differently.

Source: Agarwal et al., "FutureFill: Fast Generation from Convolutional Sequence Models", ICLR 2026.
"""

import math
from abc import abstractmethod

import torch
from torch import Tensor
from torch.nn.functional import pad

from stu.convolution import causal_convolution, fast_fft_length
from stu.online_convolution import OnlineConvolution

CPU_BLOCK_ELEMENTS, GPU_BLOCK_ELEMENTS = 2**18, 2**26
"""Elements transformed at once. On a CPU that hides the overhead of calls and fits L2; on a GPU all
of them fit, up to a limit, as transforms take several times their memory."""


def future_fill(past: Tensor, taps: Tensor, num_outputs: int) -> Tensor:
    """Return what `past [..., T]` adds to the `num_outputs` outputs after it: `[..., num_outputs]`.

    taps: `[..., N]`, from lag 0; those from lag `T + num_outputs` on reach no wanted output. The
    result is that of `numpy.convolve(past, taps)[T : T + num_outputs]`, computed by one circular
    FFT, which wraps around to the first T values only.
    """
    length = past.shape[-1]
    n = fast_fft_length(length + num_outputs)
    spectrum = torch.fft.rfft(past, n=n) * torch.fft.rfft(taps[..., : length + num_outputs], n=n)
    filled: Tensor = torch.fft.irfft(spectrum, n=n)[..., length : length + num_outputs]
    return filled


class _Filled(OnlineConvolution):
    """Slots that hold pending outputs until their token is decoded, and inputs afterwards.

    The current page of columns is a separate, time-major buffer, where each input is added at once
    to the outputs that are left in the page. A full page is copied to the slots, which are
    contiguous in time for the FFTs, and a flush then fills later slots.
    """

    def __init__(
        self,
        taps: Tensor,
        batch: int,
        max_new_tokens: int,
        lag_step: int,
        page_columns: int,
    ) -> None:
        super().__init__(taps, batch, max_new_tokens, lag_step)
        layers, num_taps, width = taps.shape
        self.page_columns = min(page_columns, self.num_columns)
        self._slots = taps.new_zeros(layers, lag_step, batch, width, self.num_columns)
        self._page = taps.new_zeros(self.page_columns, layers, lag_step, batch, width)
        self._transposed = taps.new_zeros(layers, lag_step, batch, width, self.page_columns)
        self._filters = taps.transpose(1, 2).contiguous()  # [layers, D, N]
        near = pad(taps[:, : self.page_columns], (0, 0, 0, max(0, self.page_columns - num_taps)))
        # Views are made once for all steps: slicing would cost more than the sums.
        self._views = [
            [
                (
                    self._page[column, layer, phase],
                    self._page[column:, layer, phase],
                    near[layer, : self.page_columns - column, None],
                )
                for column in range(self.page_columns)
                for phase in range(lag_step)
            ]
            for layer in range(layers)
        ]
        self._place = 0
        """Number of tokens in the current page."""

    @property
    def cache_bytes(self) -> int:
        elements = self._slots.numel() + self._page.numel() + self._transposed.numel()
        return elements * self._slots.element_size()

    def prefill(self, layer: int, inputs: Tensor, rows: slice = slice(None)) -> Tensor:
        length, columns = inputs.shape[1], self.num_columns
        # In the taps' dtype: that of the inputs would round the pending outputs.
        outputs = causal_convolution(
            inputs.to(self.taps.dtype),
            self.taps[layer],
            self.lag_step,
            length + columns * self.lag_step,
        )
        pending = outputs[:, length:].reshape(-1, columns, self.lag_step, outputs.shape[-1])
        self._slots[layer, :, rows] = pending.permute(2, 0, 3, 1)  # [B, M, g, D] -> [g, B, D, M]
        self._page[:, layer, :, rows] = pending[:, : self.page_columns].permute(1, 2, 0, 3)
        return outputs[:, :length].to(inputs.dtype)

    def step(self, layer: int, inputs: Tensor) -> Tensor:
        self._check_room()
        slot, rest_of_page, near_taps = self._views[layer][self._place]
        rest_of_page.addcmul_(near_taps, inputs)
        outputs = slot.to(inputs.dtype, copy=True)
        slot.copy_(inputs)
        self.multiply_adds += rest_of_page.numel()
        return outputs

    def advance(self) -> None:
        super().advance()
        self._place += 1
        if self._place < self.page_columns * self.lag_step:
            return
        self._place = 0
        end = self.position // self.lag_step
        if end >= self.num_columns:
            return
        # Through a small contiguous copy, as `copy_` transposes only whole matrices in blocks.
        self._transposed.view(-1, self.page_columns).copy_(
            self._page.view(self.page_columns, -1).t()
        )
        self._slots[..., end - self.page_columns : end] = self._transposed
        self._flush(end)
        next_page = self._slots[..., end : end + self.page_columns]
        self._transposed[..., : next_page.shape[-1]] = next_page
        self._page.view(self.page_columns, -1).copy_(
            self._transposed.view(-1, self.page_columns).t()
        )

    @abstractmethod
    def _flush(self, end: int) -> None:
        """Fill pending slots from the inputs, which are complete before column `end`."""


class Epoched(_Filled):
    """FutureFill of the whole past into the next epoch, once per epoch.

    `O(L^1.5 sqrt(log L))` in all, with the usual epoch.

    epoch_columns: Columns of an epoch. None: `usual_epoch`.
    """

    def __init__(
        self,
        taps: Tensor,
        batch: int,
        max_new_tokens: int,
        lag_step: int = 1,
        epoch_columns: int | None = None,
    ) -> None:
        epoch_columns = epoch_columns or usual_epoch(-(-max_new_tokens // lag_step))
        super().__init__(taps, batch, max_new_tokens, lag_step, epoch_columns)

    def _flush(self, end: int) -> None:
        past, future = self._slots[..., :end], self._slots[..., end : end + self.page_columns]
        count = future.shape[-1]
        n = fast_fft_length(end + count)
        for block in _channel_blocks(past, n):
            future[..., block, :] += future_fill(
                past[..., block, :], self._filters[:, None, None, block], count
            )
        self.multiply_adds += _fft_multiply_adds(
            n, past[..., 0].numel(), self._filters.numel() // self._filters.shape[-1]
        )


def usual_epoch(columns: int) -> int:
    """Return the epoch for which sums and fills are of the same order: `sqrt(L log L)` columns."""
    return math.ceil(math.sqrt(columns * max(1.0, math.log2(columns))))


class Continuous(_Filled):
    """FutureFill of tiles that double in size.

    After page j the tile of `page_columns * lowbit(j)` columns that ends there is filled into as
    many columns after it: `O(L log^2 L)` in all.
    """

    def __init__(
        self,
        taps: Tensor,
        batch: int,
        max_new_tokens: int,
        lag_step: int = 1,
        page_columns: int = 32,
    ) -> None:
        super().__init__(taps, batch, max_new_tokens, lag_step, page_columns)
        self._plans: dict[int, _TilePlan] = {}

    def _flush(self, end: int) -> None:
        plan = self._plan(end)
        tile = plan.tile
        plan.fill(self._slots[..., end - tile : end], self._slots[..., end : end + tile])
        self.multiply_adds += plan.multiply_adds

    def _plan(self, end: int) -> "_TilePlan":
        """Return the plan of the tile that ends before column `end`."""
        pages = end // self.page_columns
        tile = self.page_columns * (pages & -pages)
        if tile not in self._plans:
            self._plans[tile] = _TilePlan(tile, self._slots, self._filters)
        return self._plans[tile]


class _TilePlan:
    """Transforms of one tile size: the filters' spectra and a zero-padded buffer.

    They take no `out=`, as torch would compute into a fresh tensor all the same, and copy.
    """

    def __init__(self, tile: int, slots: Tensor, filters: Tensor) -> None:
        self.tile = tile
        n = 2 * tile
        self._spectra = torch.fft.rfft(filters[..., :n], n=n)[:, None, None]  # [.., D, tile + 1]
        self._blocks = list(_channel_blocks(slots, n))
        self._padded = slots.new_zeros(*slots[..., self._blocks[0], 0].shape, n)
        rows = slots[..., 0].numel()
        self.multiply_adds = rows * int(2 * n * math.log2(n) + 4 * (tile + 1))

    def fill(self, past: Tensor, future: Tensor) -> None:
        """Add what `past [.., D, tile]` contributes to `future [.., D, <= tile]`."""
        tile, count = self.tile, future.shape[-1]
        for block in self._blocks:
            width = past[..., block, 0].shape[-1]
            padded = self._padded[..., :width, :]
            padded[..., :tile] = past[..., block, :]
            spectrum = torch.fft.rfft(padded)
            spectrum *= self._spectra[..., block, :]
            filled = torch.fft.irfft(spectrum, n=2 * tile)
            future[..., block, :] += filled[..., tile : tile + count]


def _channel_blocks(slots: Tensor, fft_length: int) -> list[slice]:
    *rows, width, _ = slots.shape
    most = CPU_BLOCK_ELEMENTS if slots.device.type == "cpu" else GPU_BLOCK_ELEMENTS
    step = min(width, max(1, most // (math.prod(rows) * fft_length)))
    return [slice(start, start + step) for start in range(0, width, step)]


def _fft_multiply_adds(n: int, rows: int, filter_rows: int) -> int:
    """Count transforms there and back, the filters' own, and the products between."""
    return int((2 * rows + filter_rows) * n * math.log2(n)) + 4 * rows * (n // 2 + 1)
