"""Paged cache of convolutions: FutureFill for many sequences, each at its own position.

A slot of a page holds the pending output of its position until the token is decoded, and the
convolution's input afterwards. A sequence of any prompt length first owns `ceil(new tokens /
page_len)` pages, and frees each once nothing later reads it; a page is `layers * width * page_len`
numbers. When a page is full, the tile of `page_len * lowbit(pages done)` positions that
ends with it is flushed into the tile after it (Continuous FutureFill, with the page as the smallest
tile; see `serve.cache.tiles`).

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
from typing import NamedTuple

from torch import Tensor

from serve.cache.base import Cache, CacheSize, num_rows
from serve.cache.page_pool import PagePool, pages_for
from serve.cache.tiles import PagedSequence, TileFlush
from serve.config import EngineConfig
from stu.common.errors import UserError
from stu.convolution import causal_convolution
from stu.mixers import PastInputs, remembered
from stu.model import FlashSTU


class _StepViews(NamedTuple):
    """Views of a layer that one step reads and writes; slicing would cost more than the sums."""

    reached: list[tuple[Tensor, Tensor]]
    """Pairs of taps `[columns, 1, 1, C]` and the pending outputs `[columns, B, W / C, C]` that they
    add to: up to the end of the ring, then from its start."""
    new: Tensor
    """Slots for the token's inputs, `[B, W / C, C]`."""
    flat_new: Tensor
    """The same slots in the shape of a step's inputs, `[B W / C, C]`."""
    due: Tensor
    """Outputs of the token, `[B W / C, C]`."""


class ConvolutionCache(Cache):
    """Cache of the long convolutions of all layers.

    Args:
        taps: `[layers, N, C]`, tap j at lag `lag_step * j`, best in float64.
        pool: Pages `[layers, page_len, W]`. W is a multiple of C: a sequence is W / C streams with
            the same filters.
    """

    pool: PagePool

    def __init__(self, taps: Tensor, lag_step: int, pool: PagePool, max_rows: int) -> None:
        layers, page_len, width = pool.pages.shape[1:]
        assert len(taps) == layers, "the pool's pages are of another model"
        assert width % taps.shape[2] == 0, "the pool's pages are of another width"
        if page_len % lag_step or page_len & (page_len - 1):
            raise UserError("page_len", page_len, f"a power of two and a multiple of {lag_step}")
        longest = min(pages_for(lag_step * taps.shape[1], page_len), pool.capacity)
        self._tiles = TileFlush(taps, lag_step, pool.pages, longest)
        self._taps, self._lag_step, self.pool = self._tiles.taps, lag_step, pool
        self._page_len, self._num_filters = page_len, taps.shape[2]
        columns = page_len // lag_step
        near = pool.pages.new_zeros(layers, columns, taps.shape[2])
        near[:, : taps.shape[1]] = taps[:, :columns]
        self._near = near[:, :, None, None]  # [layers, columns, 1, 1, C]
        # The columns that a step adds to are contiguous, those of each phase apart.
        row_shape = max_rows, width // self._num_filters, self._num_filters
        self._pending = pool.pages.new_zeros(layers, lag_step, columns, *row_shape)
        self._inputs = pool.pages.new_zeros(layers, page_len, *row_shape)
        self._views: dict[tuple[int, int, int, int], list[_StepViews]] = {}
        """Views by slot, columns reached, first row and number of streams, until rows change."""
        self._columns_reached = 0
        """Columns that the next step adds to: up to the end of the page that ends last."""
        self.flushes: dict[int, tuple[int, float]] = {}
        """Number of steps that flushed tiles, and their seconds, by the positions of a tile."""
        self._time = 0
        self._sequences: dict[int, PagedSequence] = {}
        self._rows: list[int] = []
        self._starts: list[int] = []
        """Time of each row's first new token."""

    @classmethod
    def size(cls, model: FlashSTU, config: EngineConfig) -> CacheSize:
        page_bytes = math.prod(_page_shape(model, config)) * model.filters.element_size()
        longest = model.config.max_seq_len
        usual = min(config.expected_new_tokens or max(1, longest // 2), longest)
        rings = 2 * num_rows(config) * page_bytes
        pages = pages_for(usual, config.page_len), pages_for(longest, config.page_len)
        return CacheSize(rings, page_bytes, 1, *pages)

    @classmethod
    def make(cls, model: FlashSTU, config: EngineConfig, num_pages: int) -> "ConvolutionCache":
        taps, lag_step = model.convolution_taps()
        if not taps.isfinite().all():
            raise UserError(
                message="the model's convolution filters are not finite: its weights are damaged; "
                "try another checkpoint"
            )
        filters = model.filters
        pool = PagePool(num_pages, _page_shape(model, config), filters.dtype, filters.device)
        return cls(taps, lag_step, pool, num_rows(config))

    @property
    def num_bytes(self) -> int:
        """Bytes of pages and rings, without filters and the factors of tiles."""
        numbers = self.pool.pages.numel() + self._pending.numel() + self._inputs.numel()
        return numbers * self._pending.element_size()

    def pages_needed(self, prompt_tokens: int, new_tokens: int) -> int:
        return pages_for(new_tokens, self._page_len) if len(self._taps) else 0

    def admit(self, owner: int, prompt_tokens: int, new_tokens: int) -> None:
        count = self.pages_needed(prompt_tokens, new_tokens)
        pages = self.pool.allocate(owner, count)
        self._sequences[owner] = PagedSequence(pages)

    def release(self, owner: int) -> None:
        assert owner not in self._rows, f"sequence {owner} is still in the batch"
        del self._sequences[owner]
        self.pool.free(owner, self.pool.pages_of(owner))

    def prefill(self, owner: int, layer: int, inputs: Tensor) -> Tensor:
        """Return the outputs `[W / C, P, C]` of a prompt, and write its pending values to pages."""
        sequence, page_len = self._sequences[owner], self._page_len
        length = inputs.shape[1]
        num_outputs = length + len(sequence.pages) * page_len
        wide = inputs.to(self._taps.dtype)
        outputs = causal_convolution(wide, self._taps[layer], self._lag_step, num_outputs)
        for index, page in enumerate(sequence.pages):
            start = length + index * page_len
            pending = outputs[:, start : start + page_len].transpose(0, 1)  # [page_len, W / C, C]
            self.pool.pages[page, layer].view(pending.shape).copy_(pending)
        return outputs[:, :length].to(inputs.dtype)

    def join(self, owner: int) -> None:
        sequence, row = self._sequences[owner], len(self._rows)
        self._rows.append(owner)
        self._views.clear()
        self._starts.append(self._time)
        if sequence.pages:
            self._load_page(row, sequence.pages[0])
        self._columns_reached = self._page_len // self._lag_step

    def leave(self, row: int) -> None:
        last = len(self._rows) - 1
        self._views.clear()
        if row != last:
            self._pending[..., row, :, :] = self._pending[..., last, :, :]
            self._inputs[:, :, row] = self._inputs[:, :, last]
            self._rows[row], self._starts[row] = self._rows[last], self._starts[last]
        self._rows.pop()
        self._starts.pop()

    def step(self, layer: int, inputs: Tensor, first_row: int = 0) -> Tensor:
        """Return the outputs of one token of the rows from `first_row`, valid until `advance`.

        inputs: `[B W / C, C]`, as the outputs. Rows beyond those of the batch are padding, with any
        finite input.
        """
        key = self._time % self._page_len, self._columns_reached, first_row, len(inputs)
        views = self._views.get(key)
        if views is None:
            views = self._views[key] = self._step_views(*key)
        reached, new, flat_new, due = views[layer]
        flat_new.copy_(inputs)
        for taps, pending in reached:
            pending.addcmul_(taps, new)
        return due if due.dtype == inputs.dtype else due.to(inputs.dtype)

    def advance(self) -> None:
        self._time += 1
        first_place = self._page_len
        flushes: dict[int, list[int]] = {}
        for row, (owner, start) in enumerate(zip(self._rows, self._starts, strict=True)):
            done, place = divmod(self._time - start, self._page_len)
            first_place = min(first_place, place)
            sequence = self._sequences[owner]
            if place == 0 and done < len(sequence.pages):
                sequence.done = done
                self._store_page(row, sequence.pages[done - 1])
                flushes.setdefault((done & -done).bit_length() - 1, []).append(row)
        for level, rows in flushes.items():
            self._flush(level, rows)
        self._columns_reached = -(-(self._page_len - first_place) // self._lag_step)

    def _flush(self, level: int, rows: Sequence[int]) -> None:
        """Flush the tiles of this level in `rows`, and load their next pages into the rings."""
        began = time.perf_counter()
        sequences = [self._sequences[self._rows[row]] for row in rows]
        spare = self._tiles.flush(level, sequences)
        for row, sequence, pages in zip(rows, sequences, spare, strict=True):
            self._load_page(row, sequence.pages[sequence.done])
            if sequence.done + 1 == len(sequence.pages):  # the last page is never stored
                pages.append(sequence.pages[-1])
            self.pool.free(self._rows[row], pages)
        positions = self._page_len * 2**level
        count, seconds = self.flushes.get(positions, (0, 0.0))
        self.flushes[positions] = count + 1, seconds + time.perf_counter() - began

    def _step_views(
        self, slot: int, columns_reached: int, first_row: int, num_streams: int
    ) -> list[_StepViews]:
        rows = slice(first_row, first_row + num_streams // self._inputs.shape[3])
        column, phase = divmod(slot, self._lag_step)
        before_end = min(columns_reached, self._pending.shape[2] - column)
        views = []
        for layer, near in enumerate(self._near):
            pending, new = self._pending[layer, phase, :, rows], self._inputs[layer, slot, rows]
            reached = [(near[:before_end], pending[column : column + before_end])]
            if columns_reached > before_end:
                rest = columns_reached - before_end
                reached.append((near[before_end:columns_reached], pending[:rest]))
            flat_new, due = new.flatten(0, 1), pending[column].flatten(0, 1)
            views.append(_StepViews(reached, new, flat_new, due))
        return views

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


def _page_shape(model: FlashSTU, config: EngineConfig) -> tuple[int, int, int]:
    layers = remembered(model.mixers, PastInputs)
    width = layers[0].channels * layers[0].streams if layers else model.config.width
    return len(layers), config.page_len, width
