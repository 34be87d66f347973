"""Weights of 8 bits: whole numbers from -127 to 127 and a scale for each output.

Each output's largest weight becomes 127 or -127, so weights that were quantised before stay as they
are to the last bit but for rounding of the scale. Everything that is not multiplied with the
activations keeps its dtype: embeddings, norms, filters, and the networks that compute filters.
"""

from typing import NamedTuple

import torch
from torch import Tensor

LARGEST = 127


class Quantized(NamedTuple):
    """A weight matrix of 8 bits: `values * scales[:, None]`."""

    values: Tensor
    """int8 `[out, in]`."""
    scales: Tensor
    """float32 `[out]`."""


def quantize(weight: Tensor) -> Quantized:
    """Round a matrix `[out, in]` to 8 bits.

    The largest error of a weight is half a scale, 1/254 of the largest weight of its output. A
    matrix with a NaN or an infinity keeps it in its scales.
    """
    wide = weight.detach().float()
    scales = wide.abs().amax(1) / LARGEST
    values = wide / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    return Quantized(values.round_().to(torch.int8), scales)


def dequantize(weight: Quantized) -> Tensor:
    """Return the matrix in float32, `[out, in]`."""
    return weight.values * weight.scales[:, None]
