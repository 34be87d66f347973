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

import time
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from serve.cache.base import (
    Cache,
    CachePlan,
    ConvolutionCacheInfo,
    DraftedToken,
    num_rows,
    require_finite,
)
from serve.cache.futurefill_steps import (
    FutureFillStep,
    PagedSequence,
    StepViews,
    fill_pages,
    load_page,
    step_by,
    step_views,
    store_page,
)
from serve.cache.page_pool import PagePool
from serve.cache.row_clocks import RowClocks, Run
from serve.cache.static_step import Numbers
from serve.config import EngineConfig
from stu.common.errors import UserError
from stu.convolution import causal_convolution
from stu.decoding.memory import pages_for, pending_size
from stu.mixers import PastInputs, remembered
from stu.model import FlashSTU


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
        """Views by place of the time, columns reached, first row and number of streams, and by
        layer, until rows or their clocks change."""
        self._columns_reached = 0
        """Columns that the next step adds to: up to the end of the page that ends last."""
        self.flushes: dict[int, tuple[int, float]] = {}
        """Number of steps that flushed tiles, and their seconds, by the positions of a tile."""
        self._clocks = RowClocks(max_rows)
        self._sequences: dict[int, PagedSequence] = {}
        self._rows: list[int] = []
        self._tokens: list[DraftedToken] = []
        """Tokens of the step, if it takes several of a row."""
        self._drafts: dict[tuple[int, int], list[Tensor]] = {}
        """Inputs of these by row and layer."""
        self._before: dict[int, Tensor] = {}
        """Pending outputs of their rows' rings before the step."""

    @classmethod
    def plan(cls, model: FlashSTU, config: EngineConfig) -> CachePlan | None:
        layers, filters = remembered(model.mixers, PastInputs), model.filters
        if not layers:
            return None
        longest, rows = model.config.max_seq_len, num_rows(config)
        page_shape = len(layers), config.page_len, layers[0].channels * layers[0].streams
        shape = rows, longest, config.page_len, filters.element_size()
        size = pending_size(layers, *shape, config.expected_new_tokens)

        def make(num_pages: int) -> PagedFutureFill:
            taps, lag_step = model.convolution_taps()
            require_finite(taps)
            pool = PagePool(num_pages + 1, page_shape, filters.dtype, filters.device)
            return cls(taps, lag_step, pool, rows)

        return CachePlan(size, make, ConvolutionCacheInfo("pages", size.page_bytes))

    @property
    def num_bytes(self) -> int:
        """Bytes of pages and rings, without filters."""
        numbers = self.pool.pages.numel() + self._pending.numel() + self._inputs.numel()
        return numbers * self._pending.element_size()

    def pages_needed(self, prompt_tokens: int, new_tokens: int) -> int:
        return pages_for(new_tokens, self._page_len)

    def admit(self, row: int, prompt_tokens: int, new_tokens: int) -> None:
        count = self.pages_needed(prompt_tokens, new_tokens)
        self._sequences[row] = PagedSequence(self.pool.allocate(row, count))

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

    def join(self, row: int, ahead: int = 0) -> None:
        sequence = self._sequences[row]
        self._clocks.start(row, ahead)
        sequence.start = self._clocks.of(row)
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
        if self._tokens:
            return self._step_drafts(layer, inputs, first)
        key = self._clocks.time % self._page_len, self._columns_reached, first, len(inputs)
        views = self._views.get(key)
        if views is None:
            views = self._views[key] = self._step_views(*key)
        parts = [step_by(own, inputs) for own in views[layer]]
        outputs = parts[0] if len(parts) == 1 else torch.cat(parts)
        if len(outputs) < len(inputs):
            outputs = torch.cat([outputs, outputs.new_zeros(inputs[len(outputs) :].shape)])
        return outputs.to(inputs.dtype)

    def advance(self) -> None:
        self._clocks.time += 1
        for row in self._rows:
            self._end_page(row)
        self._set_reach()

    def most_tokens(self, row: int) -> int:
        return self._page_len - self._position(row) % self._page_len

    def begin_drafts(self, tokens: Sequence[DraftedToken], alone: bool) -> None:
        self._tokens, self._drafts = list(tokens), {}
        self._before = {row: self._pending[:, :, :, row].clone() for row in self._rows}

    def keep(self, row: int, num_tokens: int) -> None:
        drafts = [self._drafts[row, layer] for layer in range(len(self._taps))]
        if num_tokens < len(drafts[0]):
            self._pending[:, :, :, row] = self._before[row]
            for layer, inputs in enumerate(drafts):
                for ahead in range(num_tokens):
                    self._take(layer, DraftedToken(row, ahead), inputs[ahead])
        self._clocks.move(row, num_tokens)
        self._end_page(row)

    def advance_drafts(self) -> None:
        self._tokens = []
        self._clocks.align(self._rows)
        self._change_rows(self._rows)
        self._set_reach()

    def static_step(self) -> FutureFillStep:
        return FutureFillStep(self._pending, self._inputs, self._near)

    def begin_static(self, rows: Sequence[int], shared: Numbers, own: Numbers) -> bool:
        assert list(rows) == self._rows, "a token of each row is needed"
        shared[0] = self._clocks.time % self._page_len
        own[:, 0] = [self._position(row) % self._page_len for row in rows]
        return False

    def _step_drafts(self, layer: int, inputs: Tensor, first: int) -> Tensor:
        """Do as `step`, for the tokens of the step of drafts from the `first`. Rows go up to the
        ends of their pages at most."""
        outputs, streams = torch.zeros_like(inputs), self._inputs.shape[3]
        parts = zip(torch.split(inputs, streams), torch.split(outputs, streams), strict=True)
        for token, (own, output) in zip(self._tokens[first:], parts, strict=False):
            self._drafts.setdefault((token.row, layer), []).append(own)
            output.copy_(self._take(layer, token, own))
        return outputs

    def _take(self, layer: int, token: DraftedToken, inputs: Tensor) -> Tensor:
        """Take the inputs of a token into the ring of its row, and return its outputs."""
        row, ahead = token
        place = (self._position(row) + ahead) % self._page_len
        reach = -(-(self._page_len - place) // self._lag_step)
        run = Run(slice(0, 1), slice(row, row + 1), self._clocks.ahead(row) + ahead)
        rings = self._pending[layer], self._inputs[layer], self._near[layer]
        (views,) = step_views(*rings, self._clocks.time, reach, [run])
        return step_by(views, inputs)

    def _position(self, row: int) -> int:
        """Return the number of steps that a row has taken."""
        return self._clocks.of(row) - self._sequences[row].start

    def _set_reach(self) -> None:
        places = [self._position(row) % self._page_len for row in self._rows]
        first_place = min(places, default=self._page_len)
        self._columns_reached = -(-(self._page_len - first_place) // self._lag_step)

    def _end_page(self, row: int) -> None:
        """Flush the page of a row, if it is full and another one follows."""
        sequence = self._sequences[row]
        done, place = divmod(self._position(row), self._page_len)
        if place == 0 and done < len(sequence.pages):
            sequence.done = done
            inputs, page = self._inputs[:, :, row], self.pool.pages[sequence.pages[done - 1]]
            store_page(inputs, page, self._clocks.of(row))
            self._flush(row, sequence)

    def _change_rows(self, rows: list[int]) -> None:
        self._rows = sorted(rows)
        self._views.clear()

    def _flush(self, row: int, sequence: PagedSequence) -> None:
        """Add the tile that ends with the last full page to the pages after it, and load the next
        page into the ring."""
        began, done = time.perf_counter(), sequence.done
        size = done & -done
        level = size.bit_length() - 1
        past = [*chain.from_iterable(sequence.tiles[len(sequence.tiles) - level :])]
        past.append(sequence.pages[done - 1])
        del sequence.tiles[len(sequence.tiles) - level :]
        future = sequence.pages[done : done + size]
        fill_pages(self.pool.pages, self._taps, self._lag_step, past, future)
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

    def _step_views(
        self, time: int, columns_reached: int, first: int, num_streams: int
    ) -> list[list[StepViews]]:
        per_row = self._inputs.shape[3]
        runs = self._clocks.runs(self._rows[first : first + num_streams // per_row])
        layers = zip(self._pending, self._inputs, self._near, strict=True)
        return [step_views(*layer, time, columns_reached, runs) for layer in layers]

    def _load_page(self, row: int, page: int) -> None:
        load_page(self._pending[:, :, :, row], self.pool.pages[page], self._clocks.of(row))
