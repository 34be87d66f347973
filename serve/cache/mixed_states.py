"""Spectral states of filters that are weighted sums of a basis, as an STU's in tensordot form."""

from typing import NamedTuple

import torch
from torch import Tensor

from serve.cache.base import CachePlan
from serve.cache.drafted_states import DraftedStates
from serve.cache.realised_layers import realised_layers
from serve.cache.spectral_state import MOST_INPUTS
from serve.cache.state_steps import MixedStep
from serve.config import EngineConfig
from stu.convolution import causal_convolution
from stu.model import FlashSTU
from stu.realisation import Realisation

GROUP = 4
"""Slots of a signal whose inputs are added to the outputs after them together."""


class _Products(NamedTuple):
    """Products of the inputs of a slot, which are added to pending outputs."""

    reached: Tensor
    """Pending outputs of some slots, `[B, n, C]`."""
    near: Tensor
    """Taps at their lags, `[n, C]`."""
    inputs: Tensor
    """Inputs of the slot, `[B, 1, C]`."""

    def add(self) -> None:
        """Add them up."""
        self.reached.addcmul_(self.near, self.inputs)


class _StepViews(NamedTuple):
    """Views that one step of a layer reads and writes for consecutive rows; slicing would cost more
    than the sums."""

    places: slice | None
    """The rows' places among the inputs of the step; None where they have all of them."""
    new: Tensor
    """Slots for the inputs, `[B, C]`."""
    products: list[_Products]
    """Products of these inputs for the slots of their group, and where a group ends those of all
    its inputs for the slots after it."""
    due: Tensor
    """Pending outputs of this slot, `[B, C]`."""

    def take(self, inputs: Tensor) -> Tensor:
        """Keep inputs `[B, C]`, and return the outputs, valid until the next step."""
        self.new.copy_(inputs)
        for products in self.products:
            products.add()
        return self.due


class MixedStates(DraftedStates):
    """States of convolutions with `lag_step` phases, each a signal of its own.

    When a page begins, its pending outputs are computed from the states. A token's input is added
    to those of its group of slots, and the inputs of a full group to those of all slots after it:
    these so pass through the processor's cache once for several tokens. Each output's sum is in the
    order of the inputs.

    Args:
        basis: Filters `[N, K]`.
        weights: Weights `[layers, K, C]` of the basis in each channel's filter.
    """

    streams = 1

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
        self._filters = basis[:MOST_INPUTS].double()
        outputs = torch.from_numpy(realisation.outputs).to(weights.device)
        self._coefficients = outputs.T @ self._weights
        """Weights of a state's coordinates in the next output, `[layers, r, C]`."""
        self._weighted = torch.empty_like(self._states[0, 0])
        """A layer's coordinates, each times its weight in the next output, `[signals, r, C]`."""
        self._from_page = self._decays[: self._slots].expand(self.signals, -1, -1)
        """Decays of the coordinates to each slot of a page, `[signals, slots, r]`."""
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

    @classmethod
    def plan(cls, model: FlashSTU, config: EngineConfig) -> CachePlan | None:
        found = realised_layers(model, "mixed")
        if found is None:
            return None
        past, dtype, page_len = found.past, model.filters.dtype, config.page_len
        weights = torch.stack([own for own in found.weights if own is not None])

        def make(num_rows: int) -> MixedStates:
            basis, lag_step = found.basis, past.lag_step
            return cls(found.realisation, basis, weights, lag_step, num_rows, page_len, dtype)

        return found.plan(page_len, dtype.itemsize, make)

    @property
    def num_bytes(self) -> int:
        return int(self._states.nbytes + self._inputs.nbytes + self._pending.nbytes)

    def _prefill(self, states: Tensor, layer: int, inputs: Tensor, continues: bool) -> Tensor:
        length, step = inputs.shape[1], self._lag_step
        wide = inputs.to(self._near.dtype)
        taps = self._taps(layer, -(-length // step)).to(wide.dtype)
        outputs = causal_convolution(wide, taps, step)
        if continues:
            added = self._added(layer, states, -(-length // step)).to(wide.dtype)
        after = torch.empty_like(states)
        for phase in range(step):  # 0 is that of the next token
            part = wide[0, phase::step]
            if continues:
                outputs[0, phase::step] += added[phase, : len(part)]
            after[(phase - length) % step] = self._taken_in(states[phase], part)
        states.copy_(after)
        return outputs.to(inputs.dtype)

    def step(self, layer: int, inputs: Tensor, first: int = 0) -> Tensor:
        if self._tokens:
            return self._step_drafts(layer, inputs, first)
        place = (self._clocks.time + self._offsets[layer]) % self._page_len
        key = layer, place, first, len(inputs)
        views = self._views.get(key)
        if views is None:
            views = self._views[key] = self._step_views(*key)
        for own in views:
            outputs = own.take(inputs if own.places is None else inputs[own.places])
        if views[0].places is not None:
            parts = [own.due for own in views]
            padding = torch.zeros_like(inputs[sum(map(len, parts)) :])
            outputs = torch.cat([*parts, padding])
        return outputs if outputs.dtype == inputs.dtype else outputs.to(inputs.dtype)

    def static_step(self) -> MixedStep:
        return MixedStep(self._tensors(), self._pending, self._near, self._coefficients)

    def _step_views(self, layer: int, place: int, first: int, count: int) -> list[_StepViews]:
        return [
            self._row_views(
                layer,
                (place + run.ahead) % self._page_len,
                run.rows,
                None if run.places == slice(0, count) else run.places,
            )
            for run in self._group(first, count)
        ]

    def _row_views(
        self, layer: int, place: int, rows: slice, places: slice | None = None
    ) -> _StepViews:
        slot, phase = divmod(place, self._lag_step)
        inputs, pending = self._inputs[rows, layer, phase], self._pending[rows, layer, phase]
        near, slots = self._near[layer], self._slots
        first = slot - slot % GROUP
        end = min(first + GROUP, slots)
        products = [_Products(pending[:, slot:end], near[: end - slot], inputs[:, slot, None])]
        if slot + 1 == end < slots:
            products += [
                _Products(pending[:, end:], near[end - own : slots - own], inputs[:, own, None])
                for own in range(first, end)
            ]
        return _StepViews(places, inputs[:, slot], products, pending[:, slot])

    def _page_tensors(self) -> list[Tensor]:
        return [self._inputs, self._pending]

    def _step_rows(self, layer: int, place: int, rows: slice, inputs: Tensor) -> Tensor:
        return self._row_views(layer, place, rows).take(inputs)

    def _change_rows(self, rows: list[int]) -> None:
        super()._change_rows(rows)
        self._views.clear()

    def _turn(self, states: Tensor, place: int) -> None:
        if place % self._lag_step:
            states.copy_(states.roll(place % self._lag_step, 0))

    def _begin_page(self, row: int, layer: int, place: int) -> None:
        torch.mul(self._coefficients[layer], self._states[row, layer], out=self._weighted)
        added = torch.bmm(self._from_page, self._weighted, out=self._page)
        if not place:
            self._pending[row, layer].copy_(added)
            return
        for phase, pending in enumerate(self._pending[row, layer]):
            before = self._slots_before(place, phase)
            pending[before:] = added[phase, : self._slots - before]

    def _taps(self, layer: int, count: int) -> Tensor:
        """Return the first taps of a layer, `[<= count, C]`."""
        return self._filters[:count] @ self._weights[layer]

    def _added(self, layer: int, states: Tensor, num_outputs: int) -> Tensor:
        """Return what states `[B, r, C]` add to the next outputs of their signals, `[B, n, C]`."""
        decays = self._decays[:num_outputs].expand(len(states), -1, -1)
        return torch.bmm(decays, self._coefficients[layer] * states)
