"""Products with weights of 8 bits, for the CPU.

Inputs are rounded to 8 bits in each product, with one scale for each row, so a product's error is
about 1% of its size. Sums are exact, in int32: a row's products do not depend on the other rows. A
step of few rows takes the time to read its weights, of which 8 bits are a quarter.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from serve.engine.packing import RowsTogether, in_pieces
from stu.layers import GatedMLP, gelu
from stu.quantization import Quantized, quantize, quantized
from stu.slices.channels import ChannelRanks

LEVELS = 127 if torch.cpu._is_vnni_supported() else 63
"""Largest number that inputs are rounded to. Processors without VNNI add two products in 16 bits,
which numbers of 8 bits would overflow."""
ZERO = LEVELS + 1
"""Number that stands for 0: FBGEMM takes inputs without a sign."""


def has_int8() -> bool:
    """Return whether torch has FBGEMM here, as on x86. oneDNN takes longer for few rows."""
    return "fbgemm" in torch.backends.quantized.supported_engines


class Int8Linear(RowsTogether):
    """`x @ weight.T`, `[.., in] -> [.., out]`, for inference.

    x: float32 or bfloat16, as the products.
    """

    def __init__(self, weight: Tensor | Quantized) -> None:
        super().__init__()
        if isinstance(weight, Tensor):
            weight = quantize(weight)
        self._weight = _packed(weight)
        self._ranks: ChannelRanks | None = None
        self._scales = torch.empty(0)

    def sum_over(self, ranks: ChannelRanks) -> None:
        """Return the sums of products of all ranks from now on, which have other inputs of the same
        rows.

        They are added before they are scaled: whole numbers, whose sum is that of a whole product
        to the last bit. Or the next product would round some of its inputs differently.
        """
        weight, _ = torch.ops.quantized.linear_unpack(self._weight)
        self._ranks, self._scales = ranks, weight.q_per_channel_scales().float()
        self._weight = _packed(Quantized(weight.int_repr(), torch.ones_like(self._scales)))

    def product(self, rows: Tensor) -> Tensor:
        wide = rows.float()
        smallest = torch.finfo(torch.float32).tiny
        largest = wide.abs().amax(-1, keepdim=True)
        if self._ranks is not None:
            largest = self._ranks.largest(largest)
        sizes = largest.clamp_min_(smallest).div_(LEVELS)
        linear = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        products: Tensor = linear(wide / sizes, 1.0, ZERO, self._weight)
        if self._ranks is not None:
            products = self._ranks.sum(products).mul_(self._scales)
        products.mul_(sizes)  # NaN where the row has one
        return products.to(rows.dtype)


class Int8GatedMLP(nn.Module):
    """`stu.layers.GatedMLP` with weights of 8 bits. One product computes gate and up."""

    activation: Callable[[Tensor], Tensor] = staticmethod(gelu)
    """As `GatedMLP.activation`."""

    def __init__(self, mlp: GatedMLP) -> None:
        super().__init__()
        gate, up, down = (quantized(own, "int8") for own in (mlp.gate, mlp.up, mlp.down))
        both = (torch.cat(parts) for parts in zip(gate, up, strict=True))
        self.gate_up, self.down = Int8Linear(Quantized(*both)), Int8Linear(down)

    def forward(self, x: Tensor) -> Tensor:
        return in_pieces(x, self._of_rows)

    def _of_rows(self, rows: Tensor) -> Tensor:
        gate, up = self.gate_up(rows).chunk(2, -1)
        gated: Tensor = self.down(self.activation(gate).mul_(up))
        return gated


def _packed(weight: Quantized) -> object:
    """Return a weight in FBGEMM's layout."""
    engines, zeros = torch.backends.quantized, torch.zeros(len(weight.scales), dtype=torch.int64)
    engine, engines.engine = engines.engine, "fbgemm"
    try:
        with warnings.catch_warnings():  # PyTorch means to replace this type of tensors
            warnings.simplefilter("ignore")
            typed = torch._make_per_channel_quantized_tensor(*weight, zeros, 0)
        return torch.ops.quantized.linear_prepack(typed, None)
    finally:
        engines.engine = engine
