"""Realisations: the past of a convolution as a state of constant size.

Spectral filters are integrals of decaying exponentials, and a sum of a few dozen comes as close as
float64 can tell: `filter_k[m + 1] = sum_i C[k, i] exp(-x_i m)`. So a state of `r` coordinates holds
all that later outputs take from earlier inputs. After the input `u[t]` it is
`s_i = sum_m exp(-x_i m) u[t - m]`. With the next input it becomes `exp(-x_i) s_i + u[t + 1]`, and
to the output `q + 1` steps later it adds `sum_i C[k, i] exp(-x_i q) s_i`.

All filters, channels and layers share the rates `x`, and `C` is fitted by least squares. No rate is
negative, so states never grow without end. Terms cancel: they add up to thousands of times the
filter. States and sums over them are therefore in float64.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]

WANTED_ERRORS = {torch.float32: 2e-7, torch.float64: 1e-13}
"""Errors of a channel's outputs for white noise, relative to their size, that a higher rank need
not lower, by the dtype of the outputs."""
LARGEST_ERRORS = {torch.float32: 5e-7, torch.float64: 1e-8}
"""Largest errors that are accepted, of these outputs, and of a channel's taps relative to the
largest. In float64 those of filters that were rounded to float32 are too large: what rounding added
to them is no sum of exponentials."""
RANKS = range(8, 65, 4)
"""Ranks to choose from. Products are fastest with multiples of 4."""
FASTEST_RATE = 4.5
"""Highest rate per lag. What decays faster is gone after one."""
SLOWEST_DECAY = 0.5
"""Smallest product of a rate and the number of taps."""
REFINED_FROM = 200.0
"""Errors over the wanted one that a search for better rates may remove."""
ROUNDS, LEAST_GAIN = 50, 0.999
"""Most rounds of that search, and the factor of the squared error at which it ends."""
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
    further. Raises NoRealisation if it stays above `LARGEST_ERRORS[dtype]`.
    """
    accepted = LARGEST_ERRORS[dtype]
    taps = basis.double().cpu()
    if len(taps) < 2:
        raise NoRealisation("its filters have a single tap")
    layers = [torch.eye(taps.shape[1]) if own is None else own.cpu() for own in weights]
    layers = [own.double() for own in layers]
    wanted, sizes = WANTED_ERRORS[dtype], _norms(taps, layers)

    def error_of(found: Realisation) -> float:
        return _worst(_norms(torch.from_numpy(found.errors), layers), sizes)

    best, smallest = None, math.inf
    for rank in RANKS:
        found = realise(taps.numpy(), rank)
        error = error_of(found)
        if wanted < error <= REFINED_FROM * wanted:
            found = realise(taps.numpy(), rank, refine=True)
            error = error_of(found)
        if error < smallest / 2:
            best, smallest = found, error
        elif smallest <= accepted:
            break  # rounding of the filters is left
        if smallest <= wanted:
            break
    assert best is not None, "taps are finite"
    made = torch.from_numpy(best.errors)
    error = _worst([_largest(made, own) for own in layers], [_largest(taps, own) for own in layers])
    if max(error, smallest) > accepted:
        raise NoRealisation(
            f"the taps of a channel would differ by {error:.1e} of its largest tap, or its outputs "
            f"by {smallest:.1e}, and {str(dtype).removeprefix('torch.')} accepts {accepted:.0e}"
        )
    return best, error


def _largest(taps: Tensor, weights: Tensor) -> Tensor:
    """Return the largest absolute tap of each channel, `[C]`."""
    largest = weights.new_zeros(weights.shape[1])
    for part in torch.split(taps, BLOCK_ROWS):  # what is kept of each would leave gaps in the heap
        torch.maximum(largest, (part @ weights).abs_().amax(0), out=largest)
    return largest


def _norms(taps: Tensor, layers: Sequence[Tensor]) -> list[Tensor]:
    """Return the root of the sum of the squared taps of each layer's channels, `[C]`."""
    triangle = torch.linalg.qr(taps, mode="r").R
    return [(triangle @ weights).norm(dim=0) for weights in layers]


def _worst(errors: Sequence[Tensor], sizes: Sequence[Tensor]) -> float:
    """Return the largest error of any channel, relative to the channel's size."""
    tiny = torch.finfo(torch.float64).tiny
    pairs = zip(errors, sizes, strict=True)
    return max(float((own / size.clamp_min(tiny)).max()) for own, size in pairs)


def realise(taps: Array, rank: int, refine: bool = False) -> Realisation:
    """Return the realisation of filters `taps [N, K]`, N >= 2, by `rank` exponentials.

    refine: Search for better rates, from those that `rank` exponentials usually have.
    """
    length = len(taps) - 1
    # From one decay over all taps to a few a lag: the slow ones need to lie less densely.
    spacing = np.log2(1 + np.linspace(0, 1, rank))
    rates = (FASTEST_RATE * length) ** spacing / length
    lags = _fitted_lags(length)
    weights = np.sqrt(np.diff(lags, append=length))[:, None]  # of a lag and those after it
    wanted = weights * taps[lags + 1]

    fit = _Fit(rates, lags, weights, wanted)
    if refine:
        fit = _refined(fit)
    outputs = fit.outputs / fit.sizes[:, None]  # [r, K]
    errors = -taps[1:]
    for start in range(0, length, BLOCK_ROWS):
        rows = np.arange(start, min(start + BLOCK_ROWS, length))
        errors[rows] += _decays(rows, fit.rates) @ outputs
    return Realisation(fit.rates, outputs.T.copy(), errors)


def _fitted_lags(length: int) -> NDArray[np.int64]:
    """Return the lags to which sums of exponentials over `length` lags are fitted."""
    if length <= ALL_LAGS:
        return np.arange(length)
    later = np.geomspace(ALL_LAGS, length - 1, MORE_LAGS).astype(np.int64)
    return np.union1d(np.arange(ALL_LAGS), later)


class _Fit:
    """The best sums of exponentials of given rates.

    Args:
        rates: `[r]`.
        lags: Lags `[n]` at which sums are compared, beginning at 0 for the tap at lag 1.
        weights: Weights `[n, 1]` of the lags.
        wanted: Taps at the lags, times the weights, `[n, K]`.
    """

    def __init__(
        self, rates: Array, lags: NDArray[np.int64], weights: Array, wanted: Array
    ) -> None:
        self.rates, self.lags, self.weights, self.wanted = rates, lags, weights, wanted
        terms = weights * _decays(lags, rates)
        self.sizes = np.linalg.norm(terms, axis=0)
        self.terms = terms / self.sizes
        self.outputs, *_ = np.linalg.lstsq(self.terms, wanted, rcond=1e-14)
        self.errors = self.terms @ self.outputs - wanted
        self.loss = float((self.errors**2).sum())


def _refined(fit: _Fit) -> _Fit:
    """Return a fit of better rates: by Levenberg and Marquardt's method in their logarithms, where
    the outputs follow from the rates (variable projection, in Kaufman's approximation: "A variable
    projection method for solving separable nonlinear least squares problems", 1975)."""
    damping, bounds = 1e-3, np.log([SLOWEST_DECAY / (fit.lags[-1] + 1), FASTEST_RATE])
    for _ in range(ROUNDS):
        slopes = fit.lags[:, None] * fit.rates * fit.terms  # minus those of the terms
        basis, _ = np.linalg.qr(fit.terms)
        slopes -= basis @ (basis.T @ slopes)
        curvature = (slopes.T @ slopes) * (fit.outputs @ fit.outputs.T)
        descent = ((slopes.T @ fit.errors) * fit.outputs).sum(1)
        scale = np.sqrt(np.diag(curvature)) + np.finfo(np.float64).tiny
        curvature /= np.multiply.outer(scale, scale)
        while damping < 1e3:
            damped = curvature + damping * np.eye(len(scale))
            moved = np.log(fit.rates) + np.linalg.solve(damped, descent / scale) / scale
            rates = np.exp(np.sort(moved).clip(*bounds))
            tried = _Fit(rates, fit.lags, fit.weights, fit.wanted)
            if tried.loss < fit.loss:
                break
            damping *= 5
        else:
            return fit
        is_done, fit, damping = tried.loss > LEAST_GAIN * fit.loss, tried, damping / 5
        if is_done:
            return fit
    return fit


def _decays(counts: NDArray[np.int64], rates: Array) -> Array:
    exponents = np.multiply.outer(counts, rates)
    decays: Array = np.exp(-exponents)
    decays[exponents > MOST_DECAYS] = 0
    return decays
