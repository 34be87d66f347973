"""Online convolution: one output per token, while the inputs are still being generated.

Agarwal et al., "FutureFill: Fast Generation from Convolutional Sequence Models", ICLR 2026. The
primitive computes what a finished stretch of inputs adds to each later output. `Epoched` fills
from the whole past once per epoch, `Continuous` from tiles that double in size, `Naive` sums
directly. All three are exact: they order the same multiply-adds differently.

Every class takes `taps [layers, N, D]`, tap j at lag `lag_step * j`, so any causal filter will do,
and an STU-T filter, which is zero at odd lags, skips half the taps. Time runs in phases as in
`stu.convolution`: position t is column `t // lag_step` of phase `t % lag_step`, and phases never
mix. Sums are in the dtype of the taps, float32 or float64.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn.functional import pad

from stu.convolution import causal_convolution, fast_fft_length

CPU_BLOCK_ELEMENTS, GPU_BLOCK_ELEMENTS = 2**18, 2**26
"""Elements transformed at once: on CPU large enough to hide call overheads, small enough for L2; on
a GPU enough for all of it, but no more, as transforms take several times their memory."""


def future_fill(past: Tensor, taps: Tensor, num_outputs: int) -> Tensor:
    """What `past [..., T]` adds to the `num_outputs` outputs after it: `[..., num_outputs]`.

    taps `[..., N]` start at lag 0; those from lag `T + num_outputs` on reach no wanted output.
    Equals `numpy.convolve(past, taps)[T : T + num_outputs]`, by one circular FFT whose wrap-around
    falls on the first T values only.
    """
    length = past.shape[-1]
    n = fast_fft_length(length + num_outputs)
    spectrum = torch.fft.rfft(past, n=n) * torch.fft.rfft(taps[..., : length + num_outputs], n=n)
    filled: Tensor = torch.fft.irfft(spectrum, n=n)[..., length : length + num_outputs]
    return filled


class OnlineConvolution(ABC):
    """Convolutions of several layers, for a batch of sequences decoded in step.

    `prefill` each layer (and each row, where prompts differ in length), then for every token call
    `step` on each layer in turn and `advance` once.
    """

    def __init__(self, taps: Tensor, batch: int, max_new_tokens: int, lag_step: int = 1) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} is not allowed: it must be >= 1")
        self.taps, self.batch = taps, batch
        self.max_new_tokens, self.lag_step = max_new_tokens, lag_step
        self.num_columns = -(-max_new_tokens // lag_step)
        self.position = 0
        """Tokens stepped through since the prompt."""
        self.multiply_adds = 0
        """Real multiply-adds of all steps; a real FFT of length n counts n log2 n, a complex
        product four."""

    @property
    @abstractmethod
    def cache_bytes(self) -> int:
        """Bytes held of the past and the future of all sequences; filters are not counted."""

    @abstractmethod
    def prefill(self, layer: int, inputs: Tensor, rows: slice = slice(None)) -> Tensor:
        """Take the prompts `[rows, P, D]` of all rows or some; return their outputs."""

    @abstractmethod
    def step(self, layer: int, inputs: Tensor) -> Tensor:
        """Take one token's inputs `[B, D]`; return its outputs `[B, D]`."""

    def advance(self) -> None:
        """Every layer has stepped: go on to the next token."""
        self.position += 1

    def _check_room(self) -> None:
        if self.position >= self.max_new_tokens:
            raise ValueError(
                f"all max_new_tokens={self.max_new_tokens} tokens are decoded: allow for more"
            )


class Naive(OnlineConvolution):
    """Direct sums over the whole past: `O(L)` per token, and a cache as long as the context.

    The latest inputs lie apart, time-major, until there is a cache line of each channel's: one by
    one, each would wait for memory, for the channels' streams lie far from each other.

    max_prompt_tokens: of the longest prompt, for which there is room; the filters' reach if not
    given.
    """

    LINE_COLUMNS = 16

    def __init__(
        self,
        taps: Tensor,
        batch: int,
        max_new_tokens: int,
        lag_step: int = 1,
        max_prompt_tokens: int | None = None,
    ) -> None:
        super().__init__(taps, batch, max_new_tokens, lag_step)
        layers, num_taps, width = taps.shape
        self._reversed_taps = taps.flip(1).transpose(1, 2).contiguous()[:, :, None]  # [.., D, 1, N]
        self._latest_taps = taps[:, : self.LINE_COLUMNS].flip(1)[:, :, None]  # [layers, n, 1, D]
        self._max_prompt_tokens = max_prompt_tokens
        self._origin = num_taps
        """Column of the first new token, just before which prompts end."""
        if max_prompt_tokens is not None:
            self._origin = min(num_taps, -(-max_prompt_tokens // lag_step))
        columns = self._origin + self.num_columns + self.LINE_COLUMNS
        self._inputs = taps.new_zeros(layers, lag_step, width, batch, columns)
        self._latest = taps.new_zeros(layers, lag_step, self.LINE_COLUMNS, batch, width)
        self._prompt_columns = 0

    @property
    def cache_bytes(self) -> int:
        columns = self._prompt_columns + self.num_columns
        elements = self._inputs[..., :columns].numel() + self._latest.numel()
        return elements * self._inputs.element_size()

    def prefill(self, layer: int, inputs: Tensor, rows: slice = slice(None)) -> Tensor:
        most = self._max_prompt_tokens
        if most is not None and inputs.shape[1] > most:
            raise ValueError(
                f"the prompt has {inputs.shape[1]} tokens, and there is room for {most}: give a "
                "larger max_prompt_tokens"
            )
        origin, step, width = self._origin, self.lag_step, self.taps.shape[2]
        reached = inputs[:, -origin * step :]
        columns = -(-reached.shape[1] // step)
        phases = pad(reached, (0, 0, columns * step - reached.shape[1], 0))
        phases = phases.view(-1, columns, step, width).permute(2, 3, 0, 1)  # -> [g, D, B, columns]
        self._inputs[layer, :, :, rows, origin - columns : origin] = phases
        self._prompt_columns = max(self._prompt_columns, columns)
        return causal_convolution(inputs, self.taps[layer], step)

    def step(self, layer: int, inputs: Tensor) -> Tensor:
        self._check_room()
        num_taps, width = self.taps.shape[1:]
        column, phase = divmod(self.position, self.lag_step)
        count = min(num_taps, self._prompt_columns + column + 1)
        latest = self._latest[layer, phase]  # [columns, B, D]
        place = column % self.LINE_COLUMNS
        latest[place] = inputs
        near = min(place + 1, count)
        near_taps = self._latest_taps[layer, -near:]
        outputs = (latest[place + 1 - near : place + 1] * near_taps).sum(0)
        if count > near:
            # [D, 1, n] @ [D, n, B]: of einsum, matmul and vecdot, in any layout, the fastest.
            end = self._origin + column - place
            past = self._inputs[layer, phase, :, :, end - (count - near) : end]
            far_taps = self._reversed_taps[layer, :, :, num_taps - count : num_taps - near]
            outputs += (far_taps @ past.transpose(1, 2))[:, 0].t()
        self.multiply_adds += count * self.batch * width
        return outputs.to(inputs.dtype)

    def advance(self) -> None:
        super().advance()
        column, phase = divmod(self.position, self.lag_step)
        if phase == 0 and column % self.LINE_COLUMNS == 0:
            end = self._origin + column
            streams = self._inputs[..., end - self.LINE_COLUMNS : end]
            streams.copy_(self._latest.permute(0, 1, 4, 3, 2))


class _Filled(OnlineConvolution):
    """Slots that hold the future until their token is decoded and the past afterwards.

    The current page of columns lies apart, time-major, and each input is added to the outputs
    left in its page at once. When the page is full it joins the past, and a flush fills the future
    from it; the slots are time-contiguous, as the FFTs want them.
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
        # One view each per layer and place in the page: slicing would cost more than the sums.
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
        """Tokens already in the current page."""

    @property
    def cache_bytes(self) -> int:
        elements = self._slots.numel() + self._page.numel() + self._transposed.numel()
        return elements * self._slots.element_size()

    def prefill(self, layer: int, inputs: Tensor, rows: slice = slice(None)) -> Tensor:
        length, columns = inputs.shape[1], self.num_columns
        # Widened first, or the pending values would be rounded to the dtype of the inputs.
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
        # By way of a small contiguous copy: `copy_` blocks a transposition only of whole matrices.
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
        """Fill pending slots from the past, which now ends before column `end`."""


class Epoched(_Filled):
    """FutureFill of the whole past into the next epoch, once per epoch of `sqrt(L log L)` columns:
    `O(L^1.5 sqrt(log L))` in all."""

    def __init__(self, taps: Tensor, batch: int, max_new_tokens: int, lag_step: int = 1) -> None:
        columns = -(-max_new_tokens // lag_step)
        epoch_columns = math.ceil(math.sqrt(columns * max(1.0, math.log2(columns))))
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


class Continuous(_Filled):
    """FutureFill of tiles that double in size: after page j, the tile of `page * lowbit(j)` columns
    into as many columns after it: `O(L log^2 L)` in all."""

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
        """Of the tile that ends before column `end`."""
        pages = end // self.page_columns
        tile = self.page_columns * (pages & -pages)
        if tile not in self._plans:
            self._plans[tile] = _TilePlan(tile, self._slots, self._filters)
        return self._plans[tile]


class _TilePlan:
    """The transforms of one tile size: spectra of the filters, and a zero-padded buffer.

    The transforms take no `out=`: torch would compute into a fresh tensor all the same, and copy.
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
        """Add to `future [.., D, <= tile]` what `past [.., D, tile]` contributes."""
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
    """Transforms to and from, of the filters too, and the products between."""
    return int((2 * rows + filter_rows) * n * math.log2(n)) + 4 * rows * (n // 2 + 1)
