"""Hyena of order 2 by its formulas, sum by sum, in float64 (Poli et al. 2023)."""

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from tests.reference.convolution import causal

Array = NDArray[np.float64]


def hyena(x: Array, weights: Mapping[str, Array], longest: int) -> Array:
    """`[B, T, D]` both ways, for a layer whose filters are made for `longest` positions."""
    projected = x @ weights["input.weight"].T
    shortly = causal(projected, weights["short_taps"])
    outer_gate, inner_gate, values = np.split(shortly, 3, axis=2)
    gated = inner_gate * values
    filters = np.array([implicit_filter(lag, weights, longest) for lag in range(x.shape[1])])
    mixed = causal(gated, filters) + weights["filter.skip"] * gated
    return (outer_gate * mixed) @ weights["output.weight"].T


def implicit_filter(lag: int, weights: Mapping[str, Array], longest: int) -> Array:
    """`[D]`, without the skip term."""
    time = lag / max(1, longest - 1)
    bands = [1e-4 + k * (15 - 1e-4) / 15 for k in range(16)]
    turning = [np.exp(-2j * math.pi * band * lag / longest) for band in bands]
    hidden = np.array([time, *(z.real for z in turning), *(z.imag for z in turning)])
    matrices = weights["filter.input_matrix"], *weights["filter.hidden_matrices"]
    for matrix, bias in zip(matrices, weights["filter.biases"], strict=True):
        hidden = np.sin(weights["filter.frequencies"] * (hidden @ matrix + bias))
    values = hidden @ weights["filter.output_matrix"]
    # The windows of the first and of the last channel fall to 1% after 1.5 and 0.3 contexts.
    slowest, fastest = math.log(100) / 1.5, math.log(100) / 0.3
    last = max(1, len(values) - 1)
    decays = [slowest + d * (fastest - slowest) / last for d in range(len(values))]
    return np.array([y * math.exp(-rate * time) for y, rate in zip(values, decays, strict=True)])
