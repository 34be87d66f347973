"""Spectral states of an STU in full form: filters `phi_k[i]` and `(-1)^i phi_k[i]` of one input."""

import torch
from torch import Tensor

from serve.cache.base import CachePlan
from serve.cache.drafted_states import DraftedStates
from serve.cache.realised_layers import realised_layers
from serve.cache.spectral_state import MOST_INPUTS
from serve.cache.state_steps import AlternatingStep
from serve.config import EngineConfig
from stu.convolution import causal_convolution
from stu.model import FlashSTU
from stu.realisation import Realisation


class AlternatingStates(DraftedStates):
    """States of two signals with the same filters: the inputs, and the inputs with the sign of
    their place, `(-1)^t u[t]`, whose outputs take that sign back.

    Outputs are many more numbers than inputs, so none are kept: each step computes them from the
    state and the inputs of the page. Channels of a state are the streams of a layer.

    Args:
        basis: Filters `[N, K]` of all layers.
    """

    signals = 2

    def __init__(
        self,
        realisation: Realisation,
        basis: Tensor,
        layers: int,
        streams: int,
        max_rows: int,
        page_len: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(realisation, layers, streams, max_rows, page_len, 1, dtype, basis.device)
        self.streams = streams
        self._filters = basis[:MOST_INPUTS].to(dtype)
        num_filters = basis.shape[1]
        self._outputs = torch.from_numpy(realisation.outputs).to(basis.device)
        near = torch.zeros(page_len, num_filters, page_len, dtype=dtype)
        for place in range(page_len):
            reached = self._filters[: place + 1].flip(0).T  # [K, <= place + 1]
            near[place, :, place + 1 - reached.shape[1] : place + 1] = reached
        self._near = near.to(basis.device)
        """Contribution of the inputs of a page to each of its places, `[page_len, K, page_len]`."""
        # Coordinates cancel, which outputs in float32 do not allow: orthonormal ones do not.
        sizes = basis.abs().amax(0).clamp_min(torch.finfo(torch.float64).tiny)[:, None]
        reach = self._outputs / sizes * self._decays[:page_len, None]  # [page_len, K, r]
        reach, self._into_narrow = torch.linalg.qr(reach.flatten(0, 1))
        self._reach = (sizes * reach.unflatten(0, (page_len, -1))).to(dtype)
        """Contribution of narrow states to each place of a page, `[page_len, K, m]`."""
        self._narrow = (self._into_narrow @ self._states).to(dtype)
        """States in m <= r coordinates for the outputs of a page, in their dtype."""
        basis, self._into_basis = torch.linalg.qr(self._decays)
        self._basis = basis.to(dtype)
        """The same for the outputs of a prompt, `[n, r]`."""
        self._signs = torch.tensor([1.0, -1.0], dtype=dtype, device=basis.device)

    @classmethod
    def plan(cls, model: FlashSTU, config: EngineConfig) -> CachePlan | None:
        found = realised_layers(model, "alternating")
        if found is None:
            return None
        past, dtype, page_len = found.past, model.filters.dtype, config.page_len
        layers = len(found.weights)

        def make(num_rows: int) -> AlternatingStates:
            basis, streams = found.basis, past.streams
            return cls(found.realisation, basis, layers, streams, num_rows, page_len, dtype)

        return found.plan(page_len, dtype.itemsize, make)

    @property
    def num_bytes(self) -> int:
        return int(self._states.nbytes + self._inputs.nbytes + self._narrow.nbytes)

    def _prefill(self, states: Tensor, layer: int, inputs: Tensor, continues: bool) -> Tensor:
        length, num_filters = inputs.shape[1], inputs.shape[2] // 2
        wide = inputs.to(self._filters.dtype)
        signs = self._signs.repeat(-(-length // 2))[:length, None]
        taps = self._filters[:length]
        taps = torch.cat([taps, signs[: len(taps)] * taps], 1)
        outputs = causal_convolution(wide, taps)  # [S, T, 2 K]
        signal = wide[:, :, 0].T  # [T, S]
        for alternates, own in enumerate((signal, signs * signal)):
            state = states[alternates]
            if continues:
                basis = self._basis[:length]
                basis = signs * basis if alternates else basis
                for number, weights in enumerate(self._outputs, alternates * num_filters):
                    narrow = self._into_basis @ (weights[:, None] * state)
                    outputs[:, :, number] += (basis @ narrow.to(wide.dtype)).T  # [T, S]^T
            after = self._taken_in(state, own)
            states[alternates] = -after if alternates and length % 2 else after
        return outputs.to(inputs.dtype)

    def step(self, layer: int, inputs: Tensor, first: int = 0) -> Tensor:
        if self._tokens:
            return self._step_drafts(layer, inputs, first)
        place = self._clocks.time + self._offsets[layer]
        outputs = inputs.new_zeros(inputs.shape)
        for run in self._group(first, len(inputs) // self.streams):
            own = (place + run.ahead) % self._page_len
            part = slice(run.places.start * self.streams, run.places.stop * self.streams)
            outputs[part] = self._step_rows(layer, own, run.rows, inputs[part])
        return outputs

    def _page_tensors(self) -> list[Tensor]:
        return [self._inputs, self._narrow]

    def _step_rows(self, layer: int, place: int, rows: slice, inputs: Tensor) -> Tensor:
        signal = inputs[:, 0].view(-1, self.streams).to(self._filters.dtype)  # [B, S]
        sign = self._signs[place % 2]
        self._inputs[rows, layer, 0, place] = signal
        self._inputs[rows, layer, 1, place] = signal * sign
        steps = place - torch.from_numpy(self._joined_at[rows, layer]).to(self._reach.device)
        mixed = self._reach[steps][:, None] @ self._narrow[rows, layer]  # [B, 2, K, S]
        mixed += self._near[place] @ self._inputs[rows, layer]
        mixed[:, 1] *= sign
        outputs: Tensor = mixed.permute(0, 3, 1, 2).to(inputs.dtype)  # [B, S, 2, K]
        return outputs.flatten(2).flatten(0, 1)  # [B S, 2 K]

    def static_step(self) -> AlternatingStep:
        tables = self._into_narrow, self._reach, self._near
        return AlternatingStep(self._tensors(), self._narrow, *tables)

    def leave(self, row: int) -> None:
        super().leave(row)
        self._narrow[row] = 0

    def _turn(self, states: Tensor, place: int) -> None:
        if place % 2:
            states[1] *= -1

    def _begin_page(self, row: int, layer: int, place: int) -> None:
        into_narrow = self._into_narrow.expand(self.signals, -1, -1)
        self._narrow[row, layer] = torch.bmm(into_narrow, self._states[row, layer])
