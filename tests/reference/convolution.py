"""Causal convolutions as the sums they are, in float64."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def causal(inputs: Array, filters: Array, num_outputs: int | None = None) -> Array:
    """`y[b, t, d] = sum_i filters[i, d] * inputs[b, t - i, d]`, past the inputs' end if asked."""
    batch, length, width = inputs.shape
    outputs = np.zeros((batch, num_outputs or length, width))
    for b in range(batch):
        for d in range(width):
            full = np.convolve(inputs[b, :, d], filters[:, d])[: outputs.shape[1]]  # a direct sum
            outputs[b, : len(full), d] = full
    return outputs


def spread(taps: Array, lag_step: int) -> Array:
    """Taps `lag_step` positions apart as a filter over all lags, zero in between."""
    filters = np.zeros((len(taps) * lag_step, *taps.shape[1:]))
    filters[::lag_step] = taps
    return filters


def alternating(length: int) -> Array:
    """`(-1)^i`, as a column."""
    return ((-1.0) ** np.arange(length))[:, None]


def stu_tensordot(x: Array, phi: Array, input_matrix: Array, filter_matrix: Array) -> Array:
    """Plus branch and minus branch of STU-T, each computed alone."""
    psi = phi @ filter_matrix  # [L, K] @ [K, D]
    projected = x @ input_matrix
    return causal(projected, psi) + causal(projected, alternating(len(psi)) * psi)


def stu_full(x: Array, phi: Array, plus: Array, minus: Array) -> Array:
    """`y[t] = sum_k M+_k U+_k[t] + M-_k U-_k[t]`."""
    outputs = np.zeros_like(x)
    ones = np.ones((1, x.shape[2]))
    for k in range(phi.shape[1]):
        outputs += causal(x, phi[:, k : k + 1] * ones) @ plus[k]
        outputs += causal(x, alternating(len(phi)) * phi[:, k : k + 1] * ones) @ minus[k]
    return outputs
