"""Spectral states of an STU in full form: filters `phi_k[i]` and `(-1)^i phi_k[i]` of one input."""

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


class AlternatingStates(SpectralStates):
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
        self._narrow = self._states.to(dtype)
        """The states in the dtype of the outputs."""
        self._filters = basis[:MOST_INPUT_ROWS].to(dtype)
        num_filters = basis.shape[1]
        outputs = torch.from_numpy(realisation.outputs).to(basis.device)
        transition = torch.from_numpy(realisation.transition).to(basis.device)
        reach, near = [], torch.zeros(page_len, num_filters, page_len, dtype=dtype)
        for place in range(page_len):
            reach.append(outputs.to(dtype))
            outputs = outputs @ transition.T
            reached = self._filters[: place + 1].flip(0).T  # [K, <= place + 1]
            near[place, :, place + 1 - reached.shape[1] : place + 1] = reached
        self._reach = torch.stack(reach)
        """Contribution of a state to each place of a page, `[page_len, K, r]`."""
        self._near = near.to(basis.device)
        """Contribution of the inputs of a page to each of its places, `[page_len, K, page_len]`."""
        self._signs = torch.tensor([1.0, -1.0], dtype=dtype, device=basis.device)

    @classmethod
    def plan(cls, model: FlashSTU, config: EngineConfig) -> CachePlan | None:
        layers = [mixer for mixer in model.mixers if isinstance(mixer, LongConvolution)]
        if not layers:
            return None
        past, dtype, page_len = layers[0].past, model.filters.dtype, config.page_len
        if past.basis != "alternating" or any(layer.past != past for layer in layers):
            raise CannotHold("their filters do not alternate")
        basis, _ = layers[0].basis(model.filters.double())
        require_finite(basis)
        try:
            realisation, error = fitting_realisation(basis, [None], dtype)
        except NoRealisation as reason:
            raise CannotHold(str(reason)) from reason
        rank = realisation.rank
        numbers = rank * 8 + (rank + page_len) * dtype.itemsize
        row_bytes = len(layers) * past.streams * 2 * numbers

        def make(num_rows: int) -> AlternatingStates:
            return cls(realisation, basis, len(layers), past.streams, num_rows, page_len, dtype)

        info = ConvolutionCacheInfo("state", row_bytes, rank, error)
        return CachePlan(
            CacheSize(0, row_bytes, 1, 1, 1, len(layers) * past.streams * 2 * rank * 8), make, info
        )

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
                basis = self._basis[:length].to(wide.dtype)
                basis = signs * basis if alternates else basis
                for number, hankel in enumerate(self._hankels, alternates * num_filters):
                    added = basis @ (hankel @ state).to(wide.dtype)  # [T, S]
                    outputs[:, :, number] += added.T
            after = self._taken_in(state, own)
            states[alternates] = -after if alternates and length % 2 else after
        return outputs.to(inputs.dtype)

    def step(self, layer: int, inputs: Tensor, first: int = 0) -> Tensor:
        place = (self._time + self._offsets[layer]) % self._page_len
        streams = self._states.shape[-1]
        signal = inputs[:, 0].view(-1, streams).to(self._filters.dtype)  # [B, S]
        sign = self._signs[place % 2]
        outputs = inputs.new_zeros(len(signal), streams, 2, self._reach.shape[1])
        for places, rows in self._group(first, len(signal)):
            self._inputs[rows, layer, 0, place] = signal[places]
            self._inputs[rows, layer, 1, place] = signal[places] * sign
            steps = place - torch.from_numpy(self._joined_at[rows, layer]).to(self._reach.device)
            mixed = self._reach[steps][:, None] @ self._narrow[rows, layer]  # [B, 2, K, S]
            mixed += self._near[place] @ self._inputs[rows, layer]
            mixed[:, 1] *= sign
            outputs[places] = mixed.permute(0, 3, 1, 2).to(inputs.dtype)
        return outputs.flatten(2).flatten(0, 1)  # [B S, 2 K]

    def leave(self, row: int) -> None:
        super().leave(row)
        self._narrow[row] = 0

    def _turn(self, states: Tensor, place: int) -> None:
        if place % 2:
            states[1] *= -1

    def _enter(self, row: int, layer: int, place: int) -> None:
        self._narrow[row, layer] = self._states[row, layer]

    def _begin_page(self, layer: int, rows: slice) -> None:
        self._narrow[rows, layer] = self._states[rows, layer]
