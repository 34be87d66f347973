"""Spectral states of filters that are weighted sums of a basis, as an STU's in tensordot form."""

from typing import NamedTuple

import torch
from torch import Tensor

from serve.cache.base import (
    CachePlan,
    CacheSize,
    CannotHold,
    ConvolutionCacheInfo,
    require_finite,
)
from serve.cache.spectral_state import SpectralStates
from serve.config import EngineConfig
from stu.convolution import causal_convolution
from stu.mixers import LongConvolution
from stu.model import FlashSTU
from stu.realisation import MOST_INPUT_ROWS, NoRealisation, Realisation, fitting_realisation


class _StepViews(NamedTuple):
    """Views that one step of a layer reads and writes for consecutive rows; slicing would cost more
    than the sums."""

    places: slice
    """The rows' places among the inputs of the step."""
    new: Tensor
    """Slots for the inputs, `[B, C]`."""
    broadcast: Tensor
    """The same slots, `[B, 1, C]`."""
    near: Tensor
    """Taps of the slots from this one to the end of the page, `[n, C]`."""
    reached: Tensor
    """Pending outputs of these slots, `[B, n, C]`."""
    due: Tensor
    """Pending outputs of the first of these slots, `[B, C]`."""


class MixedStates(SpectralStates):
    """States of convolutions with `lag_step` phases, each a signal of its own.

    When a page begins, its pending outputs are computed from the states; each token's input is
    added to those that are left.

    Args:
        basis: Filters `[N, K]`.
        weights: Weights `[layers, K, C]` of the basis in each channel's filter.
    """

    def __init__(
        self,
        realisation: Realisation,
        basis: Tensor,
        weights: Tensor,
        lag_step: int,
        max_rows: int,
        page_len: int,
        dtype: torch.dtype,
    ) -> None:
        self.signals = lag_step
        layers, _, channels = weights.shape
        super().__init__(
            realisation, layers, channels, max_rows, page_len, lag_step, dtype, weights.device
        )
        self._weights = weights.double()
        self._filters = basis[:MOST_INPUT_ROWS].double()
        self._pending = torch.zeros_like(self._inputs)
        """Outputs of the page, as far as they are known, in the shape of `_inputs`."""
        near = torch.zeros(layers, self._slots, channels, dtype=dtype, device=weights.device)
        for layer in range(layers):
            taps = self._taps(layer, self._slots)
            near[layer, : len(taps)] = taps
        self._near = near
        """Taps within a page, `[layers, slots, C]`."""
        self._views: dict[tuple[int, int, int, int], list[_StepViews]] = {}
        """Views by layer, place, first row and number of rows, until rows change."""
        self._reach = self._reaches(dtype)
        """Contribution of a state's coordinates to each slot of a page, `[layers, r, slots, C]`."""

    @classmethod
    def plan(cls, model: FlashSTU, config: EngineConfig) -> CachePlan | None:
        layers = [mixer for mixer in model.mixers if isinstance(mixer, LongConvolution)]
        if not layers:
            return None
        past, dtype, page_len = layers[0].past, model.filters.dtype, config.page_len
        if past.basis != "mixed" or any(layer.past != past for layer in layers):
            raise CannotHold("their filters are not weighted sums of a few")
        made = [layer.basis(model.filters.double()) for layer in layers]
        basis = made[0][0]
        weights = torch.stack([own for _, own in made if own is not None]).detach()
        require_finite(basis, weights)
        try:
            realisation, error = fitting_realisation(basis, list(weights), dtype)
        except NoRealisation as reason:
            raise CannotHold(str(reason)) from reason
        rank = realisation.rank
        numbers = past.lag_step * rank * 8 + 2 * page_len * dtype.itemsize
        row_bytes = len(layers) * past.channels * numbers

        def make(num_rows: int) -> MixedStates:
            return cls(realisation, basis, weights, past.lag_step, num_rows, page_len, dtype)

        info = ConvolutionCacheInfo("state", row_bytes, rank, error)
        return CachePlan(
            CacheSize(
                0, row_bytes, 1, 1, 1, len(layers) * past.lag_step * past.channels * rank * 8
            ),
            make,
            info,
        )

    @property
    def num_bytes(self) -> int:
        return int(self._states.nbytes + self._inputs.nbytes + self._pending.nbytes)

    def _prefill(self, states: Tensor, layer: int, inputs: Tensor, continues: bool) -> Tensor:
        length, step = inputs.shape[1], self._lag_step
        wide = inputs.to(self._near.dtype)
        taps = self._taps(layer, -(-length // step)).to(wide.dtype)
        outputs = causal_convolution(wide, taps, step)
        after = torch.empty_like(states)
        for phase in range(step):  # 0 is that of the next token
            part, state = wide[0, phase::step], states[phase]
            if continues:
                outputs[0, phase::step] += self._added(layer, state, len(part)).to(wide.dtype)
            after[(phase - length) % step] = self._taken_in(state, part)
        states.copy_(after)
        return outputs.to(inputs.dtype)

    def step(self, layer: int, inputs: Tensor, first: int = 0) -> Tensor:
        place = (self._time + self._offsets[layer]) % self._page_len
        slot, phase = divmod(place, self._lag_step)
        key = layer, place, first, len(inputs)
        views = self._views.get(key)
        if views is None:
            views = self._views[key] = [
                _StepViews(
                    places,
                    self._inputs[rows, layer, phase, slot],
                    self._inputs[rows, layer, phase, slot, None],
                    self._near[layer, : self._slots - slot],
                    self._pending[rows, layer, phase, slot:],
                    self._pending[rows, layer, phase, slot],
                )
                for places, rows in self._group(first, len(inputs))
            ]
        parts = []
        for places, new, broadcast, near, reached, due in views:
            new.copy_(inputs[places])
            reached.addcmul_(near, broadcast)
            parts.append(due)
        outputs = parts[0] if len(parts) == 1 else torch.cat(parts)
        if len(outputs) < len(inputs):  # padding
            outputs = torch.cat([outputs, torch.zeros_like(inputs[len(outputs) :])])
        return outputs.to(inputs.dtype)

    def _change_rows(self, rows: list[int]) -> None:
        super()._change_rows(rows)
        self._views.clear()

    def _turn(self, states: Tensor, place: int) -> None:
        if place % self._lag_step:
            states.copy_(states.roll(place % self._lag_step, 0))

    def _enter(self, row: int, layer: int, place: int) -> None:
        states, step = self._states[row, layer], self._lag_step
        self._pending[row, layer] = 0
        narrow, reach = states.to(self._near.dtype), self._reach[layer]
        for phase in range(step):
            before = self._slots_before(place, phase)
            pending = self._pending[row, layer, phase, before:]
            for coordinate in reversed(range(len(reach))):
                pending.addcmul_(reach[coordinate, : len(pending)], narrow[phase, coordinate])

    def _begin_page(self, layer: int, rows: slice) -> None:
        pending, reach = self._pending[rows, layer], self._reach[layer]
        narrow = self._states[rows, layer].to(pending.dtype)  # [B, signals, r, C]
        pending.zero_()
        # One coordinate of all channels at once: small products of matrices take longer. The last
        # ones are the smallest, and come first.
        for coordinate in reversed(range(len(reach))):
            pending.addcmul_(reach[coordinate], narrow[:, :, coordinate, None])

    def _taps(self, layer: int, count: int) -> Tensor:
        """Return the first taps of a layer, `[<= count, C]`."""
        return self._filters[:count] @ self._weights[layer]

    def _added(self, layer: int, state: Tensor, num_outputs: int) -> Tensor:
        """Return what a state `[r, C]` adds to the next outputs of its signal, `[n, C]`."""
        coordinates = torch.zeros_like(state)
        for hankel, weights in zip(self._hankels, self._weights[layer], strict=True):
            coordinates.addcmul_(hankel @ state, weights)
        return self._basis[:num_outputs] @ coordinates

    def _reaches(self, dtype: torch.dtype) -> Tensor:
        outputs = torch.from_numpy(self._realisation.outputs).to(self._weights.device)
        transition = torch.from_numpy(self._realisation.transition).to(self._weights.device)
        reaches = []
        for weights in self._weights:
            reach = outputs.T @ weights  # [K, r]^T @ [K, C]
            slots = []
            for _ in range(self._slots):
                slots.append(reach.to(dtype))
                reach = transition @ reach
            reaches.append(torch.stack(slots, 1))
        return torch.stack(reaches)
