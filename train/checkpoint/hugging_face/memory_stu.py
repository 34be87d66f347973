"""The memory of a layer of a Stu model, and the states of STU layers.

An STU layer remembers a state of constant size, which is exact: spectral filters are sums of a few
dozen decaying exponentials, so that as many numbers hold all that later outputs take from earlier
inputs. Attention remembers the keys and values of its window, and Hyena its inputs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

ALL_LAGS, MORE_LAGS = 1024, 2048
"""Lags to which exponentials are fitted: the first ones, and later ones at equal ratios."""


class LayerMemory:
    """The tensors that a layer remembers, by name, with the batch first."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.taps: Tensor | None = None
        """Filters that the layer has computed, from lag 0."""

    def append(self, name: str, new: Tensor, longest: int | None = None) -> Tensor:
        """Add `new [B, T, ..]` after what is remembered, of which the last `longest` positions are
        kept. Returns all of it, with what is then forgotten."""
        past = self.tensors.get(name)
        joined = new if past is None else torch.cat([past, new], dim=1)
        start = 0 if longest is None else max(0, joined.shape[1] - longest)
        # A copy, where something is left out, as the whole would stay in memory otherwise.
        self.tensors[name] = joined[:, start:].clone() if start else joined
        return joined


class Realisation:
    """Filters as sums of exponentials: `filter_k[m + 1] = sum_i outputs[k, i] exp(-rates[i] m)`.

    The outputs are fitted by least squares. All is in float64, as terms cancel: they add up to
    thousands of times the filter.

    Args:
        filters: `[L, K]`, L >= 2.
        rates: Rates of the exponentials, all of them positive.
    """

    def __init__(self, filters: Tensor, rates: Sequence[float]) -> None:
        taps = filters.detach().double().cpu().numpy()
        length = len(taps) - 1
        lags = np.arange(min(length, ALL_LAGS))
        if length > ALL_LAGS:
            later = np.geomspace(ALL_LAGS, length - 1, MORE_LAGS).astype(np.int64)
            lags = np.union1d(lags, later)
        weights = np.sqrt(np.diff(lags, append=length))[:, None]
        terms = weights * np.exp(-np.multiply.outer(lags, rates))
        sizes = np.linalg.norm(terms, axis=0)
        solution, *_ = np.linalg.lstsq(terms / sizes, weights * taps[lags + 1], rcond=1e-14)
        device = filters.device
        self.outputs = torch.from_numpy((solution / sizes[:, None]).T.copy()).to(device)  # [K, r]
        self.rates = torch.tensor(rates, dtype=torch.float64, device=device)  # [r]

    def step(self, memory: LayerMemory, inputs: Tensor) -> "Past | None":
        """Take inputs `[B, T, D]` into a layer's state, which is on their device, and return the
        earlier state, if any.

        A state `[B, 2, D, r]` has two parts: for the filters, and for those with the alternating
        signs `(-1)^lag`.
        """
        counts = torch.arange(inputs.shape[1] + 1, device=inputs.device)
        decays = torch.exp(-counts[:, None] * self.rates.to(inputs.device))  # [T + 1, r]
        signs = (1 - 2 * (counts % 2))[:, None]
        powers = torch.stack([decays, signs * decays])  # [2, T + 1, r]
        newest_first = inputs.flip(1).to(decays.dtype)
        next_state = torch.einsum("btd,str->bsdr", newest_first, powers[:, :-1])
        state = memory.tensors.get("state")
        if state is not None:
            next_state = next_state + powers[:, -1][:, None] * state
        memory.tensors["state"] = next_state
        if state is None:
            return None
        # Lag q + 1 + m has the sign (-1)^m, which the state has, times (-1)^(q + 1).
        outputs = self.outputs.to(inputs.device)
        return Past(state, torch.stack([powers[0, :-1], -powers[1, :-1]]), outputs)


class Past(NamedTuple):
    """The part of the next T outputs that earlier inputs make up: in output q of filter k,
    `sum_r decays[q, r] state[r] outputs[k, r]`."""

    state: Tensor
    """`[B, 2, D, r]`"""
    decays: Tensor
    """`[2, T, r]`, with their signs."""
    outputs: Tensor
    """`[K, r]`"""
