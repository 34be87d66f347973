"""Realisations: the past of a convolution as a state of constant size.

Spectral filters are integrals of decaying exponentials, and a sum of a few dozen comes as close as
float64 can tell: `filter_k[m + 1] = sum_i C[k, i] exp(-x_i m)`. So a state of `r` coordinates holds
all that later outputs take from earlier inputs. After the input `u[t]` it is
`s_i = sum_m exp(-x_i m) u[t - m]`. With the next input it becomes `exp(-x_i) s_i + u[t + 1]`, and
to the output `q + 1` steps later it adds `sum_i C[k, i] exp(-x_i q) s_i`.

All filters, channels and layers share the rates `x`, which follow from the number of taps and from
`r` alone; `C` is fitted by least squares. No rate is negative, so states never grow without end.
Terms cancel: they add up to thousands of times the filter. States and sums over them are therefore
in float64.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]

WANTED_ERRORS = {torch.float32: 1e-7, torch.float64: 1e-13}
"""Errors of taps that a higher rank need not lower, by the dtype of the outputs. All errors of taps
are relative to the largest tap of the channel."""
LARGEST_ERROR = 5e-7
"""Largest error of a channel's taps that is accepted."""
RANKS = range(8, 66, 2)
FASTEST_RATE = 4.5
"""Highest rate per lag. What decays faster is gone after one."""
MOST_DECAYS = 100.0
"""Decays after which nothing is left. Smaller numbers make no difference, and the smallest ones
that float64 has are slow."""
ALL_LAGS, MORE_LAGS = 1024, 2048
"""Lags to which sums are fitted: the first ones, and later ones at equal ratios."""
BLOCK_ROWS = 256
"""Rows of taps that are computed at once; with more they would not fit a processor's cache."""


@dataclass(frozen=True)
class Realisation:
    """A sum of exponentials for each of K filters, in float64."""

    rates: Array
    """`x [r]`: what is left of an input after m more is `exp(-x m)`."""
    outputs: Array
    """`C [K, r]`."""
    errors: Array
    """Taps of this form minus those that were asked for, from lag 1 on: `[N - 1, K]`."""

    @property
    def rank(self) -> int:
        """Numbers in the state of a channel."""
        return len(self.rates)

    def decays(self, count: int) -> Array:
        """Return `exp(-x m)` for `m = 0..count - 1`, `[count, r]`."""
        return _decays(np.arange(count), self.rates)


class NoRealisation(Exception):
    """Filters have no state of constant size that gives their taps."""


def fitting_realisation(
    basis: Tensor, weights: Sequence[Tensor | None], dtype: torch.dtype
) -> tuple[Realisation, float]:
    """Return a realisation of low rank that gives all layers' taps, and its error.

    Args:
        basis: Filters `[N, K]`, tap j at lag j.
        weights: Weights `[K, C]` of each layer, whose taps are `basis @ weights`; None: the filters
            themselves.
        dtype: Type of the outputs, float32 or float64.

    The rank is raised until the error is as small as outputs of this dtype can tell, or falls no
    further. Raises NoRealisation if it stays above `LARGEST_ERROR`.
    """
    taps = basis.double().cpu()
    if len(taps) < 2:
        raise NoRealisation("its filters have a single tap")
    layers = [torch.eye(taps.shape[1]) if own is None else own.cpu() for own in weights]
    layers = [own.double() for own in layers]
    largest = [_largest(taps, own).clamp_min(torch.finfo(torch.float64).tiny) for own in layers]
    best, smallest = None, math.inf
    for rank in RANKS:
        found = realise(taps.numpy(), rank)
        errors = torch.from_numpy(np.abs(found.errors).max(0))
        # At most; computed in full only for the rank that is taken.
        error = _worst([errors @ own.abs() for own in layers], largest)
        if error < smallest / 2:
            best, smallest = found, error
        elif smallest <= LARGEST_ERROR:
            break  # rounding of the filters is left
        if smallest <= WANTED_ERRORS[dtype]:
            break
    assert best is not None, "taps are finite"
    made = torch.from_numpy(best.errors)
    error = _worst([_largest(made, own) for own in layers], largest)
    if error > LARGEST_ERROR:
        raise NoRealisation(
            f"the taps of a channel would differ by {error:.1e} of its largest tap, and at most "
            f"{LARGEST_ERROR:.0e} is accepted"
        )
    return best, error


def _largest(taps: Tensor, weights: Tensor) -> Tensor:
    """Return the largest absolute tap of each channel, `[C]`."""
    largest = weights.new_zeros(weights.shape[1])
    for part in torch.split(taps, BLOCK_ROWS):  # what is kept of each would leave gaps in the heap
        torch.maximum(largest, (part @ weights).abs_().amax(0), out=largest)
    return largest


def _worst(errors: Sequence[Tensor], largest: Sequence[Tensor]) -> float:
    """Return the largest error of any channel, relative to its largest tap."""
    return max(float((own / size).max()) for own, size in zip(errors, largest, strict=True))


def realise(taps: Array, rank: int) -> Realisation:
    """Return the realisation of filters `taps [N, K]`, N >= 2, by `rank` exponentials."""
    length = len(taps) - 1
    # From one decay over all taps to a few a lag: the slow ones need to lie less densely. With this
    # spacing errors are within a few times those of rates that are optimised one by one.
    spacing = np.log2(1 + np.linspace(0, 1, rank))
    rates = (FASTEST_RATE * length) ** spacing / length
    lags = np.arange(min(length, ALL_LAGS))
    if length > ALL_LAGS:
        later = np.geomspace(ALL_LAGS, length - 1, MORE_LAGS).astype(np.int64)
        lags = np.union1d(lags, later)
    weights = np.sqrt(np.diff(lags, append=length))[:, None]  # of a lag and those after it
    terms = weights * _decays(lags, rates)
    sizes = np.linalg.norm(terms, axis=0)
    solution, *_ = np.linalg.lstsq(terms / sizes, weights * taps[lags + 1], rcond=1e-14)
    outputs = solution / sizes[:, None]  # [r, K]
    errors = -taps[1:]
    for start in range(0, length, BLOCK_ROWS):
        rows = np.arange(start, min(start + BLOCK_ROWS, length))
        errors[rows] += _decays(rows, rates) @ outputs
    return Realisation(rates, outputs.T.copy(), errors)


def _decays(counts: NDArray[np.int64], rates: Array) -> Array:
    exponents = np.multiply.outer(counts, rates)
    decays: Array = np.exp(-exponents)
    decays[exponents > MOST_DECAYS] = 0
    return decays
