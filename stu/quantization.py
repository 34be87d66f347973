"""Weights of 8 bits, with a scale for each output: whole numbers, or floats of 8 bits (e4m3).

Each output's largest weight becomes the largest number of the format, so weights that were
quantised before stay as they are to the last bit but for rounding of the scale. Everything that is
not multiplied with the activations keeps its dtype: embeddings, norms, filters, and the networks
that compute filters.
"""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

ByteWeights = Literal["int8", "fp8"]
"""Formats of 8 bits."""
DTYPES: dict[ByteWeights, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
LARGEST = {torch.int8: 127, torch.float8_e4m3fn: 448}
"""Largest number of each format."""


class Quantized(NamedTuple):
    """A weight matrix of 8 bits: `values * scales[:, None]`."""

    values: Tensor
    """int8 or float8_e4m3fn, `[out, in]`."""
    scales: Tensor
    """float32 `[out]`."""


def quantize(
    weight: Tensor,
    weights: ByteWeights = "int8",
    largest_of_all: Callable[[Tensor], Tensor] | None = None,
) -> Quantized:
    """Round a matrix `[out, in]` to 8 bits.

    largest_of_all: Function of the largest weight of each output here, `[out]`, that returns those
    of all ranks, if they have other inputs.

    The largest error of an int8 weight is half a scale, 1/254 of the largest weight of its output;
    that of an fp8 weight is 1/16 of itself, or of what is 1/28,000 of the largest if that is more.
    A matrix with a NaN or an infinity keeps it in its scales.
    """
    wide, dtype = weight.detach().float(), DTYPES[weights]
    largest = wide.abs().amax(1)
    scales = (largest_of_all(largest) if largest_of_all else largest) / LARGEST[dtype]
    values = wide / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    return Quantized((values.round_() if weights == "int8" else values).to(dtype), scales)


def dequantize(weight: Quantized) -> Tensor:
    """Return the matrix in float32, `[out, in]`."""
    return weight.values.float() * weight.scales[:, None]


def quantized(module: nn.Module, weights: ByteWeights) -> Quantized:
    """Return the weight of an `nn.Linear` or a `QuantizedLinear` in this format."""
    if not isinstance(module, QuantizedLinear):
        assert isinstance(module, nn.Linear)
        return quantize(module.weight, weights)
    if module.values.dtype == DTYPES[weights]:
        return Quantized(module.values, module.scales)
    return quantize(dequantize(Quantized(module.values, module.scales)), weights)


class QuantizedLinear(nn.Module):
    """`x @ weight.T + bias`, `[.., in] -> [.., out]`, with a weight that stays in 8 bits when a
    model is cast. The engine replaces it by a product that reads the 8 bits alone."""

    values: Tensor
    scales: Tensor
    bias: nn.Parameter | None

    def __init__(self, weight: Quantized, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.register_buffer("values", weight.values.contiguous())
        self.register_buffer("scales", weight.scales)
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight_in(x.dtype), self.bias)

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """Return the weight in another dtype."""
        return dequantize(Quantized(self.values, self.scales)).to(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLinear":
        values, scales = self.values, self.scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.values = values.to(self.values.device)
        self.scales = scales.to(self.scales.device)
        return self


def rounded_bytes(model: nn.Module, matrices: Mapping[str, int], weights: ByteWeights) -> int:
    """Return the bytes of a model's matrices in this format, with their scales, without those that
    it has in the format already.

    matrices: Names of its matrices, and their dim of outputs.
    """
    floats, num_bytes = dict(model.named_parameters()), 0
    for name in matrices.keys() & floats.keys():
        num_bytes += floats[name].numel() + 4 * floats[name].shape[matrices[name]]
    for module in model.modules():
        if isinstance(module, QuantizedLinear) and module.values.dtype != DTYPES[weights]:
            num_bytes += module.values.numel() + 4 * module.scales.numel()
    return num_bytes
