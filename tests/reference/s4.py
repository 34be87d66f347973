"""A diagonal state space model as the convolution that it is, in complex128."""

import numpy as np
from numpy.typing import NDArray

from tests.reference.convolution import Array, causal

ComplexArray = NDArray[np.complex128]


def filters(
    decays: ComplexArray, outputs: ComplexArray, time_steps: Array, skip: Array, length: int
) -> Array:
    """`[length, D]` of `h' = A h + x, y = 2 Re(C h) + skip x`, held constant over a time step.

    decays A and outputs C: `[D, N / 2]`, one of each conjugate pair; time_steps, skip: `[D]`.
    """
    scaled = decays * time_steps[:, None]
    inputs = (np.exp(scaled) - 1) / decays  # zero-order hold
    lags = np.arange(length)[:, None, None]
    kernel = 2 * (outputs * inputs * np.exp(scaled) ** lags).sum(-1).real
    kernel[0] += skip
    return kernel


def convolve(x: Array, *parameters: NDArray) -> Array:
    """`[B, T, D]` both ways."""
    return causal(x, filters(*parameters, x.shape[1]))
