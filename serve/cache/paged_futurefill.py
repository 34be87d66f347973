"""Paged cache of convolutions: FutureFill for many rows, each at its own position.

For filters without a state of constant size (`serve.cache.spectral_state`). A slot of a page holds
the pending output of its position until the token is decoded, and the convolution's input
afterwards. A sequence of any prompt length first owns `ceil(new tokens / page_len)` pages, and
frees each once nothing later reads it; a page is `layers * width * page_len` numbers. When a page
is full, the tile of `page_len * lowbit(pages done)` positions that ends with it is flushed into the
tile after it by FFT (Continuous FutureFill, with the page as the smallest tile).

The current page of each running sequence is also in two rings of `page_len` slots, one for pending
outputs and one for inputs. A slot's place in them is the engine's time modulo `page_len`, so a step
does the same for every row of the batch: it adds the new input to the slots that follow, up to the
end of the page that ends last. Slots beyond a row's own page are overwritten when the next page is
loaded, to which a flush has added everything from earlier pages. Sums are in the dtype of the
pages, float32 or float64.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from serve.cache.base import (
    Cache,
    CachePlan,
    CacheSize,
    ConvolutionCacheInfo,
    num_rows,
    require_finite,
    runs_of,
)
from serve.cache.futurefill_steps import FutureFillStep, StepViews, step_views
from serve.cache.page_pool import PagePool, pages_for
from serve.cache.static_step import Numbers
from serve.config import EngineConfig
from stu.common.errors import UserError
from stu.convolution import causal_convolution
from stu.futurefill import future_fill
from stu.mixers import PastInputs, remembered
from stu.model import FlashSTU


@dataclass
class _Sequence:
    """One sequence's pages."""

    pages: list[int]
    """Page of each `page_len` new tokens. Full ones may have been freed."""
    start: int = 0
    """Time of the first new token."""
    done: int = 0
    """Number of full pages."""
    tiles: list[list[int]] = field(default_factory=list)
    """Pages of each finished tile that is part of a later, larger one; latest tile last."""


class PagedFutureFill(Cache):
    """Cache of the long convolutions of all layers.

    Args:
        taps: `[layers, N, C]`, tap j at lag `lag_step * j`, best in float64.
        pool: Pages `[layers, page_len, W]`. W is a multiple of C: a sequence is W / C streams with
            the same filters.
    """

    takes_chunks = False
    pool: PagePool

    def __init__(self, taps: Tensor, lag_step: int, pool: PagePool, max_rows: int) -> None:
        layers, page_len, width = pool.pages.shape[1:]
        assert len(taps) == layers, "the pool's pages are of another model"
        assert width % taps.shape[2] == 0, "the pool's pages are of another width"
        if page_len % lag_step or page_len & (page_len - 1):
            raise UserError("page_len", page_len, f"a power of two and a multiple of {lag_step}")
        self._taps, self._lag_step, self.pool = taps.to(pool.pages.dtype), lag_step, pool
        self._page_len, self._num_filters = page_len, taps.shape[2]
        columns = page_len // lag_step
        near = pool.pages.new_zeros(layers, columns, taps.shape[2])
        near[:, : taps.shape[1]] = self._taps[:, :columns]
        self._near = near[:, :, None, None]  # [layers, columns, 1, 1, C]
        # The columns that a step adds to are contiguous, those of each phase apart. The last row is
        # for padding.
        row_shape = max_rows + 1, width // self._num_filters, self._num_filters
        self._pending = pool.pages.new_zeros(layers, lag_step, columns, *row_shape)
        self._inputs = pool.pages.new_zeros(layers, page_len, *row_shape)
        self._views: dict[tuple[int, int, int, int], list[list[StepViews]]] = {}
        """Views by slot, columns reached, first row and number of streams, and by layer, until rows
        change."""
        self._columns_reached = 0
        """Columns that the next step adds to: up to the end of the page that ends last."""
        self.flushes: dict[int, tuple[int, float]] = {}
        """Number of steps that flushed tiles, and their seconds, by the positions of a tile."""
        self._time = 0
        self._sequences: dict[int, _Sequence] = {}
        self._rows: list[int] = []

    @classmethod
    def plan(cls, model: FlashSTU, config: EngineConfig) -> CachePlan | None:
        layers, filters = remembered(model.mixers, PastInputs), model.filters
        if not layers:
            return None
        longest, rows = model.config.max_seq_len, num_rows(config)
        usual = min(config.expected_new_tokens or max(1, longest // 2), longest)
        page_shape = len(layers), config.page_len, layers[0].channels * layers[0].streams
        page_bytes = math.prod(page_shape) * filters.element_size()
        pages = pages_for(usual, config.page_len), pages_for(longest, config.page_len)

        def make(num_pages: int) -> PagedFutureFill:
            taps, lag_step = model.convolution_taps()
            require_finite(taps)
            pool = PagePool(num_pages + 1, page_shape, filters.dtype, filters.device)
            return cls(taps, lag_step, pool, rows)

        size = CacheSize((2 * rows + 3) * page_bytes, page_bytes, 1, *pages)
        return CachePlan(size, make, ConvolutionCacheInfo("pages", page_bytes))

    @property
    def num_bytes(self) -> int:
        """Bytes of pages and rings, without filters."""
        numbers = self.pool.pages.numel() + self._pending.numel() + self._inputs.numel()
        return numbers * self._pending.element_size()

    def pages_needed(self, prompt_tokens: int, new_tokens: int) -> int:
        return pages_for(new_tokens, self._page_len)

    def admit(self, row: int, prompt_tokens: int, new_tokens: int) -> None:
        count = self.pages_needed(prompt_tokens, new_tokens)
        self._sequences[row] = _Sequence(self.pool.allocate(row, count))

    def release(self, row: int) -> None:
        assert row not in self._rows, f"row {row} is still in the batch"
        del self._sequences[row]
        self.pool.free(row, self.pool.pages_of(row))

    def prefill(self, row: int, layer: int, inputs: Tensor) -> Tensor:
        """Return the outputs `[W / C, P, C]` of a prompt, and write its pending values to pages."""
        sequence, page_len = self._sequences[row], self._page_len
        length = inputs.shape[1]
        num_outputs = length + len(sequence.pages) * page_len
        wide = inputs.to(self._taps.dtype)
        outputs = causal_convolution(wide, self._taps[layer], self._lag_step, num_outputs)
        for index, page in enumerate(sequence.pages):
            start = length + index * page_len
            pending = outputs[:, start : start + page_len].transpose(0, 1)  # [page_len, W / C, C]
            self.pool.pages[page, layer].view(pending.shape).copy_(pending)
        return outputs[:, :length].to(inputs.dtype)

    def join(self, row: int) -> None:
        sequence = self._sequences[row]
        sequence.start = self._time
        self._inputs[:, :, row] = 0
        if sequence.pages:
            self._load_page(row, sequence.pages[0])
        self._columns_reached = self._page_len // self._lag_step
        self._change_rows([*self._rows, row])

    def leave(self, row: int) -> None:
        self._change_rows([other for other in self._rows if other != row])

    def begin_step(self, rows: list[int], alone: bool) -> None:
        assert rows == self._rows, "a token of each row is needed"

    def step(self, layer: int, inputs: Tensor, first: int = 0) -> Tensor:
        """Return the outputs of one token of the rows from the `first` of the batch, valid until
        `advance`.

        inputs: `[B W / C, C]`, as the outputs. Those beyond the rows of the batch are padding.
        """
        key = self._time % self._page_len, self._columns_reached, first, len(inputs)
        views = self._views.get(key)
        if views is None:
            views = self._views[key] = self._step_views(*key)
        parts = []
        for streams, reached, new, flat_new, due in views[layer]:
            flat_new.copy_(inputs[streams])
            for taps, pending in reached:
                pending.addcmul_(taps, new)
            parts.append(due)
        outputs = parts[0] if len(parts) == 1 else torch.cat(parts)
        if len(outputs) < len(inputs):
            outputs = torch.cat([outputs, outputs.new_zeros(inputs[len(outputs) :].shape)])
        return outputs.to(inputs.dtype)

    def advance(self) -> None:
        self._time += 1
        first_place = self._page_len
        for row in self._rows:
            sequence = self._sequences[row]
            done, place = divmod(self._time - sequence.start, self._page_len)
            first_place = min(first_place, place)
            if place == 0 and done < len(sequence.pages):
                sequence.done = done
                self._store_page(row, sequence.pages[done - 1])
                self._flush(row, sequence)
        self._columns_reached = -(-(self._page_len - first_place) // self._lag_step)

    def static_step(self, alone: bool) -> FutureFillStep:
        return FutureFillStep(self._pending, self._inputs, self._near)

    def begin_static(self, rows: Sequence[int], shared: Numbers, own: Numbers) -> bool:
        assert list(rows) == self._rows, "a token of each row is needed"
        shared[0] = self._time % self._page_len
        starts = [self._sequences[row].start for row in rows]
        own[:, 0] = (self._time - np.array(starts, dtype=np.int64)) % self._page_len
        return False

    def _change_rows(self, rows: list[int]) -> None:
        self._rows = sorted(rows)
        self._views.clear()

    def _flush(self, row: int, sequence: _Sequence) -> None:
        """Add the tile that ends with the last full page to the pages after it, and load the next
        page into the ring."""
        began, done = time.perf_counter(), sequence.done
        size = done & -done
        level = size.bit_length() - 1
        past = [*chain.from_iterable(sequence.tiles[len(sequence.tiles) - level :])]
        past.append(sequence.pages[done - 1])
        del sequence.tiles[len(sequence.tiles) - level :]
        future = sequence.pages[done : done + size]
        num_outputs = len(future) * self._page_len
        for phase in range(self._lag_step):
            self._fill(past, future, phase, num_outputs // self._lag_step)
        if done + size < len(sequence.pages):
            sequence.tiles.append(past)
            past = []
        self._load_page(row, sequence.pages[done])
        if done + 1 == len(sequence.pages):  # the last page is never stored
            past = [*past, sequence.pages[-1]]
        self.pool.free(row, past)
        positions = self._page_len * size
        count, seconds = self.flushes.get(positions, (0, 0.0))
        self.flushes[positions] = count + 1, seconds + time.perf_counter() - began

    def _fill(self, past: list[int], future: list[int], phase: int, num_outputs: int) -> None:
        """Add what the inputs of a phase in `past` contribute to its outputs in `future`."""
        pages, step = self.pool.pages, self._lag_step
        for layer, layer_taps in enumerate(self._taps):
            # Transposed copies: transforms along strides are slower.
            inputs = pages[past, layer, phase::step].flatten(0, 1).T.contiguous()  # [W, T]
            taps = layer_taps[: inputs.shape[1] + num_outputs].T.contiguous()  # those that reach
            streams = inputs.view(-1, len(taps), inputs.shape[1])  # [W / C, C, T]
            filled = future_fill(streams, taps, num_outputs).flatten(0, 1).T
            for page, added in zip(
                future, torch.split(filled, self._page_len // step), strict=True
            ):
                pages[page, layer, phase::step] += added

    def _step_views(
        self, slot: int, columns_reached: int, first: int, num_streams: int
    ) -> list[list[StepViews]]:
        per_row = self._inputs.shape[3]
        runs = runs_of(self._rows[first : first + num_streams // per_row])
        layers = zip(self._pending, self._inputs, self._near, strict=True)
        return [step_views(*layer, slot, columns_reached, runs) for layer in layers]

    def _store_page(self, row: int, page: int) -> None:
        """Copy a row's ring of inputs to a page, in the order of positions."""
        stored, start = self.pool.pages[page], self._time % self._page_len
        inputs = self._inputs[:, :, row].flatten(2)  # [layers, page_len, W]
        stored[:, : self._page_len - start] = inputs[:, start:]
        stored[:, self._page_len - start :] = inputs[:, :start]

    def _load_page(self, row: int, page: int) -> None:
        """Copy a page's pending outputs to a row's ring."""
        step, start = self._lag_step, self._time % self._page_len
        for first in range(step):  # first position of the page in each phase
            column, phase = divmod(start + first, step)
            stored = self.pool.pages[page, :, first::step]  # [layers, columns, W]
            pending = self._pending[:, phase, :, row].flatten(2)
            before_turn = self._page_len // step - column
            pending[:, column:] = stored[:, :before_turn]
            pending[:, :column] = stored[:, before_turn:]
