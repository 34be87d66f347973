"""Realisations: the past of a convolution as a state of constant size.

Spectral filters are sums of decaying exponentials, so the map from all past inputs to all later
outputs has a small numerical rank `r`, with one basis for all filters. The state after the input
`u[t]` is `s = sum_i V[i] u[t - i]`, `V [N, r]`. With the next input it becomes
`A^T s + V[0] u[t + 1]`, and to the output `q + 1` steps later it adds `C_k (A^T)^q s`. So the
filter's tap at lag `m + 1` is `C_k (A^T)^m V[0]`, and `V[m] = (A^T)^m V[0]`.

`V` spans the leading singular vectors of the filters' Hankel matrices, whose entries are
`H_k[q, i] = tap_k[q + i + 1]` (the balanced truncation of Kung, 1978). They are found without
building a matrix: taps are fitted by exponentials whose rates lie on dyadic panels, a family that
is closed under shifts. Everything is computed in float64.
"""

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stu.common.array_cache import cached_arrays

Array = NDArray[np.float64]

TOLERANCES = {torch.float32: (1e-8, 1e-9, 1e-10, 1e-11), torch.float64: (1e-13,)}
"""Smallest singular values to keep, relative to the largest, by the dtype of the outputs. They are
tried one after the other."""
LARGEST_ERROR = 5e-7
"""Largest error of a channel's taps that is accepted, relative to the channel's largest tap."""
NODES_PER_PANEL = 14
BLOCK_ROWS = 8192
MOST_INPUT_ROWS = 2**13
"""Rows of `V` that are kept: inputs that one product takes into a state."""


@dataclass(frozen=True)
class Realisation:
    """A state-space form of K filters, in float64."""

    transition: Array
    """`A [r, r]`, not symmetric."""
    inputs: Array
    """The first rows of `V`, `[n, r]`."""
    outputs: Array
    """`C [K, r]`."""
    hankels: Array
    """`S_k = V^T H_k V`, `[K, r, r]`: `V[:n] S_k s` is what a state adds to the next n outputs."""
    errors: Array
    """Taps of this form minus those that were asked for, from lag 1 on: `[N - 1, K]`."""

    @property
    def rank(self) -> int:
        """Numbers in the state of a channel."""
        return len(self.transition)

    def power(self, count: int) -> Array:
        """Return `(A^count)^T [r, r]`, which advances a state by `count` inputs of 0."""
        power: Array = np.linalg.matrix_power(self.transition, count).T
        return power


class NoRealisation(Exception):
    """Filters have no state of constant size that gives their taps."""


def fitting_realisation(
    basis: Tensor, weights: Sequence[Tensor | None], dtype: torch.dtype
) -> tuple[Realisation, float]:
    """Return the realisation of the lowest rank that gives all layers' taps, and its error.

    Args:
        basis: Filters `[N, K]`, tap j at lag j.
        weights: Weights `[K, C]` of each layer, whose taps are `basis @ weights`; None: the filters
            themselves.
        dtype: Type of the outputs, float32 or float64.

    The error is the largest of any channel and tap, relative to the channel's largest tap. Raises
    NoRealisation if it stays above `LARGEST_ERROR`.
    """
    taps = basis.double().cpu()
    if len(taps) < 2:
        raise NoRealisation("its filters have a single tap")
    smallest = math.inf
    for tolerance in TOLERANCES[dtype]:
        found = cached_realisation(taps.numpy(), tolerance)
        error = max(_largest_error(taps, found, own) for own in weights)
        if error <= LARGEST_ERROR:
            return found, error
        smallest = min(smallest, error)
    raise NoRealisation(
        f"the taps of a channel would differ by {smallest:.1e} of its largest tap, and at most "
        f"{LARGEST_ERROR:.0e} is accepted"
    )


def _largest_error(taps: Tensor, found: Realisation, weights: Tensor | None) -> float:
    """Return the largest error of a channel, relative to its largest tap."""
    own = torch.eye(taps.shape[1]) if weights is None else weights.cpu()
    errors, largest = torch.zeros(own.shape[1]), torch.zeros(own.shape[1])
    own, errors, largest = own.double(), errors.double(), largest.double()
    for part in torch.split(torch.from_numpy(found.errors), BLOCK_ROWS):
        errors = torch.maximum(errors, (part @ own).abs().amax(0))
    for part in torch.split(taps, BLOCK_ROWS):
        largest = torch.maximum(largest, (part @ own).abs().amax(0))
    return float((errors / largest.clamp_min(torch.finfo(torch.float64).tiny)).max())


def cached_realisation(taps: Array, tolerance: float) -> Realisation:
    """Return `realise(taps, tolerance)`, from disk if it is there."""
    digest = hashlib.sha256(taps.tobytes()).hexdigest()[:32]
    key = f"realisation-v1-{len(taps)}x{taps.shape[1]}-{tolerance:.0e}-{digest}"
    return Realisation(**cached_arrays(key, lambda: asdict(realise(taps, tolerance))))


def realise(taps: Array, tolerance: float) -> Realisation:
    """Return the realisation of filters `taps [N, K]`, N >= 2.

    tolerance: Smallest singular value to keep, relative to the largest of each filter.
    """
    length = len(taps)
    rates, left, small, coordinates = _exponentials(length)
    decay = np.exp(-rates)
    weights = decay[:, None] * (coordinates @ (left.T @ taps))  # of the taps from lag 1 on: [n, K]
    hankels = np.einsum("in,nk,jn->kij", small, weights, small, optimize=True)
    norms = np.linalg.norm(hankels, 2, axis=(1, 2), keepdims=True)
    scaled = hankels / np.maximum(norms, np.finfo(np.float64).tiny)
    _, sizes, rows = np.linalg.svd(scaled.reshape(-1, len(small)), full_matrices=False)
    basis = rows[sizes > tolerance * sizes[0]].T  # of V in terms of `left`: [kept, r]
    transition = basis.T @ (small @ (decay[:, None] * (coordinates @ basis)))
    outputs = (weights.T @ small.T) @ basis
    # Rows of V as the transition makes them, not as the basis has them: states advanced by one
    # input and by many then agree.
    inputs = np.empty((length, len(transition)))
    inputs[0] = left[0] @ basis
    done, power = 1, transition
    while done < length:
        count = min(done, length - done)
        inputs[done : done + count] = inputs[:count] @ power
        done, power = done + count, power @ power
    return Realisation(
        transition,
        inputs[:MOST_INPUT_ROWS].copy(),
        outputs,
        basis.T @ hankels @ basis,
        inputs[:-1] @ outputs.T - taps[1:],
    )


@functools.lru_cache(maxsize=4)
def _exponentials(length: int) -> tuple[Array, Array, Array, Array]:
    """Return a family of exponentials `P [length, n]` and its factors.

    Their rates `[n]`; the left singular vectors `U [length, kept]`; `small [kept, n]` with
    `P = U small`; and `coordinates [n, kept]` with `U = P coordinates`.
    """
    unit, _ = np.polynomial.legendre.leggauss(NODES_PER_PANEL)
    edges = [0.0, 1e-2 / length]
    while edges[-1] < 40:
        edges.append(2 * edges[-1])
    low, high = np.array(edges[:-1]), np.array(edges[1:])
    rates = ((high - low)[:, None] / 2 * unit + ((high + low) / 2)[:, None]).ravel()
    blocks = [np.arange(i, min(i + BLOCK_ROWS, length)) for i in range(0, length, BLOCK_ROWS)]

    def powers(rows: NDArray[np.int64]) -> Array:
        values: Array = np.exp(np.multiply.outer(rows, -rates))
        return values

    triangles = [np.linalg.qr(powers(rows), mode="r") for rows in blocks]
    splits = np.cumsum([len(triangle) for triangle in triangles])[:-1]
    stacked, triangle = np.linalg.qr(np.concatenate(triangles))
    vectors, sizes, right = np.linalg.svd(triangle)
    kept = int((sizes > 1e-14 * sizes[0]).sum())
    parts = np.split(stacked @ vectors[:, :kept], splits)
    left = np.concatenate(
        [np.linalg.qr(powers(rows)).Q @ part for rows, part in zip(blocks, parts, strict=True)]
    )
    return rates, left, sizes[:kept, None] * right[:kept], right[:kept].T / sizes[:kept]
