"""Steps of FutureFill in pages within the current page: by views of it, and over index tensors.

Flushes of full pages are transforms by FFT, which cannot be captured; they run between the steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from serve.cache.row_clocks import Run
from serve.cache.static_step import StaticStep
from stu.futurefill import future_fill


@dataclass
class PagedSequence:
    """One sequence's pages."""

    pages: list[int]
    """Page of each `page_len` new tokens. Full ones may have been freed."""
    start: int = 0
    """Time of the first new token."""
    done: int = 0
    """Number of full pages."""
    tiles: list[list[int]] = field(default_factory=list)
    """Pages of each finished tile that is part of a later, larger one; latest tile last."""


class StepViews(NamedTuple):
    """Views of a layer that one step reads and writes for consecutive rows; slicing would cost more
    than the sums."""

    streams: slice
    """Places of the rows' streams among the inputs of the step."""
    reached: list[tuple[Tensor, Tensor]]
    """Pairs of taps `[columns, 1, 1, C]` and the pending outputs `[columns, B, W / C, C]` that they
    add to: up to the end of the ring, then from its start."""
    new: Tensor
    """Slots for the token's inputs, `[B, W / C, C]`."""
    flat_new: Tensor
    """The same slots in the shape of a step's inputs, `[B W / C, C]`."""
    due: Tensor
    """Outputs of the token, `[B W / C, C]`."""


def step_views(
    pending: Tensor,
    inputs: Tensor,
    near: Tensor,
    time: int,
    columns_reached: int,
    runs: Sequence[Run],
) -> list[StepViews]:
    """Return the views of a layer's rings for the rows in `runs`.

    Args:
        pending: Ring of pending outputs, `[lag_step, columns, rows, W / C, C]`.
        inputs: Ring of inputs, `[page_len, rows, W / C, C]`.
        near: Taps within a page, `[columns, 1, 1, C]`.
        time: Time of rows that are not ahead.
        columns_reached: Columns that the token adds to.
        runs: Consecutive rows.
    """
    views, per_row = [], inputs.shape[2]
    for places, rows, ahead in runs:
        slot = (time + ahead) % len(inputs)
        column, phase = divmod(slot, len(pending))
        before_end = min(columns_reached, pending.shape[1] - column)
        own, new = pending[phase, :, rows], inputs[slot, rows]
        reached = [(near[:before_end], own[column : column + before_end])]
        if columns_reached > before_end:
            rest = columns_reached - before_end
            reached.append((near[before_end:columns_reached], own[:rest]))
        streams = slice(places.start * per_row, places.stop * per_row)
        flat_new, due = new.flatten(0, 1), own[column].flatten(0, 1)
        views.append(StepViews(streams, reached, new, flat_new, due))
    return views


def step_by(views: StepViews, inputs: Tensor) -> Tensor:
    """Take the inputs of a step, `[B W / C, C]`, into the rings, and return the outputs of some of
    its rows."""
    views.flat_new.copy_(inputs[views.streams])
    for taps, pending in views.reached:
        pending.addcmul_(taps, views.new)
    return views.due


def store_page(inputs: Tensor, page: Tensor, time: int) -> None:
    """Copy a row's ring of inputs to a page, in the order of positions.

    inputs: `[layers, page_len, W / C, C]`. page: `[layers, page_len, W]`. time: Time at its start.
    """
    start, flat = time % inputs.shape[1], inputs.flatten(2)
    before_turn = inputs.shape[1] - start
    page[:, :before_turn] = flat[:, start:]
    page[:, before_turn:] = flat[:, :start]


def load_page(pending: Tensor, page: Tensor, time: int) -> None:
    """Copy a page's pending outputs to a row's ring.

    pending: `[layers, lag_step, columns, W / C, C]`. page: `[layers, page_len, W]`. time: Time at
    its start.
    """
    step, start = pending.shape[1], time % page.shape[1]
    for first in range(step):  # first position of the page in each phase
        column, phase = divmod(start + first, step)
        stored = page[:, first::step]  # [layers, columns, W]
        ring = pending[:, phase].flatten(2)
        before_turn = pending.shape[2] - column
        ring[:, column:] = stored[:, :before_turn]
        ring[:, :column] = stored[:, before_turn:]


def fill_pages(
    pages: Tensor, taps: Tensor, lag_step: int, past: list[int], future: list[int]
) -> None:
    """Add what the inputs in some pages contribute to the outputs in the pages after them.

    Args:
        pages: Pages `[pages, layers, page_len, W]`.
        taps: Taps `[layers, N, C]`, tap j at lag `lag_step * j`.
        lag_step: Distance between taps.
        past: Full pages, in their order.
        future: Pages that follow.
    """
    per_page = pages.shape[2] // lag_step
    num_outputs = len(future) * per_page
    for phase in range(lag_step):
        for layer, layer_taps in enumerate(taps):
            # Transposed copies: transforms along strides are slower.
            inputs = pages[past, layer, phase::lag_step].flatten(0, 1).T.contiguous()  # [W, T]
            near = layer_taps[: inputs.shape[1] + num_outputs].T.contiguous()  # those that reach
            streams = inputs.view(-1, len(near), inputs.shape[1])  # [W / C, C, T]
            filled = future_fill(streams, near, num_outputs).flatten(0, 1).T
            for page, added in zip(future, torch.split(filled, per_page), strict=True):
                pages[page, layer, phase::lag_step] += added


class FutureFillStep(StaticStep):
    """Static step of a `PagedFutureFill`.

    Outputs are pulled: what is pending, plus the sum over the inputs of the row's page. The shared
    number is the slot in the rings, and a row's own number the place in its page.

    Args:
        pending: Ring of pending outputs, `[layers, lag_step, columns, rows, W / C, C]`.
        inputs: Ring of inputs, `[layers, page_len, rows, W / C, C]`. The last row is for padding.
        near: Taps within a page, `[layers, columns, 1, 1, C]`.
    """

    num_shared = 1
    num_own = 1

    def __init__(self, pending: Tensor, inputs: Tensor, near: Tensor) -> None:
        _, self._lag_step, self._num_columns, self._num_rows, *self._row_shape = pending.shape
        self._page_len = inputs.shape[1]
        self._pending, self._inputs = pending.flatten(1, 3), inputs.flatten(1, 2)
        self._near = near
        self._lags = torch.arange(0, self._page_len, self._lag_step, device=inputs.device)

    def begin(self, rows: Tensor, shared: Tensor, own: Tensor) -> None:
        rows, slot = rows.clamp(max=self._num_rows - 1), shared
        self._new = slot * self._num_rows + rows
        column, phase = slot // self._lag_step, slot % self._lag_step
        self._due = (phase * self._num_columns + column) * self._num_rows + rows
        slots = (slot - self._lags) % self._page_len  # [columns]
        self._seen = (slots[:, None] * self._num_rows + rows).flatten()
        self._is_own = (self._lags[:, None] <= own[:, 0])[..., None, None]  # [columns, B, 1, 1]

    def step(self, layer: int, inputs: Tensor) -> Tensor:
        """Return the outputs of one token of the rows, `[B W / C, C]` both ways."""
        ring, new = self._inputs[layer], inputs.view(-1, *self._row_shape)
        ring.index_copy_(0, self._new, new.to(ring.dtype))
        seen = ring.index_select(0, self._seen).view(self._num_columns, *new.shape)
        seen = torch.where(self._is_own, seen, 0)  # [columns, B, W / C, C]
        outputs = self._pending[layer].index_select(0, self._due)
        outputs = outputs + (self._near[layer] * seen).sum(0)
        return outputs.flatten(0, 1).to(inputs.dtype)
